"""The codes, by name."""

from __future__ import annotations

from typing import NewType

from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.numerics.codes.e4m3 import E4m3
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.codes.multiples import MultipleCodes
from ptq_onnx.numerics.codes.twin import Twin
from ptq_onnx.numerics.codes.uniform import Uniform

CodeName = NewType("CodeName", str)
"""One of the names, in reports."""
CODES: tuple[Code, ...] = (Uniform(), Log2(), E4m3(), Twin(), Logarithmic(), MultipleCodes())


def code_named(name: str) -> Code:
    """Raises ValueError for a name that no code has."""
    for code in CODES:
        if code.name == name:
            return code
    raise ValueError(
        f"there are no codes '{name[:40]}'; there are {', '.join(c.name for c in CODES)}"
    )
