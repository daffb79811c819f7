"""Part of a quantized graph as one differentiable function of torch.

Each node is one of ``torch_ops.HANDLERS``, of those below, or of those that PPQ runs; a tensor with
a spec is rounded where it is made, straight through (``straight_through.py``). What of it is
learned stands in ``constants``, ``scales`` and ``codes``, whose tensors may be replaced by ones
with a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from ptq_onnx.blocks.walking import is_constant, is_linear, name_of
from ptq_onnx.engine.ppq_graph import attributes_of
from ptq_onnx.engine.ppq_import import (
    OPERATION_FORWARD_TABLE,
    Operation,
    TargetPlatform,
    Variable,
)
from ptq_onnx.engine.straight_through import Rounding, ends_of, knows, round_clip
from ptq_onnx.engine.torch_ops import HANDLERS, Handler, knows_resize, resize
from ptq_onnx.graph.bounded import BOUND
from ptq_onnx.numerics.spec import TensorSpec

Tensor = torch.Tensor


def _linear(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return F.linear(values[0], values[1].T, values[2] if len(values) > 2 else None)


def _by_ppq(kind: str) -> Handler:
    """PPQ's own torch function of an op."""
    function = OPERATION_FORWARD_TABLE[TargetPlatform.FP32][kind]

    def run(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Any:
        inputs = [Variable(str(at), v, is_parameter=True) for at, v in enumerate(values)]
        op = Operation(kind, kind, dict(attributes), inputs=inputs)
        return function(op, list(values))

    return run


PPQ_OPS = (
    "Abs", "AveragePool", "BatchNormalization", "Clip", "Conv", "Cos", "Exp", "GlobalAveragePool",
    "Greater", "HardSigmoid", "HardSwish", "MaxPool", "Neg", "Not", "Pad",
    "Sigmoid", "Sin", "Sqrt", "Tanh", "Where",
)  # fmt: skip
"""Those whose functions in PPQ give what ONNX Runtime gives."""
OPS: dict[str, Handler] = {
    **{kind: _by_ppq(kind) for kind in PPQ_OPS},
    **HANDLERS,
    "Add": lambda _, values: values[0] + values[1],
    "Div": lambda _, values: values[0] / values[1],
    "Einsum": lambda attributes, values: torch.einsum(str(attributes["equation"]), *values),
    "Identity": lambda _, values: values[0],
    "Linear": _linear,
    "Mul": lambda _, values: values[0] * values[1],
    "Resize": resize,
    "Sub": lambda _, values: values[0] - values[1],
    "Tile": lambda _, values: values[0].repeat(*values[1].tolist()),
}


class TorchForm:
    """Some nodes of a fused graph, in order, with the specs of the tensors around them.

    ``dropped``: the part of quantized activations that stay as they are, at random (QDrop, arXiv
    2203.05740), drawn from ``random``.
    """

    def __init__(
        self,
        nodes: Iterable[ir.Node],
        specs: Mapping[str, TensorSpec],
        device: str = "cpu",
    ) -> None:
        self.nodes = list(nodes)
        self.specs = specs
        self.device = device
        self.dropped = 0.0
        self.random = torch.Generator(device).manual_seed(0)
        self.constants: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.codes: dict[str, Tensor] = {}
        """Weights that are learned: their codes, not yet rounded; the value is code · scale …"""
        self.units: dict[str, Tensor] = {}
        """… · unit of those in blocks of rows (``numerics/multiples.py``), [K, N] …"""
        self.ends: dict[str, tuple[Tensor, Tensor]] = {}
        """… and the smallest and the largest code of those, [K, N]."""
        self._rounding: dict[str, Rounding] = {}
        self._attributes = {name_of(node): attributes_of(node) for node in self.nodes}
        self._reads = Counter(name for node in self.nodes for name in self.read_by(node))
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and is_constant(value) and value.const_value is not None:
                    array = np.array(value.const_value.numpy())
                    self.constants[str(value.name)] = torch.from_numpy(array).to(device)
                    self._step_of(value)
            for value in node.outputs:
                self._step_of(value)

    def _step_of(self, value: ir.Value) -> None:
        name = str(value.name)
        spec = self.specs.get(name)
        if spec is not None:
            self.scales[name] = torch.from_numpy(np.array(spec.scale, np.float32)).to(self.device)
            if not is_constant(value):
                self.scales[name] = self.scales[name].reshape(())
                self._rounding[name] = Rounding(spec, self.device)

    @staticmethod
    def read_by(node: ir.Node) -> list[str]:
        """Names of a node's inputs that are not constants."""
        return [str(v.name) for v in node.inputs if v is not None and not is_constant(v)]

    @property
    def inputs(self) -> list[str]:
        """Tensors that the nodes read and do not make, in order."""
        made = {str(v.name) for node in self.nodes for v in node.outputs}
        return [name for name in self._reads if name not in made]

    def missing(self) -> str | None:
        """Why the nodes cannot be run, or None."""
        for node in self.nodes:
            if node.op_type not in OPS:
                return f"{name_of(node)}: no {node.op_type} in torch"
            if node.op_type == "Resize" and not knows_resize(self._attributes[name_of(node)]):
                return f"{name_of(node)}: no Resize of this form in torch"
            for place, value in enumerate((*node.inputs, *node.outputs)):
                spec = None if value is None else self.specs.get(str(value.name))
                if spec is not None and is_constant(value) and not (is_linear(node) and place == 1):
                    return f"{name_of(node)}: a weight with codes that is no linear's"
                if spec is not None and not knows(spec.rule):
                    return f"{name_of(node)}: {spec.rule.code.name} codes have no gradient"
        return None

    def run(self, feeds: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, from those that the nodes read."""
        wanted = set(names)
        left, values = self._reads.copy(), dict(feeds)
        found: dict[str, Tensor] = {n: values[n] for n in wanted & values.keys()}
        for node in self.nodes:
            read = [None if v is None else self._value(v, values) for v in node.inputs]
            made = OPS[node.op_type](self._attributes[name_of(node)], read)  # type: ignore[arg-type]
            bound = self._attributes[name_of(node)].get(BOUND)
            if bound is not None:
                made = torch.clamp(made, max=float(bound))
            made = self._over_sums(node, read, made)
            for value, one in zip(node.outputs, _several(made), strict=False):
                name = str(value.name)
                values[name] = self._rounded(name, one)
                if name in wanted:
                    found[name] = values[name]
            for name in self.read_by(node):
                left[name] -= 1
                if not left[name]:
                    values.pop(name, None)
        return found

    def _value(self, value: ir.Value, values: Mapping[str, Tensor]) -> Tensor:
        name = str(value.name)
        if name in self.codes:
            return self.weight(name)
        return self.constants[name] if name in self.constants else values[name]

    def weight(self, name: str) -> Tensor:
        """The value of a weight whose codes are learned."""
        ends = self.ends.get(name) or ends_of(self.specs[name], self.device)
        made = round_clip(self.codes[name], *ends) * self.scales[name]
        return made * self.units[name] if name in self.units else made

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        rounding = self._rounding.get(name)
        if rounding is None:
            return x
        found = rounding(x, self.scales[name])
        if not self.dropped or rounding.sums:
            return found
        kept = torch.empty_like(x).uniform_(generator=self.random) < self.dropped
        return torch.where(kept, x, found)

    def _over_sums(self, node: ir.Node, read: Sequence[Tensor | None], made: Any) -> Any:
        """A product over the row sums of decoded values, where they do not sum to one."""
        first = node.inputs[0] if node.op_type == "MatMul" or is_linear(node) else None
        rounding = None if first is None else self._rounding.get(str(first.name))
        if rounding is None or not rounding.sums or read[0] is None:
            return made
        return made / read[0].sum(dim=-1, keepdim=True)


def _several(made: Any) -> Sequence[Tensor]:
    return made if isinstance(made, (list, tuple)) else [made]
