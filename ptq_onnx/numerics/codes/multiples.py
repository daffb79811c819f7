"""Codes of weights that are products of two small numbers: 8 bits for the kernel, fewer held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ptq_onnx.config.bits import BYTE
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Numbers
from ptq_onnx.numerics.codes.uniform import Uniform

LARGEST = 127
"""Of the codes; as far below zero."""
NARROW = 63
"""Where a kernel adds up in 16 bits: two products with bytes fit (``numerics/pair_sums.py``)."""


@dataclass(frozen=True)
class MultipleCodes(Uniform):
    """value = code · scale, the code being f (q − z) of a block of rows, q of a rule's few bits.

    What q, f and z are is seen in the codes (``numerics/multiples.py``).
    """

    name: ClassVar[str] = "multiples"
    widest: ClassVar[int] = BYTE

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """Those of the products, whatever the bits of q."""
        return -LARGEST if signed else 0, LARGEST

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """As uniform codes; of 8 bits too, one code of the type is left out."""
        return super().emit(builder, value, replace(numbers, bits=min(numbers.bits, BYTE - 1)))
