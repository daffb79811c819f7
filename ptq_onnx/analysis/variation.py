"""How weights and activations vary, tensor by tensor, and what that costs their rounding.

Sources: SDAM, the standard deviation of the absolute mean: Huang et al., Quantization
Variation (VVTQ), arXiv 2307.00331. Channel ranges of LayerNorm inputs: FQ-ViT, arXiv
2111.13824, figures 1 and 2. Massive tokens: Sun et al., arXiv 2402.17762.

Two runs of the float model: one for the extremes (reduced inside ONNX Runtime), one for raw
values, batch by batch; memory holds one batch and fixed-size sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums
from ptq_onnx.analysis.tokens import Tokens, find_tokens, first_images
from ptq_onnx.analysis.variation_results import (
    ChannelRanges,
    KindVariation,
    Outlier,
    TensorHistogram,
    TensorVariation,
    Variation,
)
from ptq_onnx.blocks.element_map import channel_map
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.statistics import ChannelStatistics, collect
from ptq_onnx.numerics.around.around import ClipOf
from ptq_onnx.numerics.fake_quantize import clipped, fake_quantize, reach
from ptq_onnx.numerics.spec import Site, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.runtime.sessions import Session

Array = NDArray[np.float32]
Double = NDArray[np.float64]

BINS = 64
"""Bins of the histograms in the report."""
OUTLIER = 10.0
"""A channel or token is named from this many times the median on."""
NAMED = 3
"""Channels named per tensor."""


def variation(
    model: ir.Model,
    blocks: Blocks,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
    batches: Iterable[Any],
    *,
    rounded: ir.Model | None = None,
    count: int | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Variation:
    """Variation of every site of the float ``model``; ``batches`` [B, C, H, W] are run twice.

    ``rounded``: the model whose weights the file holds, where they were rounded another way than
    to the nearest. ``count``: how many images these are, where others fill up a batch behind the
    last. ``progress`` is called with the images of both runs.
    """
    activations = [s for s in sites.values() if not s.is_parameter]
    stats = collect(model, activations, batches, threads=threads, progress=progress)
    tokens = find_tokens(model, blocks)
    seen = {s.tensor: _Seen(s, stats.channels[s.tensor], specs.get(s.tensor)) for s in activations}
    images = 0
    for size, values in _raw(model, activations, batches, threads):
        real = size if count is None else min(size, count - images)
        for tensor, value in values.items():
            seen[tensor].add(first_images(value, size, real), tokens)
        images += real
        if progress is not None:
            progress(real)
    found = [one.result() for one in seen.values()]
    outliers = [o for one in seen.values() for o in one.outliers()]
    weights = [_weight(model, rounded or model, s, sites, specs.get(s.tensor))
               for s in sites.values() if s.is_parameter]  # fmt: skip
    norms = _norm_inputs(model, blocks, seen)
    tensors = tuple(found + [w for w in weights if w is not None])
    return Variation(images, tensors, tuple(_kinds(tensors)), norms, tuple(outliers))


def sdam(means: Double) -> float | None:
    """Standard deviation of absolute means; None for fewer than two."""
    return None if means.size < 2 else float(means.std())


def kurtosis(count: int, powers: Double) -> float:
    """Fourth standardized moment from the sums of x, x², x³, x⁴; 3 where nothing varies."""
    m1, m2, m3, m4 = powers / max(count, 1)
    variance = m2 - m1 * m1
    if variance <= 1e-12 * max(m2, 1e-300):
        return 3.0
    return float((m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2)


@dataclass
class _Histogram:
    """Two rows of counts over one range."""

    low: float
    high: float
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def add(self, row: int, values: Array) -> None:
        width = max(self.high - self.low, 1e-30)
        place = (values.ravel() - np.float32(self.low)) * np.float32(BINS / width)
        self.counts[row] += np.bincount(
            np.clip(place, 0, BINS - 1).astype(np.int64), minlength=BINS
        )

    def result(self) -> TensorHistogram:
        one, two = (tuple(int(v) for v in row) for row in self.counts)
        return TensorHistogram(self.low, self.high, one, two)


@dataclass
class _Rounding:
    """What rounding by a spec costs; sums over batches."""

    spec: TensorSpec
    sums: Sums = field(default_factory=Sums)
    clipped: int = 0
    clip_noise: float = 0.0

    def add(self, value: Array, rounded: Array) -> None:
        self.sums.add(value, rounded)
        outside = clipped(value, self.spec)
        self.clipped += int(np.count_nonzero(outside))
        error = rounded[outside].astype(np.float64) - value[outside]
        self.clip_noise += float(error @ error)

    @property
    def of(self) -> ClipOf:
        """What the range of the codes is of."""
        return self.spec.rule.clip_of


class _Seen:
    """Sums of one activation over all batches."""

    def __init__(self, site: Site, stats: ChannelStatistics, spec: TensorSpec | None) -> None:
        self.site, self.stats = site, stats
        self.low, self.high = float(stats.lowest[0].min()), float(stats.highest[0].max())
        self.histogram = _Histogram(self.low, self.high)
        self.rounding = None if spec is None else _Rounding(spec)
        self.powers = np.zeros(4)
        self.absolute = np.zeros(len(stats.power))
        self.count = 0
        self.places: dict[int, tuple[float, int | None]] = {}
        self.massive: tuple[float, float, int, int] | None = None

    @property
    def heads(self) -> bool:
        """True where the first channel axis counts heads. Attention maps are left out: their
        rows sum to one, so the mean of every head is the same."""
        return len(self.site.channel_axes) == 2 or self.site.role == "qk"

    def add(self, value: Array, tokens: Tokens | None) -> None:
        """Fold in one batch."""
        flat = value.ravel().astype(np.float64)
        square = flat * flat
        self.powers += (flat.sum(), square.sum(), square @ flat, square @ square)
        self.count += flat.size
        shared = tuple(a for a in range(value.ndim) if a not in self.site.channel_axes)
        self.absolute += np.abs(value).sum(axis=shared, dtype=np.float64).ravel()
        self.histogram.add(0, value)
        if self.rounding is not None:
            rounded = fake_quantize(value, self.rounding.spec)
            self.rounding.add(value, rounded)
            self.histogram.add(1, rounded)
        if len(self.site.channel_axes) == 1 and value.ndim == 3:
            self._extremes(value, tokens)

    def _extremes(self, value: Array, tokens: Tokens | None) -> None:
        """Where the extreme of each channel is, and the token that stands out most."""
        size = np.abs(value)
        flat = size.reshape(-1, value.shape[-1])
        rows = flat.argmax(axis=0)
        counted = tokens is not None and value.shape[1] == tokens.count
        for channel in np.argsort(-flat[rows, np.arange(len(rows))])[:NAMED]:
            row = int(rows[channel])
            token = row % value.shape[1] if counted else None
            found = float(value.reshape(flat.shape)[row, channel])
            if abs(found) > abs(self.places.get(int(channel), (0.0, None))[0]):
                self.places[int(channel)] = found, token
        if not counted:
            return
        largest = size.max(axis=2)
        ratio = largest / np.maximum(np.median(largest, axis=1, keepdims=True), 1e-30)
        image, token = np.unravel_index(int(ratio.argmax()), ratio.shape)
        channel = int(size[image, token].argmax())
        best = float(ratio[image, token])
        if self.massive is None or best > self.massive[0]:
            self.massive = best, float(value[image, token, channel]), int(token), channel

    def extreme(self) -> Array:
        """The largest |x| of every channel."""
        low, high = np.abs(self.stats.lowest[0]), np.abs(self.stats.highest[0])
        return np.asarray(np.maximum(low, high), np.float32)

    def result(self) -> TensorVariation:
        """Everything about the tensor."""
        channels = len(self.stats.power)
        means = self.absolute / (self.count / channels)
        by_head = means.reshape(self._head_count(), -1).mean(axis=1) if self.heads else means[:1]
        rounding = self.rounding
        return TensorVariation(
            tensor=self.site.tensor,
            role=self.site.role,
            block=self.site.block,
            parameter=False,
            low=self.low,
            high=self.high,
            absolute_mean=float(means.mean()),
            sdam=None if self.site.role in ("qk", "softmax") else sdam(means),
            sdam_heads=sdam(by_head) if self.heads else None,
            kurtosis=kurtosis(self.count, self.powers),
            channels=channels,
            channel_ratio=ratio_to_median(self.extreme()),
            **_rounded(rounding),
            histogram=self.histogram.result(),
        )

    def _head_count(self) -> int:
        size = self.site.shape[self.site.channel_axes[0]] if self.site.channel_axes else 1
        return size if isinstance(size, int) else 1

    def outliers(self) -> list[Outlier]:
        """Channels and tokens that stand out from the median ``OUTLIER`` times."""
        site, found = self.site, []
        median = float(np.median(self.extreme())) if self.places else 0.0
        named = sorted(self.places.items(), key=lambda item: -abs(item[1][0]))[:NAMED]
        for channel, (value, token) in named:
            if abs(value) >= OUTLIER * median > 0:
                found.append(
                    Outlier(
                        "channel", site.tensor, site.role, site.block, channel, token, value,
                        abs(value) / median,
                    )
                )  # fmt: skip
        if self.massive is not None and self.massive[0] >= OUTLIER:
            ratio, value, token, channel = self.massive
            found.append(
                Outlier("token", site.tensor, site.role, site.block, channel, token, value, ratio)
            )
        return found


def ratio_to_median(extremes: Array) -> float | None:
    """The largest extreme over the median one; None without several channels or without any
    median."""
    median = float(np.median(extremes)) if extremes.size > 1 else 0.0
    return float(extremes.max()) / median if median > 0 else None


def _rounded(rounding: _Rounding | None) -> dict[str, Any]:
    if rounding is None:
        return {"clip": None, "clipped": None, "snr_db": None, "clip_noise": None}
    sums = rounding.sums
    return {
        "clip": reach(rounding.spec),
        "clip_of": rounding.of,
        "clipped": rounding.clipped / max(sums.count, 1),
        "snr": sums.snr,
        "snr_db": decibels(sums.snr),
        "clip_noise": rounding.clip_noise / sums.noise if sums.noise else 0.0,
    }


def _raw(
    model: ir.Model,
    sites: list[Site],
    batches: Iterable[Any],
    threads: int,
) -> Iterable[tuple[int, dict[str, Array]]]:
    """The size of every batch, and the raw values of all sites."""
    copy = graphs.to_standard(model)
    values = {v.name: v for v in copy.graph.inputs}
    values.update({v.name: v for node in copy.graph for v in node.outputs})
    outputs = {str(v.name) for v in copy.graph.outputs}
    for site in sites:
        if site.tensor not in outputs and values[site.tensor].producer() is not None:
            copy.graph.outputs.append(values[site.tensor])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = Session(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    wanted = [s.tensor for s in sites if s.tensor != feed]
    for batch in batches:
        found = dict(zip(wanted, session.run(wanted, {feed: batch}), strict=True))
        if len(wanted) < len(sites):
            found[feed] = batch
        yield len(batch), found


def _weight(
    model: ir.Model,
    rounded_model: ir.Model,
    site: Site,
    sites: Mapping[str, Site],
    spec: TensorSpec | None,
) -> TensorVariation | None:
    constant = model.graph.initializers[site.tensor].const_value
    if constant is None:
        return None
    value = np.asarray(constant.numpy(), np.float32)
    flat = value.ravel().astype(np.float64)
    square = flat * flat
    powers = np.array([flat.sum(), square.sum(), square @ flat, square @ square])
    others = tuple(a for a in range(value.ndim) if a not in site.channel_axes)
    means = np.abs(value).mean(axis=others, dtype=np.float64).ravel()
    extremes = np.abs(value).max(axis=others, initial=0).ravel()
    histogram = _Histogram(float(value.min(initial=0)), float(value.max(initial=0)))
    histogram.add(0, value)
    rounding = None if spec is None else _Rounding(spec)
    if rounding is not None:
        held = rounded_model.graph.initializers[site.tensor].const_value
        start = value if held is None else np.asarray(held.numpy(), np.float32)
        rounded = fake_quantize(start, rounding.spec)
        rounding.add(value, rounded)
        histogram.add(1, rounded)
    heads = _head_means(model, site, sites, means)
    return TensorVariation(
        tensor=site.tensor,
        role=site.role,
        block=site.block,
        parameter=True,
        low=histogram.low,
        high=histogram.high,
        absolute_mean=float(np.abs(flat).mean()) if flat.size else 0.0,
        sdam=sdam(means),
        sdam_heads=None if heads is None else sdam(heads),
        kurtosis=kurtosis(flat.size, powers),
        channels=len(means),
        channel_ratio=ratio_to_median(extremes),
        **_rounded(rounding),
        histogram=histogram.result(),
    )


def _head_means(
    model: ir.Model, site: Site, sites: Mapping[str, Site], means: Double
) -> Double | None:
    """Mean |w| of every head of q, k and v, from those of the linear's columns [N]."""
    if site.role.removesuffix(".weight") not in ("qkv", "q", "k", "v"):
        return None
    values = {v.name: v for node in model.graph for v in node.outputs}
    linear = next((n for n in model.graph if name_of(n) == site.consumers[0]), None)
    heads: list[float] = []
    for other in sites.values():
        if linear is None or other.block != site.block or other.role not in ("q", "k", "v"):
            continue
        shape = tuple(
            int(d) if a in other.channel_axes else 1
            for a, d in enumerate(other.shape)
            if a > 0 and (isinstance(d, int) or a not in other.channel_axes)
        )
        columns = channel_map(linear.outputs[0], values[other.tensor], shape)
        if columns is not None and len(shape) == 3:
            heads += [float(means[c.ravel()].mean()) for c in columns]
    return np.array(heads) if heads else None


def _norm_inputs(
    model: ir.Model, blocks: Blocks, seen: Mapping[str, _Seen]
) -> tuple[ChannelRanges, ...]:
    """Channel ranges of what every LayerNorm reads, in graph order."""
    found: list[ChannelRanges] = []
    for node in model.graph:
        read = node.inputs[0] if node.op_type == "LayerNormalization" else None
        one = None if read is None else seen.get(str(read.name))
        if one is None:
            continue
        extremes = one.extreme()
        box = np.percentile(extremes, [0, 25, 50, 75, 100])
        found.append(
            ChannelRanges(
                tensor=one.site.tensor,
                role=one.site.role,
                block=one.site.block,
                reader=blocks.roles[name_of(node)].label,
                low=tuple(float(v) for v in one.stats.lowest[0]),
                high=tuple(float(v) for v in one.stats.highest[0]),
                box=(float(box[0]), float(box[1]), float(box[2]), float(box[3]), float(box[4])),
            )
        )
    return tuple(found)


def _kinds(tensors: Iterable[TensorVariation]) -> list[KindVariation]:
    """Per role, in the order in which roles appear."""
    groups: dict[tuple[str, bool], list[TensorVariation]] = defaultdict(list)
    for one in tensors:
        groups[one.role, one.parameter].append(one)
    return [
        KindVariation(
            role=role,
            parameter=parameter,
            tensors=len(group),
            absolute_mean=float(np.mean([t.absolute_mean for t in group])),
            sdam_modules=float(np.std([t.absolute_mean for t in group])),
            sdam_channels=_mean([t.sdam for t in group]),
            sdam_heads=_mean([t.sdam_heads for t in group]),
        )
        for (role, parameter), group in groups.items()
    ]


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
