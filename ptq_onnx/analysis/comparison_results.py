"""What comparing files, and searching for what stays in float, return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_onnx.analysis.decibels import Decibels
from ptq_onnx.evaluation.metrics.metric import Score
from ptq_onnx.evaluation.outputs import OutputFigures


@dataclass(frozen=True)
class Closeness:
    """A quantized file in its runtime, against the float model, on the images of ``auto``.

    ``drop``: points of top-1, or of the metric (``score``), lost; None without labels or metric.
    ``sqnr_db``: of the output where it is lowest, which ``output`` names where there are several.
    ``agreement``: the percentage of images with the same top class; None where no output is
    [batch, classes].
    """

    drop: float | None
    sqnr_db: Decibels
    agreement: float | None
    output: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Decision:
    """One module that ``auto`` leaves in ``float``, or gives ``8 bits`` or ``16 bits``.

    ``tensors``: how many that changes. ``noise``: noise to signal at the logits that it is
    expected to take away, from the module quantized alone. ``cost``: million operations of one
    image, each counted by the bits that it gains over the 24 from 8 bits to float; for qnn million
    elements, by the bytes that they gain. ``without``: the file measured with all decisions but
    this one; None where the search was cut short.
    """

    step: int
    module: str
    role: str
    block: int | None
    decision: Literal["float", "8 bits", "16 bits"]
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
    in percent of the whole model's in float, for qnn in 16 bits. ``images``: measured on;
    ``held_apart``: calibration did not use them. ``drop_error``: one standard error of the drop, in
    points; None without labels.
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
    metric: str | None = None
    """What was measured instead of top-1."""
    float_score: float | None = None


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
    score: Score | None = None
    """By the metric that was asked for; the float model's stands beside it."""


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
