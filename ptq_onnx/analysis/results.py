"""What the analyses return: plain values that reports draw and JSON holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.evaluation.outputs import OutputFigures
from ptq_onnx.numerics.around.around import ClipOf
from ptq_onnx.numerics.codes.by_name import CodeName

Decibels = Annotated[
    float, "dB, higher is better; null where there is no error at all: the ratio beside it is 0"
]
"""-10 log10 of a noise-to-signal ratio; infinite without noise, which JSON holds as null."""


def decibels(snr: float) -> float:
    """-10 log10 of a noise-to-signal ratio; infinite where there is no noise at all."""
    return math.inf if snr <= 0 else -10 * math.log10(snr)


def difference(one: float, other: float) -> float:
    """``one`` less ``other``, in dB; 0 where both are without error."""
    return 0.0 if one == other else one - other


def plain(value: Any) -> Any:
    """The value as JSON holds it: lists for tuples, null for infinite numbers and NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class OpError:
    """The error at the output of one op when the whole graph is quantized.

    ``snr`` is noise to signal, Σ(q - f)² / Σf² over all images: lower is better. ``snr_db``
    is -10 log10 of it: higher is better. ``quantized``: the op's output is rounded to codes.
    ``tensor`` is that output. ``class_snr``, ``class_db`` and ``patch_snr``, ``patch_db``: the
    same for the class token and for the patches alone; ratios are None where the tensor has no
    tokens. Every ``db`` is None without any error: its ratio is 0.
    """

    node: str
    op_type: str
    role: str
    block: int | None
    snr: float
    snr_db: Decibels
    mse: float
    cosine: float
    max_abs: float
    quantized: bool
    tensor: str = ""
    class_db: Decibels | None = None
    patch_db: Decibels | None = None
    class_snr: float | None = None
    patch_snr: float | None = None


@dataclass(frozen=True)
class Error:
    """The error of the outputs: as in :class:`OpError`; ``agreement``: the percentage of images
    with the same top class, None where no output is [batch, classes].

    Of several outputs each is divided by its root mean square in the float model first, so that
    all count alike: ``snr`` then is the mean of theirs.
    """

    snr: float
    snr_db: Decibels
    mse: float
    cosine: float
    max_abs: float
    agreement: float | None


@dataclass(frozen=True)
class OutputError:
    """The error of one output of the model."""

    name: str
    error: Error


@dataclass(frozen=True)
class BlockError:
    """The error at the output of one transformer block (its second residual add)."""

    block: int
    snr: float
    snr_db: Decibels


@dataclass(frozen=True)
class Graphwise:
    """Errors of all compute ops, in graph order, with every op quantized.

    ``held_apart``: the images were not used in calibration. ``logits``: of the first output
    [batch, classes], where none is of the first; ``outputs``: of each that holds floats.
    """

    images: int
    held_apart: bool
    ops: tuple[OpError, ...]
    blocks: tuple[BlockError, ...]
    logits: Error | None = None
    outputs: tuple[OutputError, ...] = ()


Scope = Literal["op", "kind", "block", "model"]
Part = Literal["all", "activations", "weights"]


@dataclass(frozen=True)
class Switched:
    """The error of the logits with one module quantized alone, or with all but one.

    ``module`` names it: ``blocks.5.fc2`` (scope ``op``), ``fc2`` (``kind``: all of them),
    ``blocks.5`` (``block``) or ``model``; ``part``: its activations, its weights, or both;
    ``tensors``: how many of those are switched. ``features_snr``, ``features_db``: those of the
    last norm's output, all tokens; the ratio is None for a model without one. ``gain_db``,
    ``features_gain_db`` (leave-one-out): what logits and features gain in dB over the model with
    everything quantized; None in layerwise results, and where the gain is infinite: nothing is
    left of the error. The logits of one class token are few numbers: where quantization has
    destroyed them, only the features still tell the modules apart.
    """

    module: str
    scope: Scope
    role: str | None
    block: int | None
    part: Part
    tensors: int
    error: Error
    features_db: Decibels | None = None
    gain_db: float | None = None
    features_gain_db: float | None = None
    features_snr: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Layerwise and leave-one-out analysis, both measured at the logits.

    ``baseline``: everything quantized. ``layerwise``: one module quantized, the rest float.
    ``leave_one_out``: everything quantized but what ``--keep-float`` would leave in float for the
    module (part ``all``; the partner of an attention product with it), or its weights or
    activations alone. The other tensors keep the numbers of this run; ``--keep-float`` equalises
    and calibrates anew.
    """

    images: int
    held_apart: bool
    baseline: Error
    baseline_features_db: Decibels | None
    layerwise: tuple[Switched, ...]
    leave_one_out: tuple[Switched, ...]
    seconds: float
    baseline_features_snr: float | None = None


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one block on one image, by model: float, vanilla, the chosen quantizer.

    ``maps``: label → [heads, rows, columns] weights on the patches, of the class token, or
    averaged over the queries where there is none (``query`` says which). ``snr_db`` is that
    of the whole attention tensor against float; None for float itself. ``image`` is uint8
    [H, W, 3].
    """

    block: int
    image: NDArray[np.uint8]
    image_name: str
    query: str
    maps: dict[str, NDArray[np.float32]]
    snr_db: dict[str, float | None]


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


@dataclass(frozen=True)
class AttentionCode:
    """One way to hold attention maps: ``uniform`` levels on [0, 1], ``log2`` codes (LIS) or 8-bit
    floats; ``row``: every row divided by its largest value before.

    Measured on float maps, rounded: ``snr``, ``snr_db``; ``rank``, the mean Spearman correlation
    of rows before and after (ties share their rank); ``discordant``, the share of pairs in a row
    whose order is lost or turned (a ranking loss); ``row_sum``, smallest, mean and largest sum
    of a row, one before; ``zero``, the share of values that become zero.
    """

    code: CodeName
    bits: int
    snr_db: Decibels
    rank: float
    discordant: float
    row_sum: tuple[float, float, float]
    zero: float
    snr: float = 0.0
    row: bool = False


@dataclass(frozen=True)
class BlockAttention:
    """Attention maps of one block over all images looked at.

    ``counts``: values per bin of log2 A, from 2^``lowest`` up to 1, one bin per half octave,
    those below in the first. ``codes``: what rounding does to float maps, in 8 and 4 bits and in
    the model's own; ``own``: what the codes of the quantized model do, None where it has none.
    ``snr``, ``snr_db``, ``rank``, ``discordant``: the maps of the quantized model against those of
    the float one.
    """

    block: int
    heads: int
    lowest: int
    counts: tuple[int, ...]
    codes: tuple[AttentionCode, ...]
    snr_db: Decibels
    rank: float
    discordant: float
    snr: float = 0.0
    own: AttentionCode | None = None


@dataclass(frozen=True)
class Rollout:
    """Attention rollout to the patches, [rows, columns], of one image: float and quantized,
    with the correlation (Pearson) of the two maps."""

    image_name: str
    float_map: tuple[tuple[float, ...], ...]
    quantized_map: tuple[tuple[float, ...], ...]
    correlation: float


@dataclass(frozen=True)
class AttentionAnalysis:
    """Attention of all blocks on ``images`` images."""

    images: int
    blocks: tuple[BlockAttention, ...]
    rollout: Rollout | None


@dataclass(frozen=True)
class Analysis:
    """All that was measured; parts that were not asked for are None.

    ``advice``: what to do about it, in words, the most urgent first.
    """

    graphwise: Graphwise
    sensitivity: Sensitivity | None
    variation: Variation | None
    attention: AttentionAnalysis | None
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys of graphwise stand at the top, as in report.json, which knows no
        infinite dB: they are null."""
        parts = {
            name: None if (part := getattr(self, name)) is None else asdict(part)
            for name in ("sensitivity", "variation", "attention")
        }
        found: dict[str, Any] = plain(
            {**asdict(self.graphwise), **parts, "advice": list(self.advice)}
        )
        return found


@dataclass(frozen=True)
class Closeness:
    """A quantized file in its runtime, against the float model, on the images of ``auto``.

    ``drop``: points of top-1 lost; None without labels. ``sqnr_db``: of the output where it is
    lowest, which ``output`` names where there are several. ``agreement``: the percentage of images
    with the same top class; None where no output is [batch, classes].
    """

    drop: float | None
    sqnr_db: Decibels
    agreement: float | None
    output: str | None = None


@dataclass(frozen=True)
class Decision:
    """One module that ``auto`` leaves in ``float``, or gives ``8 bits``.

    ``tensors``: how many that changes. ``noise``: noise to signal at the logits that it is
    expected to take away, from the module quantized alone. ``cost``: million operations of one
    image, each counted by the bits that it gains over the 24 from 8 bits to float. ``without``:
    the file measured with all decisions but this one; None where the search was cut short.
    """

    step: int
    module: str
    role: str
    block: int | None
    decision: Literal["float", "8 bits"]
    tensors: int
    noise: float
    cost: float
    without: Closeness | None


@dataclass(frozen=True)
class Automatic:
    """What ``auto`` decided, and on what grounds.

    ``bound``: which option it is, of value ``limit``. ``before``: the file without a decision;
    ``after``: with all. ``met``: within the bound. ``minimal``: no single decision can be undone,
    or made cheaper, within it. ``trials``: files measured. ``cost``: of all decisions together,
    in percent of the whole model's in float. ``images``: measured on; ``held_apart``: calibration
    did not use them. ``drop_error``: one standard error of the drop, in points; None without
    labels.
    """

    bound: Literal["max_drop", "min_sqnr"]
    limit: float
    images: int
    held_apart: bool
    float_top1: float | None
    before: Closeness
    after: Closeness
    met: bool
    minimal: bool
    decisions: tuple[Decision, ...]
    keep_float: tuple[str, ...]
    more_bits: tuple[str, ...]
    cost: float
    drop_error: float | None
    trials: int
    seconds: float


@dataclass(frozen=True)
class BlockMatch:
    """One transformer block in a quantized file: its output tensor, how it was found (by
    ``name``, or by ``position``: shape, order and likeness), and its SNR against float.

    All None where nothing in the file is like it; ``snr_db`` also where there is no error, and
    ``snr`` 0.
    """

    block: int
    tensor: str | None
    how: Literal["name", "position"] | None
    snr_db: Decibels | None
    snr: float | None = None


@dataclass(frozen=True)
class Contender:
    """One file of a comparison. ``bytes`` counts the weights it keeps in other files too.
    ``quantized_ops``: QuantizeLinear, DequantizeLinear and integer ops, counted. ``ms_per_image``:
    median, one image at a time. ``sqnr_db``: of the worst output; ``outputs``: each by itself."""

    name: str
    file: str
    bytes: int
    quantized_ops: dict[str, int]
    top1: float | None
    top5: float | None
    sqnr_db: float | None
    agreement: float | None
    ms_per_image: float
    blocks: tuple[BlockMatch, ...]
    outputs: tuple[OutputFigures, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Several quantized files of one float model, the float model first in ``contenders``.

    ``images`` for accuracy, SQNR and agreement; ``block_images`` for the SNR of the blocks.
    """

    reference: str
    images: int
    block_images: int
    contenders: tuple[Contender, ...]
    notes: tuple[str, ...] = ()
    """The preprocessing in force, and what was made with another one."""
