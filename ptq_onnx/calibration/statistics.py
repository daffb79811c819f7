"""Streams calibration images through ONNX Runtime and folds every batch into statistics.

The fused float model is tapped: reductions are added to the graph, so that only per-image
channel extremes and second moments leave ONNX Runtime; raw tensors leave it only for the
methods that need histograms or samples. Memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.finite import not_finite
from ptq_onnx.calibration.histogram import BINS, Histogram
from ptq_onnx.calibration.moving_average import moving_average
from ptq_onnx.calibration.range_growth import RangeTrace
from ptq_onnx.calibration.tapped_runs import (
    add_outputs,
    copies_in,
    open_taps,
    taken_in_order,
)
from ptq_onnx.graph.formula import new_constant
from ptq_onnx.numerics.spec import Site
from ptq_onnx.preparation import model_files as graphs

__all__ = [
    "BINS",
    "TOP",
    "ChannelStatistics",
    "Histogram",
    "Statistics",
    "add_histograms",
    "collect",
    "copies_in",
    "open_taps",
    "reduced_shape",
    "tap",
]

Array = NDArray[np.float32]
TOP = 16
"""How many of the largest per-image extremes are kept per channel, for the tail estimate."""


@dataclass
class ChannelStatistics:
    """Running statistics of one activation, per channel (C rows; 1 for a whole tensor).

    ``shape``: how the rows broadcast against the tensor without its batch axis.
    ``highest`` [TOP, C]: the largest per-image maxima, descending; ``lowest``: the smallest
    per-image minima, ascending. ``ema_low``, ``ema_high`` [C]: moving averages of the
    extremes of single images, in their order (``MOMENTUM``). ``power`` and ``total`` [C]: sum of
    squares and sum over ``count`` values per channel. ``trace``: how the range of the whole
    tensor grew. ``origin`` [C]: what zero has become, where the tensor was shifted.
    """

    shape: tuple[int, ...]
    highest: Array
    lowest: Array
    ema_low: Array
    ema_high: Array
    power: NDArray[np.float64]
    total: NDArray[np.float64]
    count: int = 0
    images: int = 0
    trace: RangeTrace = field(default_factory=RangeTrace)
    origin: NDArray[np.float64] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> ChannelStatistics:
        """No image seen yet; ``shape`` broadcasts against the tensor without batch axis."""
        size = int(np.prod(shape))
        return cls(
            shape=shape,
            highest=np.full((TOP, size), -np.inf, np.float32),
            lowest=np.full((TOP, size), np.inf, np.float32),
            ema_low=np.zeros(size, np.float32),
            ema_high=np.zeros(size, np.float32),
            power=np.zeros(size, np.float64),
            total=np.zeros(size, np.float64),
        )

    def update(self, low: Array, high: Array, power: Array, total: Array, values: int) -> None:
        """Fold in one batch: ``low``, ``high`` [B, C], ``power``, ``total`` [C], values per
        channel."""
        for lowest, highest in zip(low.min(axis=1), high.max(axis=1), strict=True):
            self.images += 1
            self.trace.add(self.images, float(lowest), float(highest))
        joined = np.concatenate([self.highest, high])
        self.highest = -np.sort(-joined, axis=0)[:TOP]
        joined = np.concatenate([self.lowest, low])
        self.lowest = np.sort(joined, axis=0)[:TOP]
        seen = self.images - len(low)
        self.ema_low = moving_average(self.ema_low, low, seen)
        self.ema_high = moving_average(self.ema_high, high, seen)
        self.power += power.astype(np.float64)
        self.total += total.astype(np.float64)
        self.count += values

    def take(self, index: NDArray[np.int64]) -> ChannelStatistics:
        """The statistics of a tensor whose last axis is these channels of this one's."""
        return replace(
            self,
            shape=(*self.shape[:-1], len(index)),
            highest=self.highest[:, index],
            lowest=self.lowest[:, index],
            ema_low=self.ema_low[index],
            ema_high=self.ema_high[index],
            power=self.power[index],
            total=self.total[index],
            origin=None if self.origin is None else self.origin[index],
        )

    def pooled(self) -> ChannelStatistics:
        """The statistics of the whole tensor: one row.

        Per-image extremes of the tensor are those of its most extreme channel. The kept ones
        are exact where they come from different images, a bound from inside where not.
        """
        return ChannelStatistics(
            shape=(1,) * len(self.shape),
            highest=self.highest.max(axis=1, keepdims=True),
            lowest=self.lowest.min(axis=1, keepdims=True),
            ema_low=self.ema_low.min(keepdims=True),
            ema_high=self.ema_high.max(keepdims=True),
            power=self.power.sum(keepdims=True),
            total=self.total.sum(keepdims=True),
            count=self.count * len(self.power),
            images=self.images,
            trace=self.trace,
        )

    @property
    def second_moment(self) -> NDArray[np.float64]:
        """E[x²] per channel, [C]."""
        return self.power / max(self.count, 1)

    @property
    def mean(self) -> NDArray[np.float64]:
        """E[x] per channel, [C]."""
        return self.total / max(self.count, 1)

    @property
    def record_ratio(self) -> NDArray[np.float64]:
        """Largest per-image extreme over the second largest, of the worse side, [C]; at least 1."""
        ratio = np.ones(self.power.size)
        for top in (self.highest[:2], -self.lowest[:2]):
            first, second = top.astype(np.float64)
            usable = (second > 0) & np.isfinite(second)
            ratio = np.maximum(ratio, np.where(usable, first / np.where(usable, second, 1), 1))
        return ratio

    @property
    def variance(self) -> NDArray[np.float64]:
        """E[x²] - E[x]² per channel, [C]."""
        return np.maximum(self.second_moment - self.mean**2, 0)

    def moved(self, shift: NDArray[np.float64], factor: NDArray[np.float64]) -> ChannelStatistics:
        """The statistics of (x - shift) / factor, [C] each, factor positive."""

        def move(rows: Array) -> Array:
            return np.asarray((rows.astype(np.float64) - shift) / factor, np.float32)

        total = (self.total - self.count * shift) / factor
        power = (self.power - 2 * shift * self.total + self.count * shift**2) / factor**2
        return replace(
            self,
            highest=move(self.highest),
            lowest=move(self.lowest),
            ema_low=move(self.ema_low),
            ema_high=move(self.ema_high),
            power=np.maximum(power, 0),
            total=total,
            origin=((0 if self.origin is None else self.origin) - shift) / factor,
        )


@dataclass
class Statistics:
    """Statistics of all sites by tensor name; histograms of those whose method needs one."""

    channels: dict[str, ChannelStatistics] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    images: int = 0


def reduced_shape(site: Site) -> tuple[int, ...]:
    """The shape of per-channel values, without the batch axis: 1 on every shared axis."""
    return tuple(
        int(size) if axis in site.channel_axes else 1
        for axis, size in enumerate(site.shape)
        if axis > 0
    )


def _is_dynamic(site: Site) -> bool:
    """True where another axis than the first has no fixed size."""
    return not all(isinstance(d, int) for d in site.shape[1:])


def tap(model: ir.Model, sites: Sequence[Site]) -> tuple[ir.Model, dict[str, tuple[str, ...]]]:
    """A copy of the model with four reductions per site as extra outputs.

    Returns the names of (minimum [B, C…], maximum [B, C…], sum of squares [C…], sum [C…]) by
    tensor. Squares are a Mul of their own: ONNX Runtime's ReduceSumSquare takes 14 ns a value
    over the tokens of [B, T, C], Mul and ReduceSum 0.3 ns (measured, 1.31, one thread).
    """
    copy = graphs.to_standard(model)
    graph = copy.graph
    values = {v.name: v for node in graph for v in node.outputs}
    values.update({v.name: v for v in graph.inputs})
    names: dict[str, tuple[str, ...]] = {}
    constants: dict[tuple[int, ...], ir.Value] = {}
    for site in sites:
        value = values[site.tensor]
        rank = len(site.shape)
        shared = [a for a in range(1, rank) if a not in site.channel_axes]
        outputs = []
        square = ir.node("Mul", [value, value], num_outputs=1)
        square.outputs[0].name = f"tap/Mul/{site.tensor}"
        square.outputs[0].dtype = ir.DataType.FLOAT
        graph.append(square)
        taps = (
            ("Min", "ReduceMin", value, shared),
            ("Max", "ReduceMax", value, shared),
            ("SumSquare", "ReduceSum", square.outputs[0], [0, *shared]),
            ("Sum", "ReduceSum", value, [0, *shared]),
        )
        for kind, op, data, axes in taps:
            name = f"tap/{kind}/{site.tensor}"
            if not axes:
                node = ir.node("Identity", [data], num_outputs=1)
            else:
                along = tuple(axes)
                if along not in constants:
                    array = np.array(along, np.int64)
                    constants[along] = new_constant(graph, "tap/axes", array)
                node = ir.node(op, [data, constants[along]], {"keepdims": 0}, num_outputs=1)
            node.outputs[0].name = name
            node.outputs[0].dtype = ir.DataType.FLOAT
            graph.append(node)
            graph.outputs.append(node.outputs[0])
            outputs.append(name)
        names[site.tensor] = tuple(outputs)
        if _is_dynamic(site):
            size = ir.node("Size", [value], num_outputs=1)
            size.outputs[0].name = f"tap/Size/{site.tensor}"
            size.outputs[0].dtype = ir.DataType.INT64
            graph.append(size)
            graph.outputs.append(size.outputs[0])
    return copy, names


def collect(
    model: ir.Model,
    sites: Sequence[Site],
    batches: Iterable[Array],
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> Statistics:
    """Run all batches ([B, C, H, W]) and gather :class:`ChannelStatistics` of the sites.

    ``workers``: processes that run the model; the numbers are the same, bit by bit. Raises
    ModelError where an activation is NaN or infinite (it names the tensor).
    """
    if not sites:
        return Statistics()
    tapped, names = tap(model, sites)
    wanted = [name for group in names.values() for name in group]
    wanted += [f"tap/Size/{site.tensor}" for site in sites if _is_dynamic(site)]
    result = Statistics({s.tensor: ChannelStatistics.empty(reduced_shape(s)) for s in sites})
    copies = copies_in(batches)
    take = partial(parts_of, tuple(sites), names, copies)
    for batch, parts in taken_in_order(
        tapped, wanted, batches, take, threads=threads, workers=workers
    ):
        for site in sites:
            result.channels[site.tensor].update(*parts[site.tensor])
        result.images += len(batch) // copies
        if progress is not None:
            progress(len(batch) // copies)
    return result


Part = tuple[Array, Array, Array, Array, int]
"""What a batch adds to a tensor's statistics, as :meth:`ChannelStatistics.update` takes it: folded
in the order of the images they give the same bytes, whoever made them."""


def parts_of(
    sites: Sequence[Site],
    names: Mapping[str, tuple[str, ...]],
    copies: int,
    batch: Array,
    found: Mapping[str, Any],
) -> dict[str, Part]:
    """The parts of all sites, by tensor, from the taps of one batch. Raises ModelError."""
    size, parts = len(batch) // copies, {}
    for site in sites:
        low, high, power, total = (found[name] for name in names[site.tensor])
        # ONNX Runtime's ReduceMin and ReduceMax over inner axes pass NaN by; the sum does not.
        finite = np.isfinite(low).all() and np.isfinite(high).all()
        if not finite or np.isnan(power).any():
            raise not_finite(f"'{site.tensor}' ({site.label})")
        values = len(low) * site.elements
        if _is_dynamic(site):
            values = int(found[f"tap/Size/{site.tensor}"])
        parts[site.tensor] = (
            _by_image(low, size, np.min),
            _by_image(high, size, np.max),
            power.ravel() / copies,
            total.ravel() / copies,
            values // power.size // copies,
        )
    return parts


def _by_image(rows: Array, images: int, extreme: Callable[..., Array]) -> Array:
    """Extremes [B, C] from those of the first axis, which may hold several rows an image
    (windows), or none of its own (one row for the whole batch)."""
    rows = rows.reshape(len(rows), -1)
    if len(rows) == images:
        return rows
    if len(rows) % images:
        return extreme(rows, axis=0, keepdims=True)
    return extreme(rows.reshape(images, -1, rows.shape[-1]), axis=1)


def add_histograms(
    model: ir.Model,
    statistics: Statistics,
    sites: Sequence[Site],
    per_channel: Collection[str],
    batches: Iterable[Array],
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> None:
    """A second run over the batches that counts histograms of the sites' raw values.

    ``per_channel`` names the tensors with one histogram per channel; others get one in all.
    The ranges are those that :func:`collect` found on the same images. ``workers``: as there.
    """
    for site in sites:
        stats = statistics.channels[site.tensor]
        rows = stats if site.tensor in per_channel else stats.pooled()
        statistics.histograms[site.tensor] = Histogram.over(rows.lowest[0], rows.highest[0])
    copy = graphs.to_standard(model)
    wanted = add_outputs(copy, [s.tensor for s in sites])
    held = {s.tensor: statistics.histograms[s.tensor] for s in sites}
    take = partial(_counted, tuple(sites), held, workers > 1)
    for batch, apart in taken_in_order(
        copy, wanted, batches, take, threads=threads, workers=workers
    ):
        for tensor, histogram in apart.items():
            held[tensor].join(histogram)
        if progress is not None:
            progress(len(batch) // copies_in(batches))


def _counted(
    sites: Sequence[Site],
    held: Mapping[str, Histogram],
    apart: bool,
    _: Array,
    found: dict[str, Any],
) -> dict[str, Histogram]:
    """Count one batch in the histograms held, or ``apart`` in new ones, which are returned."""
    counted = {n: h.emptied() for n, h in held.items()} if apart else {}
    for site in sites:
        histogram = counted.get(site.tensor, held[site.tensor])
        histogram.add(_rows(found[site.tensor], site, len(histogram.low)))
    return counted


def _rows(value: Array, site: Site, rows: int) -> Array:
    """The tensor as [rows, n]: channels first where there is a row for each."""
    if rows == 1:
        return value.reshape(1, -1)
    others = [a for a in range(value.ndim) if a not in site.channel_axes]
    return value.transpose(*site.channel_axes, *others).reshape(rows, -1)
