"""What was nearly fused: the rule that came closest to an op that was left over, and why it failed.

The reasons are those that the rules' own checks give. An op is an anchor of a family (an erf, of
GELU); the rules are tried, without rewriting, on it and on what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult

from ptq_onnx.fusion.conv_affine import ConvBatchNorm
from ptq_onnx.fusion.gelu import GeluAdd, GeluDiv, GeluMul, QuickGelu
from ptq_onnx.fusion.hard_swish import (
    HardSigmoidDiv,
    HardSigmoidMul,
    HardSwishDiv,
    HardSwishMulMul,
)
from ptq_onnx.fusion.l2_norm import L2Norm
from ptq_onnx.fusion.layer_norm import LayerNormAffine, LayerNormDiv, LayerNormMul
from ptq_onnx.fusion.linear import Gemm, GemmAdd, MatMul, MatMulAdd
from ptq_onnx.fusion.rms_norm import RmsNormDiv, RmsNormMul
from ptq_onnx.fusion.rule import Rule
from ptq_onnx.graph.formula import scalar

NORMS: tuple[type[Rule], ...] = (
    LayerNormDiv, LayerNormMul, LayerNormAffine, RmsNormDiv, RmsNormMul,
)  # fmt: skip
GELUS: tuple[type[Rule], ...] = (GeluMul, GeluDiv, GeluAdd)

HARD: tuple[type[Rule], ...] = (
    HardSwishDiv, HardSwishMulMul, HardSigmoidDiv, HardSigmoidMul,
)  # fmt: skip

ANCHORS: dict[str, tuple[str, int, tuple[type[Rule], ...]]] = {
    "Erf": ("Gelu", 4, GELUS),
    "Tanh": ("Gelu", 4, GELUS),
    "Sigmoid": ("QuickGelu", 1, (QuickGelu,)),
    "Sqrt": ("LayerNormalization", 4, NORMS),
    "Reciprocal": ("LayerNormalization", 3, NORMS),
    "BatchNormalization": ("ConvAffine", 0, (ConvBatchNorm,)),
    "Clip": ("HardSwish", 2, HARD),
    "ReduceL2": ("L2Normalization", 2, (L2Norm,)),
    "MatMul": ("Linear", 1, (MatMulAdd, MatMul)),
    "Gemm": ("Linear", 0, (GemmAdd, Gemm)),
}
"""By the op that is left over: the family, how far behind it its root may be, and the rules."""

NO_INNER = "No erf or tanh"


@dataclass(frozen=True)
class NearMiss:
    """An op that is not part of a fused one, the family it looks like, and what is in the way."""

    node: str
    op_type: str
    family: str
    reason: str


@dataclass
class _Tracer:
    """Keeps the failure that went furthest (onnxscript calls ``log`` for each)."""

    best: tuple[int, str] = (0, "")

    def log(self, rule: Any, graph: Any, node: ir.Node, result: MatchResult, status: Any) -> None:
        """Keep the reason of the attempt that came furthest."""
        score = 100 * int(status) + len(result.nodes)
        if result.reason and score > self.best[0] and not result.reason.startswith(NO_INNER):
            self.best = (score, " ".join(str(result.reason).split()))


def near_misses(model: ir.Model) -> tuple[NearMiss, ...]:
    """The closest rule for every op of a fused graph that looks like part of something."""
    found: list[NearMiss] = []
    for node in model.graph:
        anchor = ANCHORS.get(node.op_type) if node.domain == "" else None
        if anchor is None or not _is_suspect(node):
            continue
        family, reach, rules = anchor
        reason = _closest(model, list(_onward(node, reach)), rules)
        if reason:
            found.append(
                NearMiss(node.name or str(node.outputs[0].name), node.op_type, family, reason)
            )
    return tuple(found)


def _is_suspect(node: ir.Node) -> bool:
    """A product of two activations is none, nor a gate's sigmoid that scales something else."""
    if node.op_type == "MatMul":
        return any(v is not None and v.const_value is not None for v in node.inputs)
    if node.op_type == "Clip":  # of a sum with a number: of anything else it is ReLU6
        before = None if node.inputs[0] is None else node.inputs[0].producer()
        return (
            before is not None and before.op_type == "Add" and scalar(before.inputs[1]) is not None
        )
    if node.op_type == "BatchNormalization":
        before = None if node.inputs[0] is None else node.inputs[0].producer()
        return before is not None and before.op_type == "Conv"
    if node.op_type in ("Sqrt", "Reciprocal"):
        return _reads_mean(node, 3)
    return True


def _reads_mean(node: ir.Node, depth: int) -> bool:
    makers = [v.producer() for v in node.inputs if v is not None]
    return any(
        m is not None and (m.op_type == "ReduceMean" or (depth > 0 and _reads_mean(m, depth - 1)))
        for m in makers
    )


def _onward(node: ir.Node, reach: int) -> Iterable[ir.Node]:
    """The node and what follows it, ``reach`` steps far."""
    yield node
    if reach:
        for value in node.outputs:
            for use in value.uses():
                yield from _onward(use.node, reach - 1)


def _closest(model: ir.Model, roots: list[ir.Node], rules: tuple[type[Rule], ...]) -> str:
    tracer = _Tracer()
    for rule in rules:
        made = rule.rule()
        for one in (made, *made.commute()):
            for root in roots:
                one.match(
                    model, model.graph, root,
                    check_nodes_are_removable=one.remove_nodes, tracer=tracer,
                )  # fmt: skip
    return tracer.best[1]
