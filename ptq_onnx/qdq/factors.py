"""Where the factor of every quantized tensor goes: decided on the untouched graph, then written.

A tensor with a factor f is divided by it before its codes and multiplied by it behind them. Before:
into the γ, β of its LayerNormalization, into the columns of the linear or convolution that makes
it, or, of A·V, into V, whose codes are divided by the same f already; else by a Mul. Behind:
into the rows of a weight that was quantized with it, into A·V, or against the opposite factor of
the other side of QKᵀ; what else reads the tensor gets a Mul. Both sides of a product are decided
at once, so that none can be folded twice, or not at all. Only powers of two move before the codes
and through A·V, where that is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import (
    Factor,
    cancels,
    is_convolution,
    is_power_of_two,
    own_channels,
    rows_in_weight,
    rows_of,
)
from ptq_onnx.blocks.element_map import channel_map, static_shape
from ptq_onnx.blocks.walking import (
    consumers,
    is_constant,
    is_layout,
    is_linear,
    is_product,
    name_of,
    through_layout,
)
from ptq_onnx.numerics.spec import TensorSpec

Reader = tuple[ir.Node, int]
"""A compute op and which of its inputs."""
Before = Literal["norm", "columns", "product", "mul"]
Behind = Literal["rows", "product", "opposite"]
INTO: Mapping[str, str] = {
    "norm": "γ, β of",
    "columns": "the columns of",
    "product": "the values that enter",
    "rows": "the rows of",
    "opposite": "the other side of",
}


@dataclass(frozen=True, eq=False)
class Columns:
    """The linear or convolution that makes a tensor, and which of its output channels each entry
    of the factor is for (in the factor's shape)."""

    node: ir.Node
    index: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Place:
    """Where one tensor's factor goes."""

    value: ir.Value
    before: Before
    node: ir.Node | None = None
    """What takes 1/f; None for a Mul of its own."""
    columns: Columns | None = None
    behind: Mapping[Reader, Behind] = field(default_factory=dict)
    """How readers take the tensor divided by f."""
    scaled: frozenset[Reader] = frozenset()
    """Nodes, layout ops among them, that get it divided by f: all behind them takes it."""
    rescaled: tuple[Reader, ...] = ()
    """Readers, behind layout ops, that get it multiplied by f."""

    def __str__(self) -> str:
        parts = ["1/f by a Mul" if self.node is None else _into("1/f", self.before, self.node)]
        parts += [_into("f", how, node) for (node, _), how in self.behind.items()]
        if self.rescaled:
            parts.append("f by a Mul for " + _names(node for node, _ in self.rescaled))
        return f"{self.value.name}: {'; '.join(parts)}"


def _into(what: str, how: str, node: ir.Node) -> str:
    return f"{what} into {INTO[how]} {name_of(node)}"


def _names(nodes: Iterable[ir.Node]) -> str:
    return ", ".join(dict.fromkeys(map(name_of, nodes)))


@dataclass(frozen=True, eq=False)
class FactorPlan:
    """A place for every quantized tensor with a factor; prints as a line each."""

    places: Mapping[ir.Value, Place]

    @cached_property
    def taken(self) -> frozenset[Reader]:
        """Readers that take their input divided by the factor of the tensor behind it."""
        return frozenset(reader for place in self.places.values() for reader in place.behind)

    def __str__(self) -> str:
        return "\n".join(map(str, self.places.values()))


def quantized_values(
    graph: ir.Graph, specs: Mapping[str, TensorSpec]
) -> dict[ir.Value, TensorSpec]:
    """The specs of activations, by value, in graph order."""
    values = [*graph.inputs, *(v for node in graph for v in node.outputs)]
    return {v: specs[str(v.name)] for v in values if v.name in specs and not is_constant(v)}


def plan_factors(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> FactorPlan:
    """Decide for every activation with a factor; the graph is not changed."""
    return _Planner(specs, quantized_values(graph, specs)).run()


@dataclass
class _Planner:
    specs: Mapping[str, TensorSpec]
    quantized: Mapping[ir.Value, TensorSpec]

    def run(self) -> FactorPlan:
        """A place for every quantized tensor with a factor."""
        return FactorPlan(
            {
                value: self.place(value, spec.factor)
                for value, spec in self.quantized.items()
                if spec.factor is not None
            }
        )

    def factor(self, value: ir.Value | None) -> Factor | None:
        """The factor of a tensor; None where it has none, or is not quantized."""
        spec = None if value is None else self.quantized.get(value)
        return None if spec is None else spec.factor

    def place(self, value: ir.Value, factor: Factor) -> Place:
        """Where one tensor's factor goes, before its codes and behind them."""
        behind: dict[Reader, Behind] = {}
        rescaled: list[Reader] = []
        scaled: set[Reader] = set()
        for use in consumers(value):
            if use[0].op_type == "Shape":
                continue
            found = leaves(use)
            taken: dict[Reader, Behind | None]
            taken = {leaf: self.takes(value, leaf, factor) for leaf in found}
            if found and all(taken.values()) and not _shown(use):
                scaled.add(use)
            else:
                # Layout ops are shared: a reader that takes it gets some of its own.
                apart = is_layout(use[0]) and use[1] == 0
                for leaf in found:
                    if not apart or way(value, leaf[0].inputs[leaf[1]]) is None:
                        taken[leaf] = None
            behind.update((leaf, how) for leaf, how in taken.items() if how is not None)
            rescaled += [leaf for leaf, how in taken.items() if how is None]
        before, node, columns = self.before(value, factor)
        return Place(value, before, node, columns, behind, frozenset(scaled), tuple(rescaled))

    # --- behind the codes -----------------------------------------------------------------

    def takes(self, value: ir.Value, leaf: Reader, factor: Factor) -> Behind | None:
        """How a reader computes the right result from the tensor divided by f, if it does."""
        node, index = leaf
        read = node.inputs[index]
        if read is None or self.coded_between(value, read):
            return None
        if (is_linear(node) or is_convolution(node)) and index == 0:
            weight = node.inputs[1]
            spec = None if weight is None else self.specs.get(str(weight.name))
            if spec is None or spec.factor is None:
                return None
            rows = rows_of(value, read, factor, -1 if is_linear(node) else 1)
            fits = rows is not None and cancels(rows_in_weight(node, rows), spec.factor)
            return "rows" if fits else None
        if not is_product(node) or read is not value:
            return None
        if self.opposite(node):
            return "opposite"
        return "product" if index == 1 and self.passes(node) else None

    def coded_between(self, value: ir.Value, read: ir.Value | None) -> bool:
        """True where what a reader takes of ``value`` is quantized again on the way."""
        while read is not None and read is not value:
            if read in self.quantized:
                return True
            node = read.producer()
            read = None if node is None or not is_layout(node) else node.inputs[0]
        return False

    def opposite(self, product: ir.Node) -> bool:
        """True for QKᵀ whose sides have factors that cancel."""
        one, other = (self.factor(v) for v in product.inputs)
        if one is None or other is None:
            return False
        one, other = np.atleast_2d(one), np.swapaxes(np.atleast_2d(other), -1, -2)
        return one.shape == other.shape and one.shape[-2] == 1 and cancels(one, other)

    def passes(self, product: ir.Node) -> bool:
        """True for A·V where the result has the factor of V, per channel."""
        one, other = self.factor(product.inputs[1]), self.factor(product.outputs[0])
        if one is None or other is None or self.opposite(product):
            return False
        per_column = one.ndim < 2 or one.shape[-2] == 1
        return per_column and is_power_of_two(one) and np.array_equal(one, other)

    # --- before the codes -----------------------------------------------------------------

    def before(
        self, value: ir.Value, factor: Factor
    ) -> tuple[Before, ir.Node | None, Columns | None]:
        """Where 1/f goes."""
        node = value.producer()
        if node is None or not is_power_of_two(factor):
            return "mul", None, None
        if _is_norm(node, value) and factor.ndim == 1:
            return "norm", node, None
        if is_product(node) and self.passes(node):
            return "product", node, None
        columns = self.columns(value, factor)
        return ("mul", None, None) if columns is None else ("columns", columns.node, columns)

    def columns(self, value: ir.Value, factor: Factor) -> Columns | None:
        """The linear or convolution whose output channels can be divided by the factor."""
        output = value
        while (node := output.producer()) is not None and is_layout(node):
            before = next((v for v in node.inputs if not is_constant(v)), None)
            if before is None or before in self.quantized:
                return None
            output = before
        if node is None or not (is_linear(node) or is_convolution(node)):
            return None
        weight = node.inputs[1]
        if (
            weight is None
            or weight.const_value is None
            or not all(map(is_constant, node.inputs[1:]))
        ):
            return None
        spec = self.specs.get(str(weight.name))
        if spec is not None and (
            spec.axis != (1 if is_linear(node) else 0) or spec.rule.grain.block_size
        ):
            return None
        axis = -1 if is_linear(node) else 1
        if value is output:
            index = own_channels(output, factor, axis)
        else:
            index = channel_map(output, value, factor.shape, axis)
        if index is None or not _one_each(index, factor):
            return None
        return Columns(node, index) if self.reads_alone(output, value, index, axis) else None

    def reads_alone(
        self, output: ir.Value, value: ir.Value, index: NDArray[np.int64], axis: int
    ) -> bool:
        """True where nothing but ``value`` reads those channels of ``output``."""
        if value is output:
            return True
        for read in self.parts(output, value):
            shape = static_shape(read)
            other = None if shape is None else channel_map(output, read, tuple(shape[1:]), axis)
            if other is None or _overlap(index, other):
                return False
        return True

    def parts(self, value: ir.Value, but: ir.Value) -> list[ir.Value]:
        """What is read of ``value``: by compute ops behind layout ops, as an output of the graph,
        or quantized; all but what goes through ``but``."""
        if value is but:
            return []
        if value.is_graph_output() or value in self.quantized:
            return [value]
        found: list[ir.Value] = []
        for node, index in consumers(value):
            if node.op_type == "Shape" or (is_layout(node) and index and node.op_type != "Concat"):
                continue
            if is_layout(node):
                found += [v for out in node.outputs for v in self.parts(out, but)]
            else:
                found.append(value)
        return found


def _is_norm(node: ir.Node, value: ir.Value) -> bool:
    """True for a LayerNormalization whose γ, β are constants and whose output is ``value``."""
    constants = all(v is None or v.const_value is not None for v in node.inputs[1:])
    return node.op_type == "LayerNormalization" and constants and value is node.outputs[0]


def _overlap(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether two arrays of channels have one in common."""
    seen = np.zeros(max(one.max(initial=0), other.max(initial=0)) + 1, bool)
    seen[one] = True
    return bool(seen[other].any())


def _one_each(index: NDArray[np.int64], factor: Factor) -> bool:
    """True where no output channel is to be divided by two factors (heads that share one)."""
    values = factor.ravel()
    _, first, inverse = np.unique(index.ravel(), return_index=True, return_inverse=True)
    return bool(np.array_equal(values[first][inverse], values))


def _shown(use: Reader) -> bool:
    """True where what layout ops make of the tensor is an output of the graph."""
    node, _ = use
    if not is_layout(node) or node.op_type == "Shape":
        return False
    return any(
        v.is_graph_output() or any(_shown(other) for other in consumers(v)) for v in node.outputs
    )


def leaves(use: Reader) -> list[Reader]:
    """The compute ops that a use leads to, itself or behind layout ops."""
    if not is_layout(use[0]):
        return [use]
    return [leaf for made in use[0].outputs for leaf in through_layout(made)]


def way(start: ir.Value, end: ir.Value | None) -> list[tuple[ir.Node, int]] | None:
    """The layout ops that lead from ``start`` to ``end``, each with the index of its output, in
    order; None where one reads more than constants besides."""
    found: list[tuple[ir.Node, int]] = []
    while end is not start:
        assert end is not None
        node = end.producer()
        assert node is not None
        if not all(is_constant(v) for v in node.inputs[1:]):
            return None
        found.append((node, list(node.outputs).index(end)))
        end = node.inputs[0]
    return found[::-1]
