"""What errors in what linears make cost the model's output, for the rounding of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.engine.output_weights import SOFTNESS, slopes
from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.graph.formula import sizes
from ptq_onnx.numerics.two_sided import steadied
from ptq_onnx.progress import Advance, silent
from ptq_onnx.quantizers.importance import first_images, run_in_torch

Double = NDArray[np.float64]

IMAGES = 128
"""Images that go through the model and back, at most."""
BYTES = 1 << 30
"""That all matrices may take; the widest are left out first."""


@dataclass(frozen=True)
class OutputCosts:
    """C = E[g gᵀ] [N, N] of linears' outputs by name, steadied. ``note``: what has none, why."""

    matrices: Mapping[str, Double] = field(default_factory=dict)
    note: str | None = None


def find_output_costs(
    model: ir.Model, batches: Iterable[Any], advance: Advance = silent
) -> OutputCosts:
    """Those of a float model's linears, but for its outputs, from the first ``IMAGES`` images of
    batches [B, C, H, W]. ``advance`` is told the number of images done."""
    outputs = [str(v.name) for v in model.graph.outputs]
    widths = {str(n.outputs[0].name): _width(n) for n in model.graph if is_linear(n)}
    names = sorted((n for n, w in widths.items() if w and n not in outputs), key=widths.__getitem__)
    room = np.cumsum([8 * widths[name] ** 2 for name in names])
    known = names[: int(np.searchsorted(room, BYTES, side="right"))]
    found = {name: _Sums() for name in known}

    def measure(form: TorchForm) -> None:
        images = first_images(batches, IMAGES, advance)
        for _, slope in slopes(form, form.inputs[0], known, outputs, images, SOFTNESS):
            for name, one in slope.items():
                found[name].add(one.numpy())

    reason = run_in_torch(model, measure)
    if reason is not None:
        return OutputCosts(note=f"Weights are rounded by their linears' outputs alone; {reason}.")
    left = len(names) - len(known)
    note = f"{left} wide linears are rounded by their own outputs alone." if left else None
    return OutputCosts({n: s.costs for n, s in found.items() if s.outer.any()}, note)


class _Sums:
    """g gᵀ of one tensor, and g² by position, over images."""

    def __init__(self) -> None:
        self.images = 0
        self.outer: Double = np.zeros((0, 0))
        self.power: Double = np.zeros(0)

    def add(self, slope: NDArray[np.float32]) -> None:
        """Those of one image [1, …, N]; nothing where positions are not always as many."""
        rows = slope.reshape(-1, slope.shape[-1])
        power = np.square(rows, dtype=np.float64).sum(axis=1)
        outer = (rows.T @ rows).astype(np.float64)
        if not self.images:
            self.outer, self.power = outer, power
        elif len(power) == len(self.power):
            self.outer += outer
            self.power += power
        else:
            return
        self.images += 1

    @property
    def costs(self) -> Double:
        """C, from as many rows as there are images times the positions that count."""
        total = float(np.square(self.power).sum())
        rows = self.images * float(self.power.sum()) ** 2 / total if total else 0.0
        return steadied(self.outer, rows)


def _width(linear: ir.Node) -> int:
    """How many numbers it makes of a row; 0 where that is not known."""
    weight = sizes(linear.inputs[1]) or []
    return weight[1] if len(weight) == 2 and isinstance(weight[1], int) else 0
