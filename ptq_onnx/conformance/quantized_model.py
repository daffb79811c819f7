"""The model under check: what the rules of every target read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ptq_onnx import graph
from ptq_onnx.conformance.coding import DEQUANTIZE, QUANTIZE, Coding, constant
from ptq_onnx.conformance.product import INTEGER_PRODUCTS, Product, find_products
from ptq_onnx.validation import one_line

T = TypeVar("T")


class QuantizedModel:
    """A graph without local functions, its products and its Q/DQ nodes.

    ``source`` is what a runtime loads: the path of the file, or the bytes of a model that has
    none.
    """

    def __init__(self, model: ir.Model, source: str | bytes) -> None:
        self.model = model
        self.graph = model.graph
        self.source = source
        self._derived: dict[Callable[..., Any], Any] = {}

    @property
    def opset(self) -> int:
        return self.graph.opset_imports.get("", 0)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        return tuple(find_products(self.graph))

    @cached_property
    def codings(self) -> tuple[Coding, ...]:
        """All QuantizeLinear and DequantizeLinear nodes."""
        return tuple(Coding(n) for n in self.graph if n.op_type in (QUANTIZE, DEQUANTIZE))

    def derived(self, make: Callable[[str | bytes], T]) -> T:
        """What ``make`` reads from the source, made once: a runtime's view of the file."""
        if make not in self._derived:
            self._derived[make] = make(self.source)
        return cast(T, self._derived[make])

    def counts(self) -> dict[str, Any]:
        """The op histogram and the numbers of quantized products, as in a Report."""
        ops = Counter(node.op_type for node in self.graph)
        linear = [p.linear for p in self.products]
        quantized = [p.quantized for p in self.products]
        for node in self.graph:
            if node.op_type in INTEGER_PRODUCTS:
                linear.append(constant(node.inputs[INTEGER_PRODUCTS[node.op_type]]) is not None)
                quantized.append(True)
        pairs = Counter(zip(linear, quantized, strict=True))
        return {
            "ops": dict(ops.most_common()),
            "linears": pairs[True, True] + pairs[True, False],
            "quantized_linears": pairs[True, True],
            "products": pairs[False, True] + pairs[False, False],
            "quantized_products": pairs[False, True],
        }


def open_model(model: str | Path | ir.Model) -> QuantizedModel:
    """Read a file, or take a model in memory in its standard form. Raises ModelError."""
    if isinstance(model, ir.Model):
        standard = graph.to_standard(model)
        return QuantizedModel(_without_functions(standard), graph.serialize(standard))
    return QuantizedModel(_without_functions(graph.read(model)), str(model))


def _without_functions(model: ir.Model) -> ir.Model:
    if model.functions:
        try:
            InlinePass()(model)
        except Exception as error:  # a recursive function, say: the rules see its calls
            logging.getLogger(__name__).warning("Functions stay: %s", one_line(error))
    return model
