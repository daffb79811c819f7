"""Scale, zero point and type of codes, read from Q/DQ and derived for what has none yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import consumers, is_constant, is_layout
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.graph.formula import scalar
from ptq_onnx.numerics.codes.uniform import asymmetric_scale

UINT8, UINT16 = ir.DataType.UINT8, ir.DataType.UINT16
WIDER = 257
"""65535 / 255: a step of 8-bit codes is so many of 16-bit codes with the same range."""


@dataclass(frozen=True)
class Numbers:
    """One scale, zero point and type of codes."""

    scale: np.float32
    zero: int
    dtype: ir.DataType

    @classmethod
    def of(cls, node: ir.Node) -> Numbers | None:
        """Those of a QuantizeLinear or DequantizeLinear with one constant scale."""
        scale, zero = (None if v is None else v.const_value for v in node.inputs[1:3])
        if scale is None or zero is None or scale.size != 1:
            return None
        return cls(np.float32(scale.numpy().item()), int(zero.numpy().item()), zero.dtype)

    @classmethod
    def over(cls, low: float, high: float, dtype: ir.DataType) -> Numbers:
        """Those that hold a range, without a sign."""
        if low >= 0 and high <= 0:
            return cls(np.float32(1), 0, dtype)
        ends = np.array([[low], [high]], np.float32)
        scale, zero = asymmetric_scale(ends[0], ends[1], limits_of(dtype))
        return cls(np.float32(scale[0]), int(zero[0]), dtype)

    @property
    def range(self) -> tuple[float, float]:
        """The values of the first and the last code."""
        low, high = limits_of(self.dtype)
        return (low - self.zero) * float(self.scale), (high - self.zero) * float(self.scale)

    def wider(self) -> Numbers:
        """The same numbers, and 256 between each two, in 16 bits."""
        if self.dtype != UINT8:
            return self
        return Numbers(np.float32(self.scale / WIDER), self.zero * WIDER, UINT16)


MANTISSA = 10
"""Bits behind the first of the number that HTP multiplies the sums of a channel by."""


def representable(multipliers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest numbers with ``MANTISSA`` bits behind the first.

    With a scale per channel HTP's emulator (2.7.0) rounds s_x s_w / s_y to them, and multiplies
    what has the zero point in it: up to 15 steps of a 16-bit output are lost (55 dB), with numbers
    that it holds half a step (77 dB, measured).
    """
    exponent = np.floor(np.log2(np.maximum(multipliers, np.finfo(np.float32).tiny)))
    unit = np.exp2(exponent - MANTISSA)
    return np.asarray(np.rint(multipliers / unit) * unit, np.float64)


def limits_of(dtype: ir.DataType) -> tuple[int, int]:
    """Smallest and largest code of a type."""
    info = np.iinfo(dtype.numpy())
    return int(info.min), int(info.max)


def numbers_of(value: ir.Value | None) -> Numbers | None:
    """The numbers of a tensor that DequantizeLinear makes."""
    node = None if value is None else value.producer()
    return Numbers.of(node) if node is not None and node.op_type == DEQUANTIZE else None


def quantizers(value: ir.Value) -> list[Numbers]:
    """The numbers of every QuantizeLinear that reads a tensor."""
    nodes = (node for node, _ in consumers(value) if node.op_type == QUANTIZE)
    return [found for node in nodes if (found := Numbers.of(node)) is not None]


def kept(node: ir.Node) -> Numbers | None:
    """The numbers of what an op moves: of its first input, of a Concat's those that all have."""
    data = [v for v in node.inputs if is_data(v) and v is not None]
    data = data if node.op_type == "Concat" else data[:1]
    return joined(set(filter(None, map(numbers_of, data))))


def behind(value: ir.Value) -> set[Numbers]:
    """The numbers that a tensor gets behind layout ops."""
    return set(_behind(value))


def _behind(value: ir.Value) -> Iterator[Numbers]:
    yield from quantizers(value)
    for node, index in consumers(value):
        if is_layout(node) and node.op_type != "Shape" and (index == 0 or node.op_type == "Concat"):
            for output in node.outputs:
                yield from _behind(output)


def joined(found: Iterable[Numbers]) -> Numbers | None:
    """Numbers for all of these ranges; None where there are none."""
    each = list(found)
    if len(each) < 2:
        return each[0] if each else None
    ends = [one.range for one in each]
    dtype = UINT16 if any(one.dtype == UINT16 for one in each) else each[0].dtype
    return Numbers.over(min(low for low, _ in ends), max(high for _, high in ends), dtype)


def derived(node: ir.Node | None) -> Numbers | None:
    """Numbers of what an op computes, by those of what it reads."""
    read = None if node is None else node.inputs[0]
    found = numbers_of(read)
    if node is None or found is None:
        return None
    if node.op_type == "Sigmoid":
        return Numbers.over(0.0, 1.0, found.dtype)
    factor = scalar(node.inputs[1]) if node.op_type == "Mul" else None
    if factor is None or factor <= 0:
        return None
    return Numbers(np.float32(found.scale * factor), found.zero, found.dtype)


def is_float(value: ir.Value) -> bool:
    """True for a tensor of floats; one without a type is taken for that."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    return dtype is None or dtype == ir.DataType.FLOAT


def is_data(value: ir.Value | None) -> bool:
    """True for an activation."""
    if value is None or is_constant(value) or not is_float(value):
        return False
    node = value.producer()
    return node is None or node.op_type != DEQUANTIZE or not is_constant(node.inputs[0])
