"""What the analyses return: plain values that reports draw and JSON holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ptq_onnx.analysis.attention_results import AttentionAnalysis
from ptq_onnx.analysis.decibels import Decibels, plain
from ptq_onnx.analysis.variation_results import Variation


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
    ``tensors``: how many of those are switched; ``images``: how many it was measured on.
    ``features_snr``, ``features_db``: those of the last norm's output, all tokens; the ratio is
    None for a model without one. ``gain_db``, ``features_gain_db`` (leave-one-out): what logits and
    features gain in dB over the model with everything quantized; None in layerwise results, and
    where the gain is infinite: nothing is left of the error. The logits of one class token are few
    numbers: where quantization has destroyed them, only the features still tell the modules
    apart.
    """

    module: str
    scope: Scope
    role: str | None
    block: int | None
    part: Part
    tensors: int
    images: int
    error: Error
    features_db: Decibels | None = None
    gain_db: float | None = None
    features_gain_db: float | None = None
    features_snr: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Layerwise and leave-one-out analysis, both measured at the logits.

    Every module is measured on ``few_images``, spread evenly over all, and those that cost most on
    all ``images``; a gain is that over the baseline of the same images.
    ``baseline``: everything quantized, on all images. ``layerwise``: one module quantized, the
    rest float. ``leave_one_out``: everything quantized but what ``--keep-float`` would leave in
    float for the module (part ``all``; the partner of an attention product with it), or its
    weights or activations alone. The other tensors keep the numbers of this run; ``--keep-float``
    equalises and calibrates anew.
    """

    images: int
    few_images: int
    held_apart: bool
    baseline: Error
    baseline_features_db: Decibels | None
    layerwise: tuple[Switched, ...]
    leave_one_out: tuple[Switched, ...]
    seconds: float
    baseline_features_snr: float | None = None


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
