"""What the analysis of variation returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_onnx.analysis.decibels import Decibels
from ptq_onnx.numerics.around.around import ClipOf


@dataclass(frozen=True)
class TensorHistogram:
    """Counts of the float and of the quantized values in equal bins over [low, high]."""

    low: float
    high: float
    float_counts: tuple[int, ...]
    quantized_counts: tuple[int, ...]


@dataclass(frozen=True)
class TensorVariation:
    """How much one tensor varies, and what its own rounding costs it.

    ``sdam``: standard deviation over the channels of the mean of |x| (VVTQ's SDAM; of a weight
    over its output channels), ``sdam_heads`` over the heads, each None where there are none.
    ``kurtosis``: of all values; 3 for a normal distribution. ``channel_ratio``: the largest
    channel's extreme over the median channel's. Where the tensor is quantized: ``clip``, the
    values of its smallest and largest code, in the channel with the widest range; ``clip_of``:
    what that range is of: the values, or what is left of them when the mean over the tokens is
    taken out (``centred``), or when each row is divided by its largest value (``row``);
    ``clipped``: the share of values outside, counted there; ``snr``, ``snr_db``: of the float
    values rounded as the file rounds them, nothing else being quantized; ``clip_noise``: the
    share of that error that comes from clipped values.
    """

    tensor: str
    role: str
    block: int | None
    parameter: bool
    low: float
    high: float
    absolute_mean: float
    sdam: float | None
    sdam_heads: float | None
    kurtosis: float
    channels: int
    channel_ratio: float | None
    clip: tuple[float, float] | None
    clipped: float | None
    snr_db: Decibels | None
    clip_noise: float | None
    histogram: TensorHistogram
    clip_of: ClipOf | None = None
    snr: float | None = None


@dataclass(frozen=True)
class ChannelRanges:
    """Smallest and largest value of every channel of a LayerNorm's input, over all images.

    ``box``: minimum, quartiles and maximum, over the channels, of the channels' largest |x|.
    """

    tensor: str
    role: str
    block: int | None
    reader: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    box: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Outlier:
    """A channel, or a token, whose extreme stands out.

    ``kind`` ``channel``: ``ratio`` is to the median channel's extreme. ``token``: to the median
    token's extreme in the same image. ``token`` None: the tensor has no tokens.
    """

    kind: Literal["channel", "token"]
    tensor: str
    role: str
    block: int | None
    channel: int
    token: int | None
    value: float
    ratio: float


@dataclass(frozen=True)
class KindVariation:
    """Over the blocks: mean and standard deviation (SDAM over modules) of the mean |x| of one
    role's tensors, and the mean of their SDAM over channels and over heads."""

    role: str
    parameter: bool
    tensors: int
    absolute_mean: float
    sdam_modules: float
    sdam_channels: float | None
    sdam_heads: float | None


@dataclass(frozen=True)
class Variation:
    """What varies in the float model, and where it hurts; ``images`` of the activations."""

    images: int
    tensors: tuple[TensorVariation, ...]
    kinds: tuple[KindVariation, ...]
    norm_inputs: tuple[ChannelRanges, ...]
    outliers: tuple[Outlier, ...]
