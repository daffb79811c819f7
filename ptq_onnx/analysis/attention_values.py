"""Attention values: their distribution, what 8 and 4 bits make of them, ranks and rollout.

Sources: log2 levels against uniform ones: FQ-ViT, arXiv 2111.13824, figure 3. Ranks: Liu et
al., Post-Training Quantization for Vision Transformer, NeurIPS 2021, whose loss asks that the
order of a row's values be kept. Rollout: Abnar and Zuidema, arXiv 2005.00928.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.attention_results import (
    AttentionAnalysis,
    AttentionCode,
    BlockAttention,
    Rollout,
)
from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums
from ptq_onnx.analysis.tokens import Tokens, find_tokens, first_images
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.codes.by_name import CodeName
from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.dot import dot
from ptq_onnx.numerics.fake_quantize import dequantize, fake_quantize
from ptq_onnx.numerics.spec import Rule, TensorSpec

Array = NDArray[np.float32]

LOWEST = -16
"""The histogram's lowest edge is 2^LOWEST."""
PER_OCTAVE = 2
UNIFORM, LOG2 = Uniform(), Log2()
CODES: tuple[tuple[Code, int], ...] = ((UNIFORM, 8), (LOG2, 8), (UNIFORM, 4), (LOG2, 4))
ROWS = 64
"""Rows per head and image whose ranks are compared, spread evenly."""
EVERY = 8
"""Of those rows every so many also have their pairs counted."""


def attention_spec(code: Code, bits: int) -> TensorSpec:
    """Codes of values on [0, 1]: 2^bits - 1 uniform steps, or log2 codes (LIS)."""
    rule = Rule(bits, signed=False, symmetric=code == UNIFORM, code=code, method="fixed")
    step = np.float32(1) / np.float32((1 << bits) - 1)
    return TensorSpec("", rule, np.asarray(step), np.asarray(0, np.int32), clip=(0.0, 1.0))


def round_attention(attention: Array, code: Code, bits: int) -> Array:
    """Attention on [0, 1] in 2^bits - 1 uniform steps, or as log2 codes (LIS)."""
    return fake_quantize(attention, attention_spec(code, bits))


def levels(code: Code, bits: int) -> NDArray[np.float64]:
    """The values that codes of that width stand for, ascending."""
    codes = np.arange(1 << bits, dtype=np.int32)
    return np.unique(dequantize(codes, attention_spec(code, bits)).astype(np.float64))


def ranks(rows: Array) -> NDArray[np.float64]:
    """Rank of every value in its row [R, N], counted from 0; equal values share the mean."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    count = rows.shape[1]
    place = np.broadcast_to(np.arange(count), rows.shape)
    new = np.concatenate([np.ones((len(rows), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    end = np.concatenate([new[:, 1:], np.ones((len(rows), 1), bool)], axis=1)
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(end, place, count)[:, ::-1], axis=1)[:, ::-1]
    out = np.empty(rows.shape)
    np.put_along_axis(out, order, (first + last) / 2, axis=1)
    return out


def rank_correlation(one: Array, other: Array) -> NDArray[np.float64]:
    """Spearman's correlation of rows [R, N] pairwise, [R]; 0 where a row has one value only,
    1 where both have."""
    a, b = (r - r.mean(axis=1, keepdims=True) for r in (ranks(one), ranks(other)))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    both = ~a.any(axis=1) & ~b.any(axis=1)
    found = np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)
    return np.where(both, 1.0, found)


def discordant(one: Array, other: Array) -> NDArray[np.float64]:
    """The share of pairs in every row [R, N] that differ in ``one`` and are not in the same
    order in ``other``, [R]: the ranking loss of Liu et al. as a count, its margin 0."""
    out = np.zeros(len(one))
    upper = np.triu_indices(one.shape[1], 1)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        before = np.sign(a[upper[0]] - a[upper[1]])
        after = np.sign(b[upper[0]] - b[upper[1]])
        pairs = int(np.count_nonzero(before))
        lost = int(np.count_nonzero((before != 0) & (after != before)))
        out[index] = lost / max(pairs, 1)
    return out


def rollout(maps: Sequence[Array]) -> NDArray[np.float64]:
    """Attention rollout [N, N] of the maps [H, N, N] of all blocks, first block first.

    Â = (mean over heads + I) / 2, rows scaled to sum to one; the product of all Â.
    """
    count = maps[0].shape[-1]
    product = np.eye(count)
    for one in maps:
        mixed = one.mean(axis=0, dtype=np.float64) + np.eye(count)
        product = (mixed / mixed.sum(axis=1, keepdims=True)) @ product
    return product


@dataclass
class _Code:
    """Sums of one code over batches."""

    sums: Sums = field(default_factory=Sums)
    rank: float = 0.0
    ranked: int = 0
    turned: float = 0.0
    paired: int = 0
    lowest: float = np.inf
    highest: float = -np.inf
    total: float = 0.0
    rows: int = 0
    zeros: int = 0

    def add(self, maps: Array, rounded: Array) -> None:
        """Add maps [B, H, N, N], float and rounded."""
        self.sums.add(maps, rounded)
        one, other = _some_rows(maps), _some_rows(rounded)
        self.rank += float(rank_correlation(one, other).sum())
        self.ranked += len(one)
        one, other = _some_rows(maps, EVERY), _some_rows(rounded, EVERY)
        self.turned += float(discordant(one, other).sum())
        self.paired += len(one)
        row = rounded.sum(axis=-1, dtype=np.float64)
        self.lowest = min(self.lowest, float(row.min()))
        self.highest = max(self.highest, float(row.max()))
        self.total += float(row.sum())
        self.rows += row.size
        self.zeros += int(np.count_nonzero(rounded == 0))

    def result(self, rule: Rule) -> AttentionCode:
        """Means over all that was added."""
        return AttentionCode(
            code=CodeName(rule.code.name),
            bits=rule.bits,
            snr_db=decibels(self.sums.snr),
            rank=self.rank / max(self.ranked, 1),
            discordant=self.turned / max(self.paired, 1),
            row_sum=(self.lowest, self.total / max(self.rows, 1), self.highest),
            zero=self.zeros / max(self.sums.count, 1),
            snr=self.sums.snr,
            row=RowMaximum() in rule.around,
        )


class _Block:
    """Sums of one block over batches."""

    def __init__(self, heads: int, own: TensorSpec | None) -> None:
        self.heads = heads
        self.counts = np.zeros(-LOWEST * PER_OCTAVE, np.int64)
        keys = list(CODES)
        if own is not None and own.rule.bits not in (8, 4):
            keys += [(UNIFORM, own.rule.bits), (LOG2, own.rule.bits)]
        self.codes = [(attention_spec(*key), _Code()) for key in keys]
        self.own = None if own is None else (own, _Code())
        self.model = _Code()

    def add(self, maps: Array, quantized: Array) -> None:
        """Add a batch of maps [B, H, N, N]: the float ones, and those of the quantized model."""
        octave = np.log2(np.maximum(maps, np.float32(2.0**LOWEST)).ravel()) - LOWEST
        place = np.clip(octave * PER_OCTAVE, 0, len(self.counts) - 1).astype(np.int64)
        self.counts += np.bincount(place, minlength=len(self.counts))
        for spec, found in (*self.codes, *([] if self.own is None else [self.own])):
            found.add(maps, fake_quantize(maps, spec))
        self.model.add(maps, quantized)

    def result(self, block: int) -> BlockAttention:
        """What each code makes of the block's maps, and the quantized model."""
        model = self.model.result(Rule())
        return BlockAttention(
            block=block,
            heads=self.heads,
            lowest=LOWEST,
            counts=tuple(int(v) for v in self.counts),
            codes=tuple(one.result(spec.rule) for spec, one in self.codes),
            snr_db=model.snr_db,
            rank=model.rank,
            discordant=model.discordant,
            snr=model.snr,
            own=None if self.own is None else self.own[1].result(self.own[0].rule),
        )


def softmax_outputs(model: ir.Model, blocks: Blocks) -> dict[int, str]:
    """The tensor that holds the attention map of each block."""
    return {
        role.block: str(node.outputs[0].name)
        for node in model.graph
        if (role := blocks.roles[name_of(node)]).name == "softmax" and role.block is not None
    }


def attention_values(
    model: ir.Model,
    blocks: Blocks,
    reference: Simulator,
    quantized: Simulator,
    batches: Iterable[tuple[Sequence[str], Any]],
    specs: Mapping[str, TensorSpec] | None = None,
    progress: Callable[[int], None] | None = None,
) -> AttentionAnalysis | None:
    """Analyse the attention of all blocks; ``batches``: names of images with their pixels.

    ``specs``: those of the quantized model. ``progress`` is called with images done. None for a
    model without attention. Rollout is that of the first image, where every block attends over
    all its patches.
    """
    names = softmax_outputs(model, blocks)
    if not names:
        return None
    found: dict[int, _Block] = {}
    rolled: Rollout | None = None
    tokens = find_tokens(model, blocks)
    images = 0
    for labels, batch in batches:
        floats = reference.run(batch, names.values())
        others = quantized.run(batch, names.values())
        for block, name in names.items():
            maps = floats[name]
            if maps.ndim < 3:
                continue
            heads, own = maps.shape[1] if maps.ndim == 4 else 1, (specs or {}).get(name)
            one = found.setdefault(block, _Block(heads, own))
            one.add(*(first_images(m, len(batch), len(labels)) for m in (maps, others[name])))
        if not images and tokens is not None:
            rolled = _rollout(names, floats, others, tokens, labels[0])
        images += len(labels)
        if progress is not None:
            progress(len(labels))
    return AttentionAnalysis(images, tuple(b.result(k) for k, b in sorted(found.items())), rolled)


def _rollout(
    names: Mapping[int, str],
    floats: Mapping[str, Array],
    others: Mapping[str, Array],
    tokens: Tokens,
    image: str,
) -> Rollout | None:
    shape = (tokens.count, tokens.count)
    if any(floats[n].shape[2:] != shape for n in names.values()):
        return None
    ordered = [names[block] for block in sorted(names)]
    one, other = (
        _on_patches(rollout([maps[n][0] for n in ordered]), tokens) for maps in (floats, others)
    )
    return Rollout(image, _plain(one), _plain(other), _correlation(one, other))


def _on_patches(found: NDArray[np.float64], tokens: Tokens) -> NDArray[np.float64]:
    """What the class token, or the average token, gets from the patches [rows, columns]."""
    row = found[0] if tokens.extra else found.mean(axis=0)
    return np.asarray(row[tokens.extra :].reshape(tokens.rows, tokens.columns))


def _plain(values: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    a, b = one.ravel() - one.mean(), other.ravel() - other.mean()
    scale = float(np.sqrt(dot(a, a) * dot(b, b)))
    return 1.0 if scale == 0 else dot(a, b) / scale


def _some_rows(maps: Array, every: int = 1) -> Array:
    """Rows of attention maps [B, H, N, N], ``ROWS`` of each head at most, as [R, N]; of those
    ``every`` so many."""
    count = maps.shape[-2]
    chosen = np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(int))[::every]
    return np.ascontiguousarray(maps[..., chosen, :].reshape(-1, maps.shape[-1]))
