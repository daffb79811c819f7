"""Graphwise analysis: the error of every op while all ops are quantized.

Each op's output, quantized, is compared with that of the float model on the same images;
sums run over all images, so memory holds one batch. Covers every compute op: LayerNorm,
softmax, GELU and adds as well as products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.results import BlockError, Graphwise, OpError, decibels
from ptq_onnx.blocks import Blocks, is_layout, is_product, name_of, through_layout
from ptq_onnx.engine import Simulator, VitQuantizer
from ptq_onnx.errors import ModelError

Array = NDArray[np.float32]

WORST = 1e20
"""The noise-to-signal ratio that stands for noise without any signal (-200 dB)."""


@dataclass
class Sums:
    """Running sums of one tensor pair; float64."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    dot: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, reference: Array, value: Array) -> None:
        """Fold in one batch of float and quantized values (same shape)."""
        f = reference.ravel().astype(np.float64)
        q = value.ravel().astype(np.float64)
        error = q - f
        self.signal += float(f @ f)
        self.noise += float(error @ error)
        self.power += float(q @ q)
        self.dot += float(f @ q)
        self.count += f.size
        self.largest = max(self.largest, float(np.abs(error).max(initial=0)))

    @property
    def snr(self) -> float:
        """Σ(q - f)² / Σf², at most ``WORST``; 0 where both sums are zero."""
        if self.noise == 0:
            return 0.0
        return min(self.noise / max(self.signal, 1e-30), WORST)

    @property
    def cosine(self) -> float:
        """Cosine of float and quantized values; 1 where both are zero."""
        scale = math.sqrt(self.signal * self.power)
        return 1.0 if scale == 0 else self.dot / scale


def graphwise(
    model: ir.Model,
    quantizer: VitQuantizer,
    blocks: Blocks,
    batches: Iterable[Any],
    *,
    held_apart: bool,
    simulator: Simulator | None = None,
    reference: Simulator | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Graphwise:
    """Errors of all compute ops and blocks over all batches ([B, C, H, W]).

    Raises ModelError where there is not a single image.
    """
    quantized = simulator or Simulator(model, quantizer, threads=threads)
    reference = reference or Simulator(model, None, threads=threads)
    nodes = {str(n.outputs[0].name): n for n in model.graph if not is_layout(n)}
    sums = {name: Sums() for name in nodes}
    images = 0
    for batch in batches:
        floats: dict[str, Array] = {}
        reference.walk(batch, floats.__setitem__)

        def compare(name: str, value: Array, floats: dict[str, Array] = floats) -> None:
            if name in sums:
                sums[name].add(floats.pop(name), value)

        quantized.walk(batch, compare)
        images += len(batch)
        if progress is not None:
            progress(len(batch))
    if not images:
        raise ModelError("There are no images to analyse the quantized model on.")
    ops = [
        _op_error(node, sums[name], blocks, _is_quantized(node, quantizer))
        for name, node in nodes.items()
        if sums[name].count
    ]
    return Graphwise(images, held_apart, tuple(ops), tuple(_block_errors(ops)))


def _is_quantized(node: ir.Node, quantizer: VitQuantizer) -> bool:
    """True where the op's output is rounded to codes: at once, or wherever it is read, behind
    layout ops or behind the scalar that scales QKᵀ."""
    output = node.outputs[0]
    if str(output.name) in quantizer.specs:
        return True
    read = [reader.inputs[index] for reader, index in through_layout(output)]
    if read and all(v is not None and str(v.name) in quantizer.specs for v in read):
        return True
    readers = [reader for reader, _ in through_layout(output)]
    return (
        is_product(node)
        and len(readers) == 1
        and readers[0].op_type == "Mul"
        and _is_quantized(readers[0], quantizer)
    )


def _op_error(node: ir.Node, found: Sums, blocks: Blocks, quantized: bool) -> OpError:
    role = blocks.roles[name_of(node)]
    return OpError(
        node=name_of(node),
        op_type=node.op_type,
        role=role.name,
        block=role.block,
        snr=found.snr,
        snr_db=decibels(found.snr),
        mse=found.noise / found.count,
        cosine=found.cosine,
        max_abs=found.largest,
        quantized=quantized,
    )


def _block_errors(ops: Iterable[OpError]) -> list[BlockError]:
    """A block's error is that of its second residual add."""
    return [
        BlockError(op.block, op.snr, op.snr_db)
        for op in ops
        if op.role == "residual2" and op.block is not None
    ]
