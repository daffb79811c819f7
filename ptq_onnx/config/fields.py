"""The options of a quantization run, each a field with all that is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_onnx.config.bits import BYTE, Bits
from ptq_onnx.config.flags import ANALYSIS, INPUT, NUMBERS, RUNNING, TARGET, option
from ptq_onnx.config.names import (
    ACTIVATION_NAMES,
    ARITHMETIC_NAMES,
    CPUS,
    DEVICE_NAMES,
    GELU_NAMES,
    MAX_DROP,
    METHOD_NAMES,
    METRIC_NAMES,
    MIN_SQNR,
    MINUTES,
    MIXED_BY_NAMES,
    MULTIPLIER_BITS,
    OPSETS,
    PRECISION_NAMES,
    QUANTIZER_NAMES,
    ROUNDING_NAMES,
    SHARES_FROM,
    TARGETS,
    VNNI,
)
from ptq_onnx.config.targets import ONNXRUNTIME, Target, named

SELECTORS = ("keep_float", "more_bits", "per_channel")
"""Options that name roles."""
SEVERAL = (*SELECTORS, "metric_option", "input")
"""Options of several words."""
ON_PIXELS = "it is for pixels on the scale 0 to 1, as in 0.485,0.456,0.406 or 0.229,0.224,0.225"


@dataclass(frozen=True)
class Fields:
    """Everything that decides the numbers of a quantized model; a field's text says what it is.

    Empty ``quantizer``, ``opset`` 0: the target's own. None: what the field's ``shown`` says.
    """

    # fmt: off
    quantizer: str = option(
        "", NUMBERS, "NAME",
        f"One of {', '.join(QUANTIZER_NAMES)}; the target integer takes fqvit by itself.",
        shown=ONNXRUNTIME.quantizer, choices=QUANTIZER_NAMES,
    )
    bits: str = option(
        "8/8/8", NUMBERS, "W/A/ATTN",
        "Of weights/activations/attention; 2 to 8, of the last two 2 to 16.",
    )
    precision: str = option(
        "int8", TARGET, "NAME",
        f"One of {', '.join(PRECISION_NAMES)}; fp8 is E4M3, for the target tensorrt.",
        choices=PRECISION_NAMES,
    )
    weights: int = option(
        8, NUMBERS, "N",
        "4: int4 weights of linears in blocks, for onnxruntime; activations stay in float.",
    )
    method: str | None = option(
        None, NUMBERS, "NAME", f"One of {', '.join(METHOD_NAMES)}.",
        shown="percentile for vanilla, robust for the others", choices=METHOD_NAMES,
    )
    activations: str = option(
        "static", NUMBERS, "NAME",
        "deploy for onnxruntime: static ranges by calibration; dynamic: one for each tensor, found"
        " at run time; dynamic-token: one for each token. Without static no images are needed.",
        choices=ACTIVATION_NAMES,
    )
    images: int = option(128, INPUT, "N", "Calibration images to use.", bounds=(1, 1_000_000))
    seed: int | None = option(
        None, INPUT, "N", "Draw the calibration images at random, by this seed.",
        shown="spread evenly over all", bounds=(0, 1_000_000),
    )
    batch: int = option(8, RUNNING, "N", "Images per batch.", bounds=(1, 4096))
    preprocess: str | None = option(
        None, INPUT, "NAME",
        "imagenet, inception (0.5 everywhere), none (pixels as they are, 0 to 255), or a folder"
        " with Hugging Face's preprocessor_config.json.",
        shown="the model's metadata, else such a file beside it, else by its first ops, else"
        " imagenet",
    )
    mean: tuple[float, ...] | None = option(
        None, INPUT, "R,G,B", "0 to 1, as in 0.485,0.456,0.406.",
        shown="that of the preprocessing", bounds=(-1, 1), hint=ON_PIXELS,
    )
    std: tuple[float, ...] | None = option(
        None, INPUT, "R,G,B", "As --mean.",
        shown="that of the preprocessing", bounds=(1e-6, 10), hint=ON_PIXELS,
    )
    size: tuple[int, int] | None = option(
        None, INPUT, "N|HxW", "Pixels of the input.",
        shown="the model's input, else 224", bounds=(1, 8192),
    )
    crop_pct: float | None = option(
        None, INPUT, "0..1", "Part of the resized picture that the crop keeps.",
        shown="the model's metadata, else 0.875", bounds=(0.1, 1),
    )
    interpolation: str | None = option(
        None, INPUT, "NAME", "bicubic, bilinear, nearest or lanczos.",
        shown="the model's metadata, else bicubic",
    )
    input: tuple[str, ...] = option(
        (), INPUT, "NAME=FILE|NUMBER",
        "What an input besides the images gets: an array .npz or .npy with an entry for each image,"
        " or one for all, or a number; repeatable.",
        shown="none; an .npz in place of images may hold all inputs by name",
    )
    check_preprocess: bool = option(
        True, INPUT, None,
        "Warn where the float model is more confident with another normalisation.",
    )
    keep_float: tuple[str, ...] = option(
        (), NUMBERS, "ROLE[@BLOCKS]", "Leave a role in float, as in fc2 or fc2@5,6; repeatable.",
        shown="none",
    )
    more_bits: tuple[str, ...] = option(
        (), NUMBERS, "ROLE[@BLOCKS][=BITS]",
        "8 bits for a role where --bits has fewer, as in fc2 or fc2@5,6; or as many as"
        " residual1=16 says, of activations; lowbit: just as many as fc2.weight@5=3 says, 2 to 8,"
        " the last that names a tensor counts; repeatable.",
        shown="none",
    )
    per_channel: tuple[str, ...] = option(
        (), NUMBERS, "ROLE[@BLOCKS]",
        "A scale per channel for a role, as in fc2@0-3; 'all'; or 'auto': fc2 of the blocks"
        " with the widest channel ranges; repeatable.",
        shown="what the quantizer does by itself",
    )
    auto: bool = option(
        False, NUMBERS, None,
        "Keep a few cheap ops in float, or at 8 bits, so that the loss stays in bounds: each of"
        " them is needed, though another set may be smaller. qnn: at 16 bits.",
    )
    max_drop: float | None = option(
        None, NUMBERS, "POINTS", "auto: points of top-1 that may be lost on the images of --val.",
        shown=f"{MAX_DROP} where --val has labels", bounds=(0, 100), unit="points",
    )
    min_sqnr: float | None = option(
        None, NUMBERS, "DB",
        "auto: SQNR that every output must reach, on --val or on images held out from calibration.",
        shown=f"{MIN_SQNR:g} without labels", bounds=(-1000, 1000), unit="dB",
    )
    ptf: bool = option(True, NUMBERS, None, "fqvit: power-of-two factors per channel.")
    ptf_k: int | None = option(
        None, NUMBERS, "K", "fqvit: largest exponent, 0 to 12.",
        shown="as large as the channels need", bounds=(0, 12),
    )
    lis: bool | None = option(
        None, NUMBERS, None,
        "fqvit: log2 codes for attention maps; without, uniform ones on [0, 1].",
        shown="on below 7 bits; from there on uniform ones of a row's shares of its largest value",
    )
    equalize: bool = option(
        True, NUMBERS, None,
        "deploy: move shifts and factors per channel between ops, equal in float.",
    )
    convolutions: bool | None = option(
        None, NUMBERS, None,
        "deploy for onnxruntime: convolutions, and what stands between them, on codes; where that"
        " saves time by default, where it costs 8 % of the time at most if given.",
        shown="where it saves time and the outputs bear it",
    )
    rotate: bool | None = option(
        None, NUMBERS, None,
        "Turn the residual stream by an orthogonal matrix that spreads massive channels, equal in"
        " float and free at run time, where one scale for a tensor is then expected to lose less.",
        shown="on with --quantize-residual, for qnn, fqvit, and lowbit below 8 bits of activations",
    )
    split_hidden: bool | None = option(
        None, NUMBERS, None,
        "Hold hidden channels far above the rest as sums of several, so that one scale serves them"
        " all, where one is expected to lose less then.",
        shown="on for fqvit, for qnn, and for lowbit below 8 bits of activations",
    )
    bias_correction: bool = option(
        True, NUMBERS, None,
        "deploy: correct biases for the mean error; round convolutions for what they read.",
    )
    rounding: str = option(
        "nearest", NUMBERS, "NAME",
        f"deploy: how weights of linears are rounded, one of {', '.join(ROUNDING_NAMES)}.",
        choices=ROUNDING_NAMES,
    )
    wide_ends: bool = option(
        True, NUMBERS, None,
        "lowbit: 8 bits for patch embedding and head. Without, their weights and the head's input"
        " have those of --bits, the image 8, as most published figures do.",
    )
    reconstruct: bool = option(
        False, NUMBERS, None,
        "lowbit: train each block to give what it gives in the float model; takes minutes. What a"
        " stopped run has trained, the next into the same folder takes up.",
    )
    minutes: float = option(
        MINUTES, NUMBERS, "N", "reconstruct: as long as that may take.",
        bounds=(0.01, 100_000), unit="minutes",
    )
    centre_values: bool = option(
        False, TARGET, None,
        "tensorrt: subtract the mean over the image from v and add it to A·V: more accurate, but an"
        " Add stands in the fused attention.",
    )
    quantize_residual: bool = option(
        False, TARGET, None,
        "tensorrt: Q/DQ on the skip input of residual adds, so that they fuse with the product.",
    )
    float16: bool = option(
        False, TARGET, None, "tensorrt: the float part of the file in 16 bits."
    )
    arithmetic: Literal["float", "integer"] = option(
        "float", TARGET, "NAME",
        "fqvit: float, or integer as --target integer computes, in the simulation.",
        choices=ARITHMETIC_NAMES,
    )
    multiplier_bits: int = option(
        MULTIPLIER_BITS, TARGET, "N", "Integer arithmetic: bits of its multipliers, 4 to 31.",
        bounds=(4, 31),
    )
    gelu: str = option(
        "table", TARGET, "NAME",
        f"Integer arithmetic: how GELU is computed, one of {', '.join(GELU_NAMES)}.",
        choices=GELU_NAMES,
    )
    target: str = option(
        "onnxruntime", TARGET, "NAME", f"What the file is for: {', '.join(TARGETS)}.",
        choices=TARGETS,
    )
    cpu: str = option(
        VNNI, TARGET, "NAME",
        "onnxruntime: the x86 CPUs that the file is for: those with VNNI, or older ones too, whose"
        " int8 kernels add up in 16 bits; weights then have scales with which none saturates.",
        choices=CPUS,
    )
    opset: int = option(
        0, TARGET, "N",
        f"ONNX opset, up to {OPSETS[-1]}; tensorrt and openvino take 20 by themselves.",
        shown=str(ONNXRUNTIME.opset),
    )
    mixed: bool | None = option(
        None, TARGET, None,
        "qnn: 16 bits for those activations that 8 hold worst, at most a third of all elements."
        " lowbit: bits for each module, by what they are expected to save at the output.",
        shown="on for qnn at --bits 8/8/8, and with --target-bits or --target-size",
    )
    target_bits: float | None = option(
        None, NUMBERS, "BITS",
        "lowbit: mix widths of 2 to 8 bits, so that weights, by parameters, and activations, by"
        " elements, have at most so many in the mean.",
        shown="--mixed: the mean of --bits", bounds=(2, 8), unit="bits",
    )
    target_size: float | None = option(
        None, NUMBERS, "MB",
        "lowbit: mix weights of 4 and 8 bits, so that the file has at most so many million bytes.",
        bounds=(0.001, 2000), unit="MB",
    )
    mixed_by: str = option(
        "output", NUMBERS, "NAME",
        "lowbit: what widths are mixed by: output, the noise of each module at the model's output;"
        " layer, that of what reads it, over its signal; nuclear, after Liu et al.",
        choices=MIXED_BY_NAMES,
    )
    batch_size: int = option(
        1, TARGET, "N", "qnn: images that the file takes at a time.", bounds=(1, 64)
    )
    metric: str | None = option(
        None, ANALYSIS, "NAME",
        f"What the model is measured by: {', '.join(METRIC_NAMES)}, or a function of your own as"
        " module:function.",
        shown="top-1 where there are labels",
    )
    metric_option: tuple[str, ...] = option(
        (), ANALYSIS, "KEY=VALUE",
        "An option of the metric, as output=logits or threshold=0.5; repeatable.", shown="none",
    )
    report: bool = option(True, ANALYSIS, None, "Analyse every op and write report.html.")
    sensitivity: bool = option(
        False, ANALYSIS, None,
        "Switch each module by itself to see what it costs; takes minutes; on for analyse.",
    )
    pictures: bool = option(True, ANALYSIS, None, "Draw attention maps into the report.")
    attention_blocks: tuple[int, ...] = option(
        (), ANALYSIS, "BLOCK", "Block whose attention is drawn; repeatable.",
        shown="the last", bounds=(0, 9999),
    )
    attention_heads: tuple[int, ...] = option(
        (), ANALYSIS, "HEAD", "Head to draw by itself; repeatable.",
        shown="all", bounds=(0, 9999),
    )
    analysis_images: int | None = option(
        None, ANALYSIS, "N", "Images for the analysis, held out from calibration.",
        shown="32, or 8 where only the file is measured", bounds=(1, 1_000_000),
    )
    threads: int = option(
        0, RUNNING, "N", "Threads to compute with; 0: the runtime decides.", bounds=(0, 256)
    )
    workers: int = option(
        1, RUNNING, "N",
        "Processes that calibrate and measure side by side; numbers stay.", bounds=(1, 256),
    )
    device: str = option(
        "auto", RUNNING, "NAME",
        "Where float runs calibrate and files are measured: auto measures on a GPU that works; cuda"
        " calibrates there too, or stops with the reason.",
        choices=DEVICE_NAMES,
    )
    # fmt: on

    @property
    def at_run_time(self) -> bool:
        """True where ranges of activations are found at run time."""
        return self.activations != "static"

    @property
    def weight_only(self) -> bool:
        """True where only weights have codes."""
        return self.weights < 8

    @property
    def runtime(self) -> Target:
        """What the target takes."""
        return named(self.target)

    @property
    def widths(self) -> Bits:
        """The bit widths, parsed."""
        return Bits.parse(self.bits)

    @property
    def code(self) -> Literal["uniform", "e4m3"]:
        """The code of what deploy quantizes."""
        return "e4m3" if self.precision == "fp8" else "uniform"

    @property
    def equalizes(self) -> bool:
        """True where the quantizer works on an equalised copy of the model."""
        return self.products_only and self.equalize

    @property
    def rounds_weights(self) -> bool:
        """True where weights are rounded by what they do to the output."""
        return self.rounding != "nearest" or self.quantizer == "lowbit"

    @property
    def products_only(self) -> bool:
        """True where nothing but what products read is quantized, in the form of the target."""
        return self.quantizer in ("deploy", "lowbit")

    @property
    def regions(self) -> bool:
        """True where convolutions, and what stands between them, are put on codes."""
        return (
            self.quantizer == "deploy"
            and self.convolutions is not False
            and self.runtime.codes_of_convolutions
            and not (self.weight_only or self.at_run_time)
            and self.code == "uniform"
            and self.widths.activations == BYTE
        )

    @property
    def few_bits(self) -> bool:
        """True for lowbit below 8 bits of activations."""
        return self.quantizer == "lowbit" and self.widths.activations < BYTE

    @property
    def rotates(self) -> bool:
        """True where residual streams are turned if that lowers the expected error."""
        unset = self.few_bits or self.quantizer == "fqvit" or self.runtime.all_codes
        unset = unset or (self.quantize_residual and self.precision != "fp8")
        return unset if self.rotate is None else self.rotate

    @property
    def log_maps(self) -> bool:
        """True where fqvit holds attention maps as powers of two."""
        return self.widths.attention < SHARES_FROM if self.lis is None else self.lis

    @property
    def splits_hidden(self) -> bool:
        """True where massive hidden channels are held in pieces if that is expected to pay."""
        unset = self.few_bits or self.quantizer == "fqvit" or self.runtime.all_codes
        return unset if self.split_hidden is None else self.split_hidden

    @property
    def mixes(self) -> bool:
        """True where some activations get 16 bits by what 8 would lose."""
        unset = self.runtime.all_codes and str(self.widths) == "8/8/8" and not self.auto
        return self.runtime.all_codes and (unset if self.mixed is None else self.mixed)

    @property
    def mixes_widths(self) -> bool:
        """True where lowbit chooses the bits of each module."""
        bound = self.target_bits is not None or self.target_size is not None
        return self.quantizer == "lowbit" and (bool(self.mixed) or bound)
