"""The model under check: what the rules of every target read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from ptq_onnx.errors import one_line
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.preparation import model_files as graph
from ptq_onnx.targets.checking.coding import Coding, constant
from ptq_onnx.targets.checking.product import INTEGER_PRODUCTS, Product, find_products

T = TypeVar("T")


class QuantizedModel:
    """A graph without local functions, its products and its Q/DQ nodes.

    ``source`` is what a runtime loads: the path of the file, or the bytes of a model that has
    none. ``device``: what it is to be compiled for, by the names that the target has for it.
    """

    def __init__(self, model: ir.Model, source: str | bytes) -> None:
        self.model = model
        self.graph = model.graph
        self.source = source
        self.device: dict[str, str] = {}
        self._derived: dict[Callable[..., Any], Any] = {}

    @property
    def opset(self) -> int:
        """The opset of the standard ops; 0 where the model imports none."""
        return self.graph.opset_imports.get("", 0)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """All products, with what they read and how it is quantized."""
        return tuple(find_products(self.graph))

    @cached_property
    def codings(self) -> tuple[Coding, ...]:
        """All QuantizeLinear and DequantizeLinear nodes."""
        return tuple(Coding(n) for n in self.graph if n.op_type in (QUANTIZE, DEQUANTIZE))

    @cached_property
    def _inferred(self) -> dict[str, ir.Shape]:
        """Shapes by tensor, also those that the file leaves out."""
        copy = self.model.clone()
        try:
            ShapeInferencePass()(copy)
        except Exception as error:  # an op that onnx does not know, say
            logging.getLogger(__name__).warning("Shapes stay unknown: %s", one_line(error))
        values = (v for node in copy.graph for v in node.outputs)
        return {str(v.name): v.shape for v in values if v.shape is not None}

    def shape(self, value: ir.Value) -> ir.Shape | None:
        """The shape of a tensor; None where nothing says."""
        if value.const_value is not None:
            return value.const_value.shape  # type: ignore[return-value]
        if value.shape is not None:
            return value.shape
        return self._inferred.get(str(value.name))

    def size(self, value: ir.Value, axis: int) -> int | None:
        """Elements along one axis; None where that is known at run time only."""
        shape = self.shape(value)
        found = None if shape is None or len(shape) < abs(axis) else shape[axis]
        return found if isinstance(found, int) else None

    def derived(self, make: Callable[[str | bytes], T]) -> T:
        """What ``make`` reads from the source, made once: a runtime's view of the file."""
        if make not in self._derived:
            self._derived[make] = make(self.source)
        return cast(T, self._derived[make])

    def counts(self, *, sixteen_bits: bool = False) -> dict[str, Any]:
        """The op histogram and the numbers of quantized products, as in a Report.

        ``sixteen_bits``: the runtime multiplies codes of those too.
        """
        ops = Counter(node.op_type for node in self.graph)
        linear = [p.linear for p in self.products]
        quantized = [p.coded if sixteen_bits else p.quantized for p in self.products]
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
