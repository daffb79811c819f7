"""Which positions of its tensors a model's output depends on.

A classifier reads its class token: in ViT-Ti an error there costs the output 16 times what it costs
at the mean position in the first block, and 150 times in the last (``engine/output_weights.py``).
Ranges, the rounding of weights and the means that biases restore are worth most where they count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.tapped_runs import copies_in
from ptq_onnx.engine.output_weights import EVENLY, position_weights
from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.progress import Advance, silent

Double = NDArray[np.float64]

IMAGES = 16
"""Images that go through the model and back."""
RARE = (LookupError, RuntimeError, TypeError, ValueError)
"""What torch raises at a rare form of an op."""


@dataclass(frozen=True)
class Importance:
    """``positions``: by tensor, an array over all axes but the first and those of the channels,
    with mean one. ``note``: why all positions count the same, where they do."""

    positions: Mapping[str, Double] = field(default_factory=dict)
    note: str | None = None

    def rows(self, name: str, places: Sequence[int]) -> NDArray[np.float32]:
        """The importance of each row, for a tensor whose rows stand in an array of the shape
        ``places``, the first axis images: [n]. One for each where nothing is known."""
        found = self.positions.get(name)
        if found is None or found.shape != tuple(places[1:]):
            return np.ones(int(np.prod(places)), np.float32)
        return np.broadcast_to(found, tuple(places)).reshape(-1).astype(np.float32)


def find_importance(
    model: ir.Model,
    axes: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    advance: Advance = silent,
) -> Importance:
    """Importance of the positions of the named tensors of a float model, from the first ``IMAGES``
    images of batches [B, C, H, W]; ``axes``: of each tensor's channels. ``advance`` is told the
    number of images done."""
    found: dict[str, Double] = {}

    def measure(form: TorchForm) -> None:
        outputs = [str(v.name) for v in model.graph.outputs]
        images = first_images(batches, IMAGES, advance)
        found.update(position_weights(form, form.inputs[0], axes, outputs, images))

    reason = run_in_torch(model, measure)
    if reason is not None:
        return Importance(note=f"The output is taken to depend on all positions alike; {reason}.")
    return Importance({name: EVENLY + (1 - EVENLY) * p for name, p in found.items()})


def run_in_torch(model: ir.Model, run: Callable[[TorchForm], None]) -> str | None:
    """Let ``run`` have a float model in torch; why gradients of it are not to be had, or None."""
    form = TorchForm(model.graph, {})
    reason = form.missing()
    if reason is None and len(form.inputs) != 1:
        reason = "the model has several inputs"
    if reason is None and model.graph.inputs[0].dtype not in (None, ir.DataType.FLOAT):
        reason = "the model's input has whole numbers"
    if reason is None:
        try:
            run(form)
        except RARE as error:
            reason = in_words(error)
    return reason


def in_words(error: Exception) -> str:
    """Why torch could not run an op."""
    return f"torch: {str(error).partition(chr(10))[0].rstrip('.')}"


def read_by_linears(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The linears of a graph by the name of what they read."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if is_linear(node) and node.inputs[0] is not None:
            found.setdefault(str(node.inputs[0].name), []).append(node)
    return found


def importance_of_inputs(
    model: ir.Model, batches: Iterable[Any], images: int, advance: Advance = silent
) -> Importance:
    """How much each position of what linears read counts for second moments of so many ``images``:
    as it does in all that they make, and the more evenly the fewer rows that leaves.

    Weights w of T positions are as good as images · (Σ w)² / Σ w² rows. Moments of K channels from
    n rows take K / (K + n) of their weight evenly, so that few rows do not decide alone: a rounding
    that fits the class tokens of the calibration images need not fit others.
    """
    linears = read_by_linears(model.graph)
    axes = {str(n.outputs[0].name): (-1,) for nodes in linears.values() for n in nodes}
    found = find_importance(model, axes, batches, advance)
    positions = {}
    for read, nodes in linears.items():
        names = [str(n.outputs[0].name) for n in nodes]
        known = [found.positions[name] for name in names if name in found.positions]
        weight = nodes[0].inputs[1]
        if not known or len({one.shape for one in known}) > 1 or weight is None:
            continue
        mean = np.mean(known, axis=0)
        rows = images * mean.sum() ** 2 / (mean**2).sum()
        channels = None if weight.shape is None else weight.shape[0]
        evenly = channels / (channels + rows) if isinstance(channels, int) else 0.0
        positions[read] = evenly + (1 - evenly) * mean
    return replace(found, positions=positions)


def first_images(batches: Iterable[Any], count: int, advance: Advance) -> Iterator[Tensor]:
    """The first images, one at a time: what is found depends on no batch size."""
    copies, left = copies_in(batches), count
    for batch in batches:
        for image in batch[: min(len(batch) // copies, left)]:
            left -= 1
            yield torch.from_numpy(np.ascontiguousarray(image[None]))
            advance(1)
        if not left:
            return
