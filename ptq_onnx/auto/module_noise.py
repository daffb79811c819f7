"""What the bits of a module cost: three answers, each a number for every group of tensors.

``output``: noise to signal at the model's outputs when the group alone is quantized, measured.
``layer``: noise to signal of what a weight's linear makes, or of the activation itself.
``nuclear``: Σσ(X) ‖X̂ - X‖², X a weight or an image's activation, after Liu et al., "Post-Training
Quantization for Vision Transformer" (arXiv 2106.14156).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.sensitivity import layerwise_errors
from ptq_onnx.analysis.variants import Images
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.statistics import open_taps
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs

Array = NDArray[np.float32]
FEW = 4
"""Images whose activations are held for the answers that are not measured at the outputs."""


@dataclass(frozen=True)
class Group:
    """Weights or activations of one role in one block: quantized tensors, and their elements."""

    role: str
    block: int | None
    weights: bool
    bits: int
    tensors: frozenset[str]
    elements: int
    beside: int = 0
    """Bytes in the file beside the codes of weights, where they lie in blocks of rows."""

    @property
    def name(self) -> str:
        """``blocks.3.fc1.weight``"""
        return self.role if self.block is None else f"blocks.{self.block}.{self.role}"

    @property
    def part(self) -> str:
        """In reports."""
        return "weights" if self.weights else "activations"


def module_noise(
    by: str,
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    groups: Sequence[Group],
    images: Images,
    *,
    threads: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The answer ``by`` for every group, with its ``specs``; ``progress`` is called with groups
    done."""
    if by != "output":
        values = _values(model, groups, images, threads)
        found = [_local(by, group, specs, values) for group in groups]
        if progress is not None:
            progress(len(groups))
        return np.array(found)
    alone = {
        g: Module(
            g.name, "op", g.role, g.block, "weights" if g.weights else "activations", g.tensors
        )
        for g in groups
    }
    errors = layerwise_errors(
        model,
        {module: {t: specs[t] for t in module.tensors} for module in alone.values()},
        images,
        threads=threads,
        workers=workers,
        progress=progress,
    )
    return np.array([errors[alone[group]].snr for group in groups])


Held = dict[str, tuple[Array, Array | None]]
"""A tensor's values, and what a weight is multiplied with, [R, K]."""


def _values(model: ir.Model, groups: Sequence[Group], images: Images, threads: int) -> Held:
    """Weights with what their linears read, and activations, of ``FEW`` images."""
    wanted = {t for g in groups for t in g.tensors}
    read: dict[str, str] = {}
    weights: dict[str, Array] = {}
    for node in model.graph:
        weight = node.inputs[1] if is_linear(node) else None
        if weight is not None and str(weight.name) in wanted and node.inputs[0] is not None:
            read[str(weight.name)] = str(node.inputs[0].name)
            weights[str(weight.name)] = np.asarray(constant(weight), np.float32)
    made = {str(v.name) for n in model.graph for v in n.outputs}
    tapped = sorted((wanted | {*read.values()}) & made)
    session, feed, names = open_taps(graphs.to_standard(model), tapped, threads)
    count = min(max(FEW, images.batch if images.count else 0), len(images.values))
    found: dict[str, Any] = dict(
        zip(names, session.run(names, {feed: images.values[:count]}), strict=True)
    )
    held: Held = {name: (found[name], None) for name in wanted & found.keys()}
    for name, array in weights.items():
        x = found.get(read[name])
        held[name] = array, None if x is None else x.reshape(-1, x.shape[-1])
    return held


def _local(by: str, group: Group, specs: Mapping[str, TensorSpec], values: Held) -> float:
    """Of a group's tensors the sum of what is asked for."""
    total = 0.0
    for tensor in group.tensors & values.keys():
        value, read = values[tensor]
        lost = fake_quantize(value, specs[tensor]) - value
        if by == "nuclear":
            rows = value.reshape(-1, value.shape[-1])[: 4 * value.shape[-1]]
            norm = float(np.linalg.svd(rows, compute_uv=False).sum())
            total += norm * float(np.sum(lost**2, dtype=np.float64))
            continue
        if read is not None:
            centred = read - read.mean(axis=0)
            value, lost = centred @ value, centred @ lost
        total += float(np.sum(lost**2, dtype=np.float64)) / max(
            float(value.var()) * value.size, 1e-30
        )
    return total
