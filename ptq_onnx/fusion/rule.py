"""What the pattern rules have in common: the fused node keeps the name of the pattern's root."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase, RewriteRuleSet

Op: TypeAlias = Any
"""onnxscript's builder: ``op.Mul(a, b)`` is a pattern in ``pattern``, a node in ``rewrite``."""

Term: TypeAlias = Any
"""A part of a pattern."""

Context: TypeAlias = Any
"""What onnxscript tells ``check`` about a match."""

Result: TypeAlias = Any
"""onnxscript's ``MatchResult``: true, or false with a reason."""


class Rule(RewriteRuleClassBase):  # type: ignore[misc]
    """A pattern, a check that fails with a reason, and a rewrite.

    Intermediate results that something else reads, or that are graph outputs, stop a match.
    """

    root: ir.Node

    def begin(self, context: Context) -> Result:
        """The result of a check so far; keeps the root for ``rewrite``."""
        self.root = context.root
        return MatchResult()

    @property
    def graph(self) -> ir.Graph:
        """The graph that holds the match."""
        graph = self.root.graph
        assert isinstance(graph, ir.Graph)
        return graph

    def named(self, value: ir.Value) -> ir.Value:
        """The node behind ``value`` takes the name of the root it replaces."""
        node = value.producer()
        if node is not None:
            node.name = self.root.name
        return value


class _AtRoot(RewriteRule):  # type: ignore[misc]
    """A rule that is tried only at nodes of its root's op; at others its whole matcher would be set
    up to find that out."""

    def __init__(self, rule: RewriteRule) -> None:
        self.__dict__.update(rule.__dict__)
        self._op = rule._target_pattern.output_nodes[0].op

    def try_rewrite(self, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        """As of any rule, tried only where the op of the root matches."""
        if not self._op.matches(node.op_type):
            return None
        return super().try_rewrite(model, graph, node, **options)


def rule_set(rules: Iterable[RewriteRule], *, commute: bool = False) -> RewriteRuleSet:
    """The rules in their order, at each node those whose pattern ends in its op."""
    found = RewriteRuleSet(list(rules), commute=commute)
    found.rules = [_AtRoot(rule) for rule in found.rules]
    return found


def fuse_with(*rules: type[Rule]) -> Callable[[ir.Model], int]:
    """A function that applies the rules, operands in any order; it returns the count."""
    found = rule_set((rule.rule() for rule in rules), commute=True)

    def fuse(model: ir.Model) -> int:
        return int(found.apply_to_model(model))

    return fuse
