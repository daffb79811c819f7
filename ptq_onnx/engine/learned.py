"""What reconstruction learns of the nodes of a TorchForm, each in units of its own size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant, is_linear
from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.multiples import steps_of

Array = NDArray[np.float32]
Kind = Literal["affine", "steps", "weights", "codes"]
Place = dict[str, Tensor]

RATES: Mapping[Kind, float] = {"affine": 3e-3, "steps": 2e-3, "weights": 1e-3, "codes": 5e-3}
"""Adam's steps: of biases, γ and β over their size, of the steps of activations and of weights in
logarithms, and of codes."""
MIDDLE = 0.45
"""How far a code may start from the one that it is rounded to."""


@dataclass(frozen=True, eq=False)
class _Learned:
    """One tensor: where it stands, and how it follows from its parameter."""

    kind: Kind
    place: Place
    name: str
    make: Callable[[Tensor], Tensor]
    origin: Tensor
    parameter: Tensor


class Learned:
    """The parameters of a form: of every linear its bias, its weight's codes and steps, γ and β of
    norms, what channels are multiplied by or shifted, and the steps of activations.

    ``exact``: float weights by name, which say to which side a code leans.
    """

    def __init__(self, form: TorchForm, exact: Mapping[str, Array]) -> None:
        self.form = form
        self._all: list[_Learned] = []
        nodes = set(form.nodes)
        for node in form.nodes:
            # What others read too is not this form's to change.
            own = [
                v is not None and v.is_initializer() and {n for n, _ in v.uses()} <= nodes
                for v in node.inputs
            ]
            names = [
                str(v.name) if v is not None and mine else None
                for v, mine in zip(node.inputs, own, strict=True)
            ]
            if is_linear(node):
                self._weight(names[1], exact)
                for name in names[2:3]:
                    self._affine(name, relative=False)
            elif node.op_type in ("LayerNormalization", "RMSNormalization"):
                for name, relative in zip(names[1:3], (True, False), strict=False):
                    self._affine(name, relative)
            elif node.op_type in ("Mul", "Add"):
                for value, name in zip(node.inputs, names, strict=True):
                    if value is not None and is_constant(value):
                        self._affine(name, node.op_type == "Mul")
            for value in node.outputs:
                self._step(str(value.name))

    def _affine(self, name: str | None, relative: bool) -> None:
        """A vector of channels."""
        start = None if name is None else self.form.constants.get(name)
        if name is None or start is None or start.ndim == 0 or not start.is_floating_point():
            return
        if start.shape[-1] != start.numel() or start.numel() == 1 or name in self.form.specs:
            return
        unit = start if relative else start.pow(2).mean().sqrt()
        self._add(
            "affine", self.form.constants, name, torch.zeros_like(start),
            lambda p: start + unit * p,
        )  # fmt: skip

    def _step(self, name: str) -> None:
        """The step of an activation, but for those relative to their row's maximum."""
        spec = self.form.specs.get(name)
        if spec is not None and RowMaximum() not in spec.rule.around:
            self._relative("steps", name)

    def _relative(self, kind: Kind, name: str) -> None:
        start = self.form.scales[name]
        self._add(
            kind, self.form.scales, name, torch.zeros_like(start), lambda p: start * torch.exp(p)
        )

    def _weight(self, name: str | None, exact: Mapping[str, Array]) -> None:
        """The codes and steps of a weight."""
        spec = None if name is None else self.form.specs.get(name)
        if name is None or spec is None or name not in exact or "codes" not in RATES:
            return
        if spec.factor is not None:
            return
        steps = self.form.scales[name]
        if spec.order is not None:
            codes = quantize(self.form.constants[name].cpu().numpy(), spec).astype(np.int8)
            found = steps_of(codes, spec.order, spec.rule.bits)
            if found is None:
                return
            device = steps.device
            unit, *ends = (torch.from_numpy(v.astype(np.float32)).to(device) for v in found)
            self.form.units[name], self.form.ends[name] = unit, (ends[0], ends[1])
            steps = steps * unit
        real = torch.from_numpy(exact[name]).to(steps.device) / steps
        nearest = torch.round(self.form.constants[name] / steps)
        lean = (real - nearest).clamp(-MIDDLE, MIDDLE)
        self._add("codes", self.form.codes, name, nearest + lean, lambda p: p)
        self._relative("weights", name)

    def _add(
        self, kind: Kind, place: Place, name: str, origin: Tensor, make: Callable[[Tensor], Tensor]
    ) -> None:
        if kind not in RATES or name in {o.name for o in self._all if o.place is place}:
            return
        origin = origin.detach()
        parameter = origin.clone().requires_grad_()
        self._all.append(_Learned(kind, place, name, make, origin, parameter))

    def optimizer(self) -> Any:
        """Adam on all, each kind with its rate."""
        groups: list[dict[str, Any]] = [
            {"params": found, "lr": RATES[kind], "rate": RATES[kind]}
            for kind in RATES
            if (found := [o.parameter for o in self._all if o.kind == kind])
        ]
        return torch.optim.Adam(groups)

    def bind(self) -> None:
        """Let the form run with the parameters as they are."""
        for one in self._all:
            one.place[one.name] = one.make(one.parameter)

    def go(self, part: float) -> None:
        """Let the form run with that part of the way from where they started."""
        with torch.no_grad():
            for one in self._all:
                way = one.parameter.detach() - one.origin
                one.place[one.name] = one.make(one.origin + part * way)

    def found(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Changed constants and changed steps by name, as the form has them."""
        constants, steps = {}, {}
        for one in self._all:
            if one.kind == "codes":
                constants[one.name] = _array(self.form.weight(one.name))
            elif one.kind == "affine":
                constants[one.name] = _array(one.place[one.name])
            else:
                steps[one.name] = _array(one.place[one.name])
        return constants, steps


def _array(value: Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy(), np.float32)
