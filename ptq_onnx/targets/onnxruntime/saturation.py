"""Which products of a file may saturate on x86 CPUs without VNNI (``numerics/pair_sums.py``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ptq_onnx.numerics.pair_sums import MOST, pair_sums
from ptq_onnx.targets.checking.product import Product
from ptq_onnx.targets.checking.quantized_model import QuantizedModel

TITLE = "without VNNI"


def saturation(model: QuantizedModel) -> Mapping[str, int]:
    """How many products of uint8 by int8 may saturate there, and how many never do."""
    found = [one for one in map(may_saturate, model.products) if one is not None]
    return {"may saturate": sum(found), "never": len(found) - sum(found)}


def may_saturate(product: Product) -> bool | None:
    """Whether codes could add up to more than 16 bits hold; None for products of other types."""
    codings = [operand.dequantize for operand in product.operands]
    types = [None if one is None else one.dtype for one in codings]
    if types != [ir.DataType.UINT8, ir.DataType.INT8] or codings[1] is None:
        return None
    value = codings[1].node.inputs[0]
    if value is None or value.const_value is None:
        return True
    codes = value.const_value.numpy()
    known = codes.ndim == 2 and not product.node.attributes.get_int("transB", 0)
    largest = pair_sums(codes) if known else 2 * np.abs(codes.astype(np.int64))
    return bool((largest > MOST).any())
