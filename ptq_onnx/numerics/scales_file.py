"""The numbers of an earlier run, from its report.json: checked against a schema, then for fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Generic, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ptq_onnx.config.bits import WIDEST
from ptq_onnx.config.targets import Stored
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.text_file import read_text
from ptq_onnx.numerics.spec import Site, TensorSpec

LARGEST_REPORT = 64 << 20
"""Bytes; the report of a ViT-L has three million."""

LARGEST = float(np.finfo(np.float32).max)
MOST_ENTRIES = 1 << 22

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Scale = Annotated[float, Field(allow_inf_nan=False, ge=1e-37, le=1e30)]
Exponent = Annotated[int, Field(ge=-126, le=126)]
Number = TypeVar("Number")
Part = TypeVar("Part", bound=BaseModel)
Point = Annotated[int, Field(ge=-(1 << WIDEST), le=1 << WIDEST)]
Length = Annotated[int, Field(ge=1, le=MOST_ENTRIES)]
Text = Annotated[str, Field(max_length=4096)]


class Strict(BaseModel):
    """A part of ``report.json`` that is used again."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Factors(Strict, Generic[Number]):
    """Numbers that broadcast against a tensor."""

    shape: Annotated[list[Length], Field(max_length=8)]
    values: Annotated[list[Number], Field(max_length=MOST_ENTRIES)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if math.prod(self.shape) != len(self.values):
            raise ValueError(f"{len(self.values)} values do not fill the shape {self.shape}")
        return self


class Entry(Strict):
    """What ``report.json`` says of a tensor, as :meth:`TensorSpec.to_json` writes it; a code's own
    numbers are left for it to check."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    tensor: Text
    bits: Annotated[int, Field(ge=2, le=WIDEST)]
    signed: bool
    symmetric: bool
    granularity: Text
    code: Text
    method: Text
    renormalize: bool
    stored: Stored = "uint8"
    centred: bool = False
    block_size: Annotated[int, Field(ge=0, le=MOST_ENTRIES)] = 0
    scale: Scale | list[Scale] | list[list[Scale]]
    zero_point: Point | list[Point] | list[list[Point]]
    axis: Annotated[int, Field(ge=0, le=7)] | None
    clip: Annotated[list[Finite], Field(min_length=2, max_length=2)]
    alpha: Factors[Exponent] | None = None
    factor: Factors[Scale] | None = None


class Numbers(Strict):
    """The part of ``report.json`` that is used again."""

    tensors: list[Entry]


def read_scales(path: str | Path) -> dict[str, TensorSpec]:
    """Specs by tensor from the report.json of an earlier run. Raises ConfigError."""
    found = read_part(path, Numbers)
    try:
        specs = {e.tensor: _spec(e) for e in found.tensors}
    except ValueError as error:
        raise ConfigError(f"{_not_ours(path)}: {error}.") from error
    if len(specs) != len(found.tensors):
        raise ConfigError(f"{_not_ours(path)}: it has a tensor twice.")
    return specs


def read_part(path: str | Path, kind: type[Part]) -> Part:
    """A part of the report.json of an earlier run. Raises ConfigError."""
    try:
        return kind.model_validate_json(read_text(path, LARGEST_REPORT))
    except OSError as error:
        raise ConfigError(f"--scales {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--scales {path} cannot be read: {error}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{_not_ours(path)}: {place}{': ' if place else ''}"
            f"{str(first['msg'])[:120]}, got {_short(first['input'])}."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{_not_ours(path)}: {error}.") from error


def _not_ours(path: str | Path) -> str:
    return f"--scales {path} is not a report.json of this tool"


def check_fit(spec: TensorSpec, site: Site, where: str) -> None:
    """Refuse numbers whose lengths are not those of the tensor. Raises ConfigError."""
    problem = _misfit(spec, site.shape)
    if problem is not None:
        raise ConfigError(
            f"{where}: tensor '{site.tensor}' {[str(d) for d in site.shape]}: {problem}; it"
            " belongs to another model, or was changed by hand: calibrate anew."
        )


def _spec(entry: Entry) -> TensorSpec:
    scales, points = np.shape(entry.scale), np.shape(entry.zero_point)  # ValueError where ragged
    if scales != points:
        raise ValueError(f"tensor '{entry.tensor}': scales {scales}, zero points {points}")
    values = entry.model_dump(exclude_none=True) | {"axis": entry.axis}
    return TensorSpec.from_json(entry.tensor, values)


def _misfit(spec: TensorSpec, shape: tuple[int | str, ...]) -> str | None:
    scale, rule = spec.scale, spec.rule
    problem = rule.code.misfit(spec.numbers(None))
    if problem is not None:
        return problem
    if spec.clip[0] > spec.clip[1]:
        return f"its range {list(spec.clip)} runs backwards"
    if spec.axis is not None and spec.axis >= len(shape):
        return f"it has no axis {spec.axis}"
    if rule.grain.block_size:
        expected: tuple[int | str, ...] = ()
        if len(shape) == 2 and isinstance(shape[0], int):
            expected = (-(-shape[0] // rule.grain.block_size), shape[1])
        if scale.shape != expected:
            return f"scales {list(scale.shape)}, expected {list(expected)}"
    elif scale.ndim == 1 and spec.axis is not None:
        if not _equal(scale.shape[0], shape[spec.axis]):
            return f"{scale.shape[0]} scales along axis {spec.axis}"
    elif scale.ndim:
        return f"scales {list(scale.shape)}, expected one"
    if spec.factor is not None:
        sides = spec.factor.shape
        fits = all(s == 1 or _equal(s, d) for s, d in zip(sides[::-1], shape[::-1], strict=False))
        if len(sides) > len(shape) or not fits:
            return f"its factors have the shape {list(sides)}"
    if not rule.grain.per_channel and spec.axis is not None:
        return f"it has one scale, and an axis {spec.axis} of several"
    return None


def _equal(count: int, side: int | str) -> bool:
    """A side that is not known may be anything."""
    return not isinstance(side, int) or count == side


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
