"""Rules of the target ``integer``: no float between the image's codes and the logits' scale.

A rule takes a model (or anything that holds one as ``model``) and yields findings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers, is_constant, name_of
from ptq_onnx.targets.checking.result import Facts, Finding, Violation
from ptq_onnx.targets.checking.target import Target, rule_name
from ptq_onnx.targets.integer.ranges import INTEGERS, Ranges, integer_ranges, with_types

FLOATS = frozenset(
    [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE]
)
STANDARD = ("", "ai.onnx")
BEFORE = frozenset(["Mul", "Div", "Transpose", "Reshape", "Identity", "Cast"])
"""What may stand between the image and its QuantizeLinear: a factor per channel, and what makes
floats with the channels first of an image in bytes, or with the channels last."""
BEHIND = frozenset(["DequantizeLinear", "Cast", "Mul", "Identity"])
"""What may stand between the last integers and an output."""


class Subject(Protocol):
    """What a checker hands to rules."""

    @property
    def model(self) -> ir.Model:
        """The model that is checked."""


@dataclass(frozen=True)
class Typed:
    """A model from :func:`with_types`, for all rules together: inference takes most of their
    time."""

    model: ir.Model


def model_of(subject: ir.Model | Subject) -> ir.Model:
    """The model itself."""
    return subject if isinstance(subject, ir.Model) else subject.model


def typed(subject: ir.Model | Subject) -> ir.Graph:
    """The graph with the types of all tensors, inferred where the file leaves them out."""
    model = model_of(subject)
    return (model if isinstance(subject, Typed) else with_types(model)).graph


def no_float_inside(subject: ir.Model | Subject) -> Iterator[Finding]:
    """Between the QuantizeLinear of the image and the scale of the logits every tensor is an
    integer; before, only the image times a factor; behind, only the codes' scale (FQ-ViT, arXiv
    2111.13824: a fully quantized transformer)."""
    graph = typed(subject)
    before, behind = _from_image(graph), _to_outputs(graph)
    for node in graph:
        if node in before or node in behind:
            continue
        if node.op_type == "QuantizeLinear" and all(
            v is None or is_constant(v) or v in graph.inputs or v.producer() in before
            for v in node.inputs
        ):
            continue
        touched = [v for v in (*node.inputs, *node.outputs) if v is not None]
        floats = [v for v in touched if v.dtype in FLOATS]
        if node.op_type == "Shape":
            continue
        if floats:
            yield Finding(
                name_of(node),
                f"{node.op_type} has the float tensor '{floats[0].name}' between the image's"
                " codes and the logits' scale.",
            )
        unknown = [v for v in node.outputs if v.dtype is None]
        if unknown:
            yield Finding(
                name_of(node),
                f"{node.op_type}: the type of '{unknown[0].name}' is not known.",
            )


def _from_image(graph: ir.Graph) -> set[ir.Node]:
    """Float nodes that scale the image before it is quantized."""
    found: set[ir.Node] = set()
    for node in graph:
        data = [v for v in node.inputs if v is not None and not is_constant(v)]
        scaling = node.op_type in BEFORE and data and node.outputs[0].dtype in FLOATS
        if scaling and all(v in graph.inputs or v.producer() in found for v in data):
            found.add(node)
    return found


def _to_outputs(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that only scale the logits: all they make goes to an output."""
    found: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node.op_type not in BEHIND or not any(v.dtype in FLOATS for v in node.outputs):
            continue
        readers = [reader for v in node.outputs for reader, _ in consumers(v)]
        ends = any(v.is_graph_output() for v in node.outputs) or bool(readers)
        if ends and all(reader in found for reader in readers):
            found.add(node)
    return found


def standard_domain(subject: ir.Model | Subject) -> Iterator[Finding]:
    """Every op is of the ONNX standard (its operator schemas), so that any runtime or compiler
    can read the file."""
    for node in model_of(subject).graph:
        if node.domain not in STANDARD:
            yield Finding(
                name_of(node),
                f"{node.op_type} is of the domain '{node.domain}', not of the ONNX standard.",
            )


def no_overflow(subject: ir.Model | Subject) -> Iterator[Finding]:
    """No integer can leave its type, no shift is as wide as its operand, and no divisor is
    zero, for any input: interval arithmetic over the file (ranges.py)."""
    ranges = integer_ranges(model_of(subject), inferred=isinstance(subject, Typed))
    for found in ranges.overflows:
        yield Finding(found.node, found.text)


RULES: tuple[Callable[[ir.Model | Subject], Iterator[Finding]], ...] = (
    standard_domain,
    no_float_inside,
    no_overflow,
)
"""All rules, in order."""


def violations(subject: ir.Model | Subject) -> list[Violation]:
    """What all rules say of a model."""
    typed_once = Typed(with_types(model_of(subject)))
    return [
        Violation(rule_name(rule), found.node, found.text, found.severity)
        for rule in RULES
        for found in rule(typed_once)
    ]


def histogram(subject: ir.Model | Subject) -> dict[str, int]:
    """How often each op occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model_of(subject).graph).most_common())


def widest(ranges: Ranges) -> dict[str, tuple[str, int, int]]:
    """The widest tensor of each integer type: its name, the bits it needs and those it has.

    ``accumulator`` is the widest output of MatMulInteger and ConvInteger.
    """
    has = {str(k.name).lower(): max(v[1], -v[0] - 1).bit_length() for k, v in INTEGERS.items()}
    found: dict[str, tuple[str, int, int]] = {}
    for entry in ranges.tensors.values():
        kinds = [entry.dtype]
        if entry.op_type in ("MatMulInteger", "ConvInteger"):
            kinds.append("accumulator")
        width = has[entry.dtype] + (not entry.dtype.startswith("u"))
        for kind in kinds:
            if kind not in found or entry.bits > found[kind][1]:
                found[kind] = (entry.tensor, entry.bits, width)
    return found


def facts(subject: ir.Model | Subject) -> Facts:
    """The widest tensor of each type, and the widest accumulator: the bits that it needs, and
    those that its type has."""
    found = widest(integer_ranges(model_of(subject)))
    return {
        f"widest {kind}": {"tensor": tensor, "bits": bits, "of": has}
        for kind, (tensor, bits, has) in found.items()
    }


TARGET = Target(RULES, facts)
