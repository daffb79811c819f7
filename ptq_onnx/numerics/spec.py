"""What is quantized, and how: rules before calibration, specs after it.

A :class:`Site` is a place in the fused graph where a tensor may be quantized. A
quantizer gives a site a :class:`Rule` (what kind of numbers). Calibration turns
the rule into a :class:`TensorSpec` (the numbers), which simulation, analysis and
export all read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.targets import Stored
from ptq_onnx.numerics.around.around import Around, ClipOf
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.around.run_time import (
    ColumnMaximum,
    RunTimeRange,
    SkewedToken,
    TokenMaximum,
)
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.by_name import code_named
from ptq_onnx.numerics.codes.code import Code, Numbers
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.grain import Grain, PerTensor, PowersOfTwo, grain_named

PER_TENSOR, UNIFORM = PerTensor(), Uniform()
RUN_TIME: tuple[Around, ...] = (
    RowMaximum(), RunTimeRange(), TokenMaximum(), SkewedToken(), ColumnMaximum(),
)  # fmt: skip
"""What finds a range at run time; a tensor has one of them at most."""
WIDTHS: tuple[tuple[Stored, Stored], ...] = (("int8", "uint8"), ("int16", "uint16"))
"""Types of codes: up to 8 bits, more; with a sign, without."""


@dataclass(frozen=True)
class Site:
    """A tensor of the fused graph that can be quantized.

    ``channel_axes`` are the axes that tell channels apart, non-negative, empty for a tensor
    without channels; the channels of attention logits and maps are the heads. ``consumers``
    are the compute nodes that read the tensor, also through layout ops.
    """

    tensor: str
    role: str
    block: int | None
    channel_axes: tuple[int, ...]
    shape: tuple[int | str, ...]
    producer: str | None
    consumers: tuple[str, ...]
    is_parameter: bool = False

    @property
    def elements(self) -> int:
        """How many it has for one image; an axis whose size is not known counts once."""
        return math.prod(d for d in self.shape[1:] if isinstance(d, int))

    @property
    def label(self) -> str:
        """``blocks.3.fc2`` or ``head``: how reports name the site."""
        return self.role if self.block is None else f"blocks.{self.block}.{self.role}"


@dataclass(frozen=True)
class Rule:
    """What numbers a site is to hold: a code, its grain, what is done around it, and how its
    range is found.

    ``symmetric``: zero points are zero. ``stored``: the type of an activation's integer codes in
    the file, as wide as ``bits`` need; that of a weight's is its grain's.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    grain: Grain = PER_TENSOR
    code: Code = UNIFORM
    method: str = "minmax"
    around: tuple[Around, ...] = ()
    stored: Stored = "uint8"

    def __post_init__(self) -> None:
        if self.grain.per_channel and self.run_time is not None:
            raise ValueError("what has a range of its own at run time has one step")
        object.__setattr__(self, "stored", WIDTHS[self.bits > BYTE][self.stored.startswith("u")])

    def __str__(self) -> str:
        rows = self.grain.block_size
        parts = [
            f"{self.bits}-bit {'signed' if self.signed else 'unsigned'} {self.code.name} codes",
            *(["symmetric"] if self.symmetric else []),
            f"a scale per {f'{rows} rows' if rows else self.grain.name}",
            *(f"around it {around.name}" for around in self.around),
            f"range by {self.method}",
            f"stored as {self.stored}",
        ]
        return ", ".join(parts)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.code.limits(self.bits, self.signed)

    @property
    def per_tensor(self) -> bool:
        """All elements share one step."""
        return not self.grain.per_channel and self.run_time is None

    @property
    def granularity(self) -> str:
        """``tensor``, ``channel``, ``ptf``, or what has a range at run time, as ``row``: in
        reports."""
        return self.grain.name if self.run_time is None else self.run_time.name

    @property
    def run_time(self) -> Around | None:
        """What finds its range at run time."""
        return next((around for around in self.around if around in RUN_TIME), None)

    @property
    def per_row(self) -> tuple[Around, ...]:
        """What is done around each row by itself."""
        return tuple(around for around in self.around if around.per_row)

    @property
    def clip_of(self) -> ClipOf:
        """What the range of the codes is of: ``values``, ``row`` or ``centred``."""
        found = [around.clip_of for around in self.around if around.clip_of != "values"]
        return found[0] if found else "values"


@dataclass(frozen=True, eq=False)
class TensorSpec:
    """The calibrated numbers of one tensor.

    Dequantized value = (what the code makes of it and its numbers) * factor. ``scale`` and
    ``zero_point`` are scalars, or vectors along ``axis`` (weights), or [B, N] of B blocks of rows.
    ``factor`` broadcasts against the tensor: powers of two for PTF, free ratios per channel,
    ``None`` where all are one. ``details``: the code's own whole numbers, by name.
    ``order``: the rows of a weight in the order of their blocks, [K] (``numerics/multiples.py``).
    """

    tensor: str
    rule: Rule
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None = None
    factor: NDArray[np.float32] | None = None
    clip: tuple[float, float] = (0.0, 0.0)
    details: Mapping[str, int] = field(default_factory=dict)
    order: NDArray[np.int64] | None = None

    def numbers(self, shape: tuple[int, ...] | None) -> Numbers:
        """The code's numbers, against a tensor of ``shape``; None: as they are."""
        rule, scale, zero = self.rule, self.scale, self.zero_point
        if shape is not None:
            scale, zero = (rule.grain.spread(v, self.axis, shape) for v in (scale, zero))
        return Numbers(rule.bits, rule.signed, scale, zero, self.details, rule.stored)

    @property
    def alpha(self) -> NDArray[np.int32] | None:
        """PTF's exponents: log2 of the factor (int32, shape of ``factor``); None for any other
        factor than powers of two."""
        if self.factor is None or self.rule.grain != PowersOfTwo():
            return None
        exponents = np.round(np.log2(self.factor)).astype(np.int32)
        return exponents if np.array_equal(np.exp2(exponents), self.factor) else None

    def with_factor(self, factor: NDArray[np.float32] | None) -> TensorSpec:
        """The same spec with another factor."""
        return replace(self, factor=factor)

    def to_json(self) -> dict[str, Any]:
        """Plain Python values; floats keep every bit (float32 widened to float64)."""
        out: dict[str, Any] = {
            "bits": self.rule.bits,
            "signed": self.rule.signed,
            "symmetric": self.rule.symmetric,
            "granularity": self.rule.granularity,
            "code": self.rule.code.name,
            "method": self.rule.method,
            "renormalize": RowSums() in self.rule.around,
            "stored": self.rule.stored,
            "centred": TokenMean() in self.rule.around,
            "block_size": self.rule.grain.block_size,
            "limits": list(self.rule.limits),
            "scale": self.scale.astype(float).tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
            "clip": list(self.clip),
            **self.details,
        }
        if self.order is not None:
            out["order"] = self.order.tolist()
        if self.factor is not None:
            exponents = self.alpha
            key = "factor" if exponents is None else "alpha"
            values = self.factor.astype(float) if exponents is None else exponents
            out[key] = {"shape": list(values.shape), "values": values.ravel().tolist()}
        return out

    @classmethod
    def from_json(cls, tensor: str, data: Mapping[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_json`. Raises KeyError or ValueError on wrong data."""
        code = code_named(data["code"])
        named = data["granularity"]
        found = tuple(around for around in RUN_TIME if around.name == named)
        grain = "tensor" if found else named
        around = (
            (TokenMean(), bool(data.get("centred", False))),
            (RowSums(), bool(data["renormalize"])),
        )
        rule = Rule(
            bits=int(data["bits"]),
            signed=bool(data["signed"]),
            symmetric=bool(data["symmetric"]),
            grain=grain_named(grain, int(data.get("block_size", 0))),
            code=code,
            method=data["method"],
            around=(*found, *(one for one, there in around if there)),
            # What a file for ONNX Runtime has lower, in int8 (``qdq/kernel_forms.py``), is itself.
            stored=data.get("stored", "uint8") if data["signed"] else "uint8",
        )
        factor = None
        if "alpha" in data:
            part = data["alpha"]
            factor = np.exp2(np.array(part["values"], np.float32)).reshape(part["shape"])
        elif "factor" in data:
            part = data["factor"]
            factor = np.array(part["values"], np.float32).reshape(part["shape"])
        low, high = data["clip"]
        return cls(
            tensor=tensor,
            rule=rule,
            scale=np.array(data["scale"], np.float32),
            zero_point=np.array(data["zero_point"], np.int32),
            axis=data["axis"],
            factor=factor,
            clip=(float(low), float(high)),
            details=code.read_details(data),
            order=None if "order" not in data else np.array(data["order"], np.int64),
        )
