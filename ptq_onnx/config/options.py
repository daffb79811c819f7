"""The options of a quantization as keywords of a function."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypedDict

from ptq_onnx.config.bits import Bits
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError

Roles = str | Sequence[str]


class Options(TypedDict, total=False):
    """The fields of :class:`QuantizeConfig`, in the forms that are easy to type.

    ``bits`` may be three numbers, ``size`` one, ``keep_float`` and its kind one selector.
    """

    quantizer: str
    bits: str | tuple[int, int, int] | Bits
    precision: str
    weights: int
    method: str | None
    activations: str
    images: int
    seed: int | None
    batch: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    size: int | tuple[int, int] | None
    crop_pct: float | None
    interpolation: str | None
    input: Roles
    check_preprocess: bool
    keep_float: Roles
    more_bits: Roles
    per_channel: Roles
    auto: bool
    max_drop: float | None
    min_sqnr: float | None
    ptf: bool
    ptf_k: int | None
    lis: bool | None
    equalize: bool
    convolutions: bool | None
    rotate: bool | None
    split_hidden: bool | None
    bias_correction: bool
    rounding: str
    wide_ends: bool
    reconstruct: bool
    minutes: float
    quantize_residual: bool
    centre_values: bool
    float16: bool
    arithmetic: Literal["float", "integer"]
    multiplier_bits: int
    gelu: str
    target: str
    cpu: str
    opset: int
    mixed: bool | None
    target_bits: float | None
    target_size: float | None
    mixed_by: str
    batch_size: int
    metric: str | None
    metric_option: Roles
    report: bool
    sensitivity: bool
    pictures: bool
    attention_blocks: Sequence[int]
    attention_heads: Sequence[int]
    analysis_images: int | None
    threads: int
    workers: int
    device: str


def configured(config: QuantizeConfig | None, options: Mapping[str, Any]) -> QuantizeConfig:
    """``config``, or the defaults, with ``options`` in place of its fields. Raises ConfigError."""
    if config is not None and not isinstance(config, QuantizeConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: expected a QuantizeConfig, or options as"
            " keywords, as in quantize(model, quantizer='fqvit')."
        )
    known = {field.name for field in fields(QuantizeConfig)}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
            )
            raise ConfigError(f"There is no option '{name}': {hint}")
    values = {name: _value(name, value) for name, value in options.items()}
    try:
        return QuantizeConfig(**values) if config is None else replace(config, **values)
    except (TypeError, ValueError, AttributeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"Options {given}: {error}.") from error


def _value(name: str, value: Any) -> Any:
    """The value as the config holds it."""
    if name == "bits":
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != 3:
                raise ConfigError(f"bits={value!r}: expected three, as in (8, 8, 4).")
            return str(Bits(*value))
        return str(value)
    if name == "size" and isinstance(value, int):
        return (value, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return value
