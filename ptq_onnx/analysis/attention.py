"""Attention maps of the float model and of quantized ones, on one image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.attention_results import AttentionMap
from ptq_onnx.analysis.attention_values import CODES, LOG2, UNIFORM, round_attention
from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums
from ptq_onnx.analysis.tokens import patch_layout
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.runtime.packed import picture_in

Array = NDArray[np.float32]


class Runs(Protocol):
    """What gives attention maps: a simulator, or one whose maps are rounded."""

    def run(self, batch: Array, names: Iterable[str]) -> dict[str, Array]:
        """Tensors by name of one batch."""


@dataclass(frozen=True)
class Rounded:
    """The maps of a float simulator, held in codes of few bits."""

    simulator: Simulator
    code: Code
    bits: int

    def run(self, batch: Array, names: Iterable[str]) -> dict[str, Array]:
        """The named tensors of a batch [B, C, H, W], rounded to codes."""
        found = self.simulator.run(batch, names)
        return {n: round_attention(v, self.code, self.bits) for n, v in found.items()}


def code_runs(reference: Simulator) -> dict[str, Runs]:
    """The float model beside its maps in 8 and 4 bits, uniform and log2 (LIS)."""
    names = {UNIFORM: "uniform", LOG2: "LIS"}
    rounded = {f"{names[code]} {bits}": Rounded(reference, code, bits) for code, bits in CODES}
    return {"float": reference, **rounded}


def attention_maps(
    model: ir.Model,
    blocks: Blocks,
    simulators: Mapping[str, Runs],
    batch: Array,
    image_name: str,
    preprocess: Preprocess,
    chosen: Sequence[int] | None = None,
) -> list[AttentionMap]:
    """Maps of the chosen blocks (the last by default) on one picture,
    given as the model's input batch [B, C, H, W] of which the first is shown.

    The first simulator is the reference for the SNR of the others. Blocks whose attention is
    not over the patches of the whole image (windows) are left out.
    """
    wanted = {
        role.block: name_of(node)
        for node in model.graph
        if (role := blocks.roles[name_of(node)]).name == "softmax" and role.block is not None
    }
    if not wanted:
        return []
    picked = [max(wanted)] if chosen is None else [b for b in chosen if b in wanted]
    outputs = {name_of(n): str(n.outputs[0].name) for n in model.graph}
    names = {block: outputs[wanted[block]] for block in picked}
    found = {label: simulator.run(batch, names.values()) for label, simulator in simulators.items()}
    images = picture_in(batch)
    if images is None:
        return []
    picture = _picture(images[0], preprocess)
    out: list[AttentionMap] = []
    for block, name in names.items():
        values = {label: result[name][:1] for label, result in found.items()}
        first = next(iter(values.values()))
        layout = patch_layout(first.shape, images[0].shape)
        if layout is None:
            continue
        rows, columns, extra = layout
        reference = next(iter(values))
        snr: dict[str, float | None] = {}
        for label, value in values.items():
            sums = Sums()
            sums.add(values[reference], value)
            snr[label] = None if label == reference else decibels(sums.snr)
        out.append(
            AttentionMap(
                block=block,
                image=picture,
                image_name=image_name,
                query="class token" if extra else "mean over queries",
                maps={k: _on_patches(v, rows, columns, extra) for k, v in values.items()},
                snr_db=snr,
            )
        )
    return out


def _on_patches(attention: Array, rows: int, columns: int, extra: int) -> Array:
    """[heads, rows, columns]: what the class token, or the average query, attends to."""
    query = attention[0, :, 0, :] if extra else attention[0].mean(axis=1)
    return np.asarray(query[:, extra:].reshape(-1, rows, columns), np.float32)


def _picture(image: Array, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The model input as the picture it came from, uint8 [H, W, 3]."""
    mean = np.array(preprocess.mean, np.float32)[:, None, None]
    std = np.array(preprocess.std, np.float32)[:, None, None]
    pixels = np.clip(np.rint((image * std + mean) * 255), 0, 255).astype(np.uint8)
    if len(pixels) == 1:
        pixels = np.repeat(pixels, 3, axis=0)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
