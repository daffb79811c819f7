"""What is quantized, and how: rules before calibration, specs after it.

A :class:`Site` is a place in the fused graph where a tensor may be quantized. A
quantizer gives a site a :class:`Rule` (what kind of numbers). Calibration turns
the rule into a :class:`TensorSpec` (the numbers), which simulation, analysis and
export all read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.targets import Stored

LARGEST_EXPONENT = 126
"""2^-126 is the smallest normal float32: no log2 code means a smaller value."""

Granularity = Literal["tensor", "channel", "ptf", "row"]
Code = Literal["uniform", "log2", "e4m3"]


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
    def label(self) -> str:
        """``blocks.3.fc2`` or ``head``: how reports name the site."""
        return self.role if self.block is None else f"blocks.{self.block}.{self.role}"


@dataclass(frozen=True)
class Rule:
    """What numbers a site is to hold: bits, sign, symmetry, granularity and code.

    ``granularity``: one scale per ``tensor``, one per ``channel``, or ``ptf``: one scale
    and a power-of-two factor per channel (FQ-ViT), or ``row``: one scale, on every row (last
    axis) divided by its largest value, which is found at run time. ``code``: ``uniform``;
    ``log2`` for attention maps; ``e4m3``: 8-bit floats, whose limits are -448 and 448.
    ``renormalize`` divides A V by the sum of the row's codes' values. ``stored``: the type of an
    activation's integer codes in the file; weights are int8, or int4 where ``block_size``, the
    number of rows that share a scale and zero point of a column, is not 0. ``centred``: the mean
    over tokens, of the tensor in whole steps of its scale, is taken out before, and added to A V
    (see ``calibration/mean_centred.py``).
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = "tensor"
    code: Code = "uniform"
    method: str = "minmax"
    renormalize: bool = False
    stored: Stored = "uint8"
    centred: bool = False
    block_size: int = 0

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code, in units of the scale; of log2 the last one means zero."""
        if self.code == "e4m3":
            return -448, 448
        if self.code == "log2":
            return 0, min((1 << self.bits) - 1, LARGEST_EXPONENT)
        if self.signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1


@dataclass(frozen=True, eq=False)
class TensorSpec:
    """The calibrated numbers of one tensor.

    Dequantized value = (code - zero_point) * scale * factor. ``scale`` and ``zero_point``
    are scalars, or vectors along ``axis`` (weights), or [B, N] of B blocks of rows. ``factor``
    broadcasts against the tensor: powers of two for PTF, free ratios for ``channel``, ``None``
    where all are one. For ``e4m3`` the codes are bits, whose value takes the place of the code.
    For ``log2`` codes the value is 2**-code, and the top code stands for zero.
    """

    tensor: str
    rule: Rule
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None = None
    factor: NDArray[np.float32] | None = None
    clip: tuple[float, float] = (0.0, 0.0)

    @property
    def alpha(self) -> NDArray[np.int32] | None:
        """PTF's exponents: log2 of the factor (int32, shape of ``factor``); None for any other
        factor than powers of two."""
        if self.factor is None or self.rule.granularity != "ptf":
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
            "code": self.rule.code,
            "method": self.rule.method,
            "renormalize": self.rule.renormalize,
            "stored": self.rule.stored,
            "centred": self.rule.centred,
            "block_size": self.rule.block_size,
            "limits": list(self.rule.limits),
            "scale": self.scale.astype(float).tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
            "clip": list(self.clip),
        }
        if self.factor is not None:
            exponents = self.alpha
            key = "factor" if exponents is None else "alpha"
            values = self.factor.astype(float) if exponents is None else exponents
            out[key] = {"shape": list(values.shape), "values": values.ravel().tolist()}
        return out

    @classmethod
    def from_json(cls, tensor: str, data: Mapping[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_json`. Raises KeyError or ValueError on wrong data."""
        rule = Rule(
            bits=int(data["bits"]),
            signed=bool(data["signed"]),
            symmetric=bool(data["symmetric"]),
            granularity=data["granularity"],
            code=data["code"],
            method=data["method"],
            renormalize=bool(data["renormalize"]),
            stored=data.get("stored", "uint8"),
            centred=bool(data.get("centred", False)),
            block_size=int(data.get("block_size", 0)),
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
        )
