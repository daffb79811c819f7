"""What is summed of one tensor, batch by batch, and the figures that follow from the sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums
from ptq_onnx.analysis.tokens import Tokens
from ptq_onnx.analysis.variation_results import Outlier, TensorHistogram, TensorVariation
from ptq_onnx.calibration.statistics import ChannelStatistics
from ptq_onnx.numerics.around.around import ClipOf
from ptq_onnx.numerics.dot import dot
from ptq_onnx.numerics.fake_quantize import clipped, fake_quantize, reach
from ptq_onnx.numerics.spec import Site, TensorSpec

Array = NDArray[np.float32]
Double = NDArray[np.float64]

BINS = 64
"""Bins of the histograms in the report."""
OUTLIER = 10.0
"""A channel or token is named from this many times the median on."""
NAMED = 3
"""Channels named per tensor."""


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
class Histogram:
    """Two rows of counts over one range."""

    low: float
    high: float
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def add(self, row: int, values: Array) -> None:
        """Count values of any shape in one of the two rows; those beyond the ends count in the
        outer bins."""
        width = max(self.high - self.low, 1e-30)
        place = (values.ravel() - np.float32(self.low)) * np.float32(BINS / width)
        self.counts[row] += np.bincount(
            np.clip(place, 0, BINS - 1).astype(np.int64), minlength=BINS
        )

    def result(self) -> TensorHistogram:
        """The counts of both rows, with the ends of the bins."""
        one, two = (tuple(int(v) for v in row) for row in self.counts)
        return TensorHistogram(self.low, self.high, one, two)


@dataclass
class Rounding:
    """What rounding by a spec costs; sums over batches."""

    spec: TensorSpec
    sums: Sums = field(default_factory=Sums)
    clipped: int = 0
    clip_noise: float = 0.0

    def add(self, value: Array, rounded: Array) -> None:
        """Add a tensor and its rounded values, of the same shape."""
        self.sums.add(value, rounded)
        outside = clipped(value, self.spec)
        self.clipped += int(np.count_nonzero(outside))
        error = rounded[outside].astype(np.float64) - value[outside]
        self.clip_noise += dot(error, error)

    @property
    def of(self) -> ClipOf:
        """What the range of the codes is of."""
        return self.spec.rule.clip_of


class Seen:
    """Sums of one activation over all batches."""

    def __init__(self, site: Site, stats: ChannelStatistics, spec: TensorSpec | None) -> None:
        self.site, self.stats = site, stats
        self.low, self.high = float(stats.lowest[0].min()), float(stats.highest[0].max())
        self.histogram = Histogram(self.low, self.high)
        self.rounding = None if spec is None else Rounding(spec)
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
        self.powers += (flat.sum(), square.sum(), dot(square, flat), dot(square, square))
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
            **rounding_figures(rounding),
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


def rounding_figures(rounding: Rounding | None) -> dict[str, Any]:
    """What rounding costs a tensor: SNR, the share of clipped values, and of the noise that
    clipping makes. All None for a tensor without codes."""
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
