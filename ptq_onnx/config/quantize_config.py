"""All options of a quantization run, as frozen dataclasses that YAML can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ptq_onnx.config.bits import Bits
from ptq_onnx.config.names import (
    GELU_NAMES,
    INTEGER,
    METHOD_NAMES,
    PRECISION_NAMES,
    QUANTIZER_NAMES,
    ROUNDING_NAMES,
    TARGETS,
    WEIGHTS,
)
from ptq_onnx.config.option_file import read_yaml
from ptq_onnx.config.option_types import check_options, shown
from ptq_onnx.config.selector import AUTO, Selector
from ptq_onnx.config.targets import TARGETS as BY_NAME
from ptq_onnx.config.targets import Target
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.preprocess import PREPROCESS_NAMES


@dataclass(frozen=True)
class QuantizeConfig:
    """Everything that decides the numbers of a quantized model.

    ``quantizer`` empty and ``opset`` 0: the target's own. ``method`` None: percentile for
    vanilla, robust for the others. ``ptf_k`` None: as large as the channels need.
    ``per_channel`` holds selectors, ``all``, or ``auto`` (fc2 of the blocks with the widest
    channel ranges). ``multiplier_bits``: of the fixed-point multipliers in integer arithmetic;
    ``gelu``: how that computes GELU.
    ``rounding``: of deploy's weights. ``weights`` 4: those of linears in blocks of 4-bit codes,
    nothing else. ``attention_blocks`` are drawn; none: the last; of them
    ``attention_heads``; none: all. ``mean`` … ``interpolation`` None: those of ``preprocess``,
    which None means: the model's own, else imagenet. The target ``integer`` makes
    ``arithmetic`` integer too. ``more_bits``: selectors of what gets 8 bits whatever ``bits`` say.
    ``auto`` adds to it and to ``keep_float`` what brings the loss of top-1 down to ``max_drop``
    points, or the SQNR of the logits up to ``min_sqnr`` dB.
    """

    quantizer: str = ""
    bits: str = "8/8/8"
    precision: str = "int8"
    weights: int = 8
    method: str | None = None
    images: int = 128
    batch: int = 8
    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    check_preprocess: bool = True
    keep_float: tuple[str, ...] = ()
    more_bits: tuple[str, ...] = ()
    per_channel: tuple[str, ...] = ()
    auto: bool = False
    max_drop: float | None = None
    min_sqnr: float | None = None
    ptf: bool = True
    ptf_k: int | None = None
    lis: bool = True
    equalize: bool = True
    bias_correction: bool = True
    rounding: str = "nearest"
    centre_values: bool = False
    quantize_residual: bool = False
    float16: bool = False
    arithmetic: Literal["float", "integer"] = "float"
    multiplier_bits: int = 31
    gelu: str = "table"
    target: str = "onnxruntime"
    opset: int = 0
    report: bool = True
    sensitivity: bool = False
    pictures: bool = True
    attention_blocks: tuple[int, ...] = ()
    attention_heads: tuple[int, ...] = ()
    analysis_images: int = 32
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError, one line, for values that make no sense alone or together."""
        selectors = ("keep_float", "more_bits", "per_channel")
        lists = ("mean", "std", "size", *selectors, "attention_blocks", "attention_heads")
        for name in lists:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in selectors:
            value = getattr(self, name)
            if isinstance(value, str):  # one selector, not one per letter
                object.__setattr__(self, name, (value,))
        check_options(self)
        if self.method is not None:
            _choice("method", self.method, METHOD_NAMES)
        _choice("target", self.target, TARGETS)
        _choice("rounding", self.rounding, ROUNDING_NAMES)
        _choice("precision", self.precision, PRECISION_NAMES)
        _choice("gelu", self.gelu, GELU_NAMES)
        if self.weights not in WEIGHTS or isinstance(self.weights, bool):
            raise ConfigError(f"--weights {self.weights!r}: must be 8, or 4 for weights alone.")
        if not self.quantizer:
            weights = "deploy" if self.weight_only else self.runtime.quantizer
            object.__setattr__(self, "quantizer", weights)
        if self.opset == 0:
            object.__setattr__(self, "opset", self.runtime.opset)
        _choice("quantizer", self.quantizer, QUANTIZER_NAMES)
        _choice("arithmetic", self.arithmetic, ("float", "integer"))
        if self.preprocess is not None and not os.path.exists(self.preprocess):
            files = "a folder with a preprocessor_config.json, or such a file"
            _choice("preprocess", self.preprocess, (*PREPROCESS_NAMES, files))
        Bits.parse(self.bits)
        _at_least("images", self.images, 1)
        _at_least("batch", self.batch, 1)
        _at_least("analysis_images", self.analysis_images, 1)
        _at_least("threads", self.threads, 0)
        if self.opset not in self.runtime.opsets:
            first, last = self.runtime.opsets[0], self.runtime.opsets[-1]
            raise ConfigError(
                f"--opset {self.opset}: the target {self.target} takes {first} to {last}."
            )
        refused = self.runtime.quantizers.get(self.quantizer)
        if refused is not None:
            raise ConfigError(f"--target {self.target}, quantizer {self.quantizer}: {refused}.")
        if self.target == INTEGER:
            self._check_integer()
        if self.precision == "fp8":
            self._check_fp8()
        if self.centre_values and not self.runtime.centred_values:
            raise ConfigError(
                f"--centre-values with --target {self.target}: its attention maps have finer steps"
                " than TensorRT's 1/127, so that nothing is gained; use --target tensorrt."
            )
        if self.quantize_residual and not self.runtime.quantized_residuals:
            raise ConfigError(
                f"--quantize-residual with --target {self.target}: deploy leaves residual adds in"
                " float there, because the runtime does not fuse them; use --target tensorrt."
            )
        if self.float16 and not self.runtime.half_floats:
            raise ConfigError(
                f"--float16 with --target {self.target}: only files for TensorRT have a float part"
                " in 16 bits; use --target tensorrt."
            )
        if self.weight_only:
            self._check_weight_only()
        width = self.multiplier_bits
        if isinstance(width, bool) or not isinstance(width, int) or not 4 <= width <= 31:
            raise ConfigError(f"--multiplier-bits {width}: must be from 4 to 31.")
        for block in self.attention_blocks:
            _at_least("attention_blocks", block, 0)
        for head in self.attention_heads:
            _at_least("attention_heads", head, 0)
        if self.ptf_k is not None and not 0 <= self.ptf_k <= 12:
            raise ConfigError(f"--ptf-k {self.ptf_k}: must be from 0 to 12.")
        for option, used, owners in (
            ("--no-ptf", not self.ptf, ("fqvit",)),
            ("--ptf-k", self.ptf_k is not None, ("fqvit",)),
            ("--no-equalize", not self.equalize, ("deploy",)),
            ("--no-bias-correction", not self.bias_correction, ("deploy",)),
            (f"--rounding {self.rounding}", self.rounding != "nearest", ("deploy",)),
            ("--no-lis", not self.lis, ("fqvit",)),
            ("--arithmetic integer", self.arithmetic == "integer", ("fqvit",)),
            ("--multiplier-bits", self.multiplier_bits != 31, ("fqvit",)),
        ):
            if used and self.quantizer not in owners:
                raise ConfigError(
                    f"{option} belongs to the quantizer {' or '.join(owners)},"
                    f" not {self.quantizer}."
                )
        if self.gelu != "table" and self.arithmetic != "integer":
            raise ConfigError(
                f"--gelu {self.gelu} belongs to integer arithmetic: add --target integer."
            )
        if not self.ptf and self.ptf_k:
            raise ConfigError("--no-ptf and --ptf-k exclude each other: leave one out.")
        for text in (*self.keep_float, *self.more_bits, *self.per_channel):
            if text != AUTO:
                Selector.parse(text)
        for option, given in (("--keep-float", self.keep_float), ("--more-bits", self.more_bits)):
            if AUTO in given:
                raise ConfigError(f"{option} takes roles; 'auto' is known to --per-channel only.")
        self._check_auto()

    def _check_auto(self) -> None:
        """The bounds belong to ``auto``, one at a time."""
        for option, value in (("--max-drop", self.max_drop), ("--min-sqnr", self.min_sqnr)):
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ConfigError(f"{option} {value}: must be a number.")
            if not self.auto:
                raise ConfigError(f"{option} is the bound of --auto: add --auto, or leave it out.")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ConfigError(f"--max-drop {self.max_drop:g}: must be from 0 to 100 points.")
        if self.max_drop is not None and self.min_sqnr is not None:
            raise ConfigError("--max-drop and --min-sqnr exclude each other: leave one out.")

    def _check_fp8(self) -> None:
        """8-bit floats are for TensorRT, have one width, and no integer grid to search on."""
        for found, wrong, why in (
            (f"--target {self.target}", not self.runtime.eight_bit_floats,
             "its runtime has no FP8 products; use --target tensorrt"),
            (f"--bits {self.bits}", str(self.widths) != "8/8/8", "FP8 has 8 bits; leave it out"),
            (f"--rounding {self.rounding}", self.rounding != "nearest",
             "it rounds to integers; use nearest"),
            (f"--method {self.method}", self.method not in (None, "minmax", "ema", "robust"),
             "it searches on an integer grid; use minmax, ema or robust"),
            ("--per-channel", bool(self.per_channel), "activations have one scale; leave it out"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(f"--precision fp8 with {found}: {why}.")

    def _check_integer(self) -> None:
        """The target integer quantizes every tensor. Its arithmetic is integer."""
        for option, used in (
            ("--keep-float", self.keep_float),
            ("--per-channel", self.per_channel),
            ("--auto", self.auto),
        ):
            if used:
                raise ConfigError(f"--target integer: {option} would leave tensors in float.")
        if self.more_bits:
            raise ConfigError("--target integer: its widths are those of --bits, not --more-bits.")
        object.__setattr__(self, "arithmetic", "integer")

    def _check_weight_only(self) -> None:
        """Only the weights of linears have codes, in blocks that ONNX Runtime alone fuses."""
        for option, used, advice in (
            (f"--target {self.target}", self.target != "onnxruntime", "use --target onnxruntime"),
            (f"--quantizer {self.quantizer}", self.quantizer != "deploy", "use --quantizer deploy"),
            (f"--bits {self.bits}", self.bits != "8/8/8", "leave it out"),
            (f"--method {self.method}", self.method is not None, "leave it out"),
            ("--per-channel", bool(self.per_channel), "leave it out"),
            ("--more-bits", bool(self.more_bits), "leave it out"),
            ("--auto", self.auto, "leave it out"),
        ):
            if used:
                raise ConfigError(
                    f"--weights {self.weights} leaves activations in float and its weights have"
                    f" scales per block; it cannot go with {option}: {advice}."
                )

    @property
    def weight_only(self) -> bool:
        """True where only weights have codes."""
        return self.weights < 8

    @property
    def runtime(self) -> Target:
        """What the target takes."""
        return BY_NAME[self.target]

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
        return self.quantizer == "deploy" and self.equalize

    @property
    def effective_method(self) -> str:
        """The calibration method in force."""
        return self.method or ("percentile" if self.quantizer == "vanilla" else "robust")

    def to_yaml(self) -> str:
        """YAML that :meth:`load` reads back to an equal config."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> QuantizeConfig:
        """Raises ConfigError for unknown keys; ``where`` names the source in messages."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"{where}: unknown option {shown(unknown[0])};"
                f" known are {', '.join(sorted(known))}."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> QuantizeConfig:
        """Read YAML. Raises ConfigError where the file is missing or no mapping of options."""
        return cls.from_mapping(read_yaml(path), str(path))

    def merged(self, **changes: Any) -> QuantizeConfig:
        """A copy with those options that are not None replaced."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"There is no {name} {shown(value)}; choose one of {', '.join(known)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value!r}.")
