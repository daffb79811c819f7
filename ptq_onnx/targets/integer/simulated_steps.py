"""Integer arithmetic inside the simulator (``--arithmetic integer``, ``--target integer``).

Every compute node runs the step that the integer file is written from
(``nodes.py``), on NumPy int64 arrays, so that simulator and file agree to the last
bit. Between nodes PPQ carries real values: codes as float32, accumulators as float64, either
of which gives the integers back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.targets.integer.fixed_point import MULTIPLIER_BITS
from ptq_onnx.targets.integer.nodes import make_plan
from ptq_onnx.targets.integer.plan import Planned

Tensor = torch.Tensor
Override = Callable[[list[Tensor]], Tensor]


def integer_overrides(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    bits: int = MULTIPLIER_BITS,
    gelu: str = "table",
) -> tuple[dict[str, Override], list[str]]:
    """The integer arithmetic of every node that has one, by node name, and the names of the
    compute nodes that stay in float, because a tensor around them does. ``bits``: width of the
    fixed-point multipliers; ``gelu``: how GELU is computed."""
    plan = make_plan(model, specs, strict=False, bits=bits, gelu=gelu)
    image = image_input(model)
    found: dict[str, Override] = {
        name_of(node): StepOverride(planned, image, specs.get(str(image.name)))
        for node, planned in plan.steps.items()
    }
    return found, [name_of(node) for node in plan.left]


@dataclass(frozen=True)
class StepOverride:
    """One node in integers: real values on their grids in, real values on the grid out."""

    planned: Planned
    image: ir.Value
    spec: TensorSpec | None
    """Of the image: where the node reads it, its values are on no grid yet."""

    def __call__(self, values: list[Tensor]) -> Tensor:
        """The step on real values that lie on the grids of its inputs; real values on the grid of
        its output, on the device of the first input."""
        inputs = []
        for place, grid in zip(self.planned.positions, self.planned.read, strict=True):
            array = values[place].detach().cpu().numpy()
            if self.spec is not None and self.planned.node.inputs[place] is self.image:
                inputs.append(quantize(array, self.spec).astype(np.int64))
            else:
                inputs.append(grid.ints(array))
        made = self.planned.made.floats(self.planned.step(*inputs))
        return torch.from_numpy(made).to(values[self.planned.positions[0]].device)
