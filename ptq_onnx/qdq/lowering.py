"""Turns a fused graph and its specs into standard ONNX with QuantizeLinear/DequantizeLinear.

One function serves two masters: the exporter lowers the whole graph, the exact simulator
lowers one node at a time and runs it in ONNX Runtime. So both compute the same numbers.

A per-channel factor f never becomes a per-axis Q/DQ on an activation (ONNX Runtime's
optimizer breaks those around Add and MatMul). The tensor is divided by f before a scalar
Q/DQ, and multiplied by f behind it. Either multiplication disappears where it can be moved
exactly (f a power of two): into LayerNormalization's scale and bias, into the columns of
the linear that makes the tensor, into the rows of the weight that reads it (which were
quantized with the factor), between q and k, and through A·V. Which of these, ``factors.py``
decides before the first node is put in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import Factor, is_convolution
from ptq_onnx.blocks.walking import consumers, is_layout, is_linear, is_product
from ptq_onnx.calibration.mean_centred import TOKENS, static_tokens
from ptq_onnx.numerics.log2 import THRESHOLD, log2_values, top_code
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.numerics.uniform import quantize
from ptq_onnx.qdq.factors import FactorPlan, Place, leaves, plan_factors, quantized_values, way


@dataclass
class _Lowering:
    """The state of lowering one graph, changed in place."""

    graph: ir.Graph
    specs: Mapping[str, TensorSpec]
    names: set[str] = field(default_factory=set)
    renormalized: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """A·V outputs that are divided by row sums: the quotient, by the product's output."""
    factors: FactorPlan = field(default_factory=lambda: FactorPlan({}))
    """Decided before the first node is put in."""
    columns: dict[ir.Node, Factor] = field(default_factory=dict)
    """What the output channels of linears and convolutions are divided by."""

    # --- small builders -----------------------------------------------------------------

    def unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self.names:
            candidate, n = f"{name}_{n}", n + 1
        self.names.add(candidate)
        return candidate

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        name = self.unique(name)
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
        )
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        anchor: ir.Node | None,
        op: str,
        inputs: list[ir.Value | None],
        like: ir.Value,
        suffix: str,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, int | float] | None = None,
    ) -> ir.Value:
        """A node behind ``anchor`` (first in the graph for None); returns its output."""
        name = self.unique(f"{like.name}_{suffix}")
        node = ir.node(op, inputs, attributes or {}, name=f"{name}_node", num_outputs=1)
        output = node.outputs[0]
        output.name, output.shape = name, like.shape
        output.type = like.type if dtype is None else ir.TensorType(dtype)
        if anchor is None:
            first = next(iter(self.graph), None)
            if first is None:
                self.graph.append(node)
            else:
                self.graph.insert_before(first, node)
        else:
            self.graph.insert_after(anchor, node)
        return output

    def chain(
        self,
        start: ir.Value,
        steps: Iterable[tuple[str, list[ir.Value | None], str, ir.DataType | None]],
        like: ir.Value,
    ) -> ir.Value:
        """Nodes one behind the other; each takes the value so far as its first input."""
        value = start
        for op, others, suffix, dtype in steps:
            value = self.add(value.producer(), op, [value, *others], like, suffix, dtype)
        return value

    # --- activations --------------------------------------------------------------------

    def activation(self, value: ir.Value, spec: TensorSpec, place: Place | None) -> None:
        """Quantize and dequantize one activation; point its readers at the result."""
        uses = [(node, i) for node, i in consumers(value) if node.op_type != "Shape"]
        if spec.rule.code == "log2":
            out = self.log2(value, spec)
            self.redirect(value, uses, out)
            if spec.rule.renormalize:
                self.renormalize(out)
            return
        if spec.rule.granularity == "row":
            self.rows(value, spec, uses)
            return
        if spec.rule.centred:
            self.centred(value, spec, uses)
            return
        out = self.uniform(value, spec, place)
        producer = value.producer()
        if producer is not None and producer.op_type == "Conv":
            # ONNX Runtime fuses a Conv whose output nothing but QuantizeLinear reads.
            shapes = [(node, i) for node, i in consumers(value) if node.op_type == "Shape"]
            self.redirect(value, shapes, out, outputs=False)
        if spec.factor is None or place is None:
            self.redirect(value, uses, out)
            return
        scaled = [use for use in uses if use in place.scaled]
        plain = [use for use in uses if use not in scaled]
        self.redirect(value, scaled, out, outputs=False)
        for use in plain:
            self.split_readers(value, use, out, place)
        if plain or value.is_graph_output():
            shape = self.constant(f"{value.name}_factor", spec.factor)
            real = self.add(out.producer(), "Mul", [out, shape], value, "rescaled")
            self.redirect(value, plain, real)

    def rows(self, value: ir.Value, spec: TensorSpec, uses: list[tuple[ir.Node, int]]) -> None:
        """Every row divided by its largest value, quantized; A·V is multiplied by it."""
        axes = self.constant(f"{value.name}_row", np.array([-1], np.int64))
        top = self.add(value.producer(), "ReduceMax", [value, axes], value, "row_max")
        if value.shape is not None:
            top.shape = ir.Shape([*list(value.shape)[:-1], 1])
        part = self.add(top.producer(), "Div", [value, top], value, "row_scaled")
        out = self.codes(self.clipped(part, value, spec), value, spec)
        self.behind_product(value, out, uses, 0, ("Mul", top, "row_rescaled"))

    def centred(self, value: ir.Value, spec: TensorSpec, uses: list[tuple[ir.Node, int]]) -> None:
        """V without its mean over the tokens, quantized; A·V gets it back."""
        # Any constant will do. The sum is one of whole numbers, so that it does not depend on its
        # order, which ONNX Runtime's optimizer changes with the layout: a last bit moves codes.
        # So does the division of its ReduceMean.
        step, tokens = np.float32(spec.scale), static_tokens(value)
        inverse = self.constant(f"{value.name}_mean_inverse_step", np.float32(1) / step)
        axes = self.constant(f"{value.name}_tokens", np.array([TOKENS], np.int64))
        whole = self.chain(
            value,
            [("Mul", [inverse], "mean_scaled", None), ("Round", [], "mean_rounded", None)],
            value,
        )
        mean = self.add(whole.producer(), "ReduceSum", [whole, axes], value, "sum")
        if value.shape is not None:
            sizes = list(value.shape)
            sizes[TOKENS] = 1
            mean.shape = ir.Shape(sizes)
        by = self.constant(f"{value.name}_mean_step", step / np.float32(tokens))
        mean = self.add(mean.producer(), "Mul", [mean, by], value, "mean")
        if value.shape is not None:
            mean.shape = ir.Shape(sizes)
        part = self.add(mean.producer(), "Sub", [value, mean], value, "centred")
        out = self.codes(self.clipped(part, value, spec), value, spec)
        self.behind_product(value, out, uses, 1, ("Add", mean, "mean_restored"))

    def behind_product(
        self,
        value: ir.Value,
        out: ir.Value,
        uses: list[tuple[ir.Node, int]],
        index: int,
        restore: tuple[str, ir.Value, str],
    ) -> None:
        """Let products that read ``value`` as input ``index`` read ``out``, and restore behind
        them (an op, its other input, a suffix); other readers get ``out`` with that done."""
        op, other, suffix = restore
        products = [use for use in uses if is_product(use[0]) and use[1] == index]
        plain = [use for use in uses if use not in products]
        for node, _ in products:
            result = self.renormalized.get(node.outputs[0], node.outputs[0])
            readers = list(consumers(result))
            back = self.add(result.producer(), op, [result, other], result, suffix)
            self.renormalized[node.outputs[0]] = back
            self.redirect(result, readers, back)
        self.redirect(value, products, out, outputs=False)
        if plain or value.is_graph_output():
            real = self.add(out.producer(), op, [out, other], value, suffix)
            self.redirect(value, plain, real)

    def redirect(
        self,
        value: ir.Value,
        uses: list[tuple[ir.Node, int]],
        new: ir.Value,
        outputs: bool = True,
    ) -> None:
        for node, index in uses:
            node.replace_input_with(index, new)
        if outputs and value.is_graph_output():
            position = list(self.graph.outputs).index(value)
            self.graph.outputs[position] = new
            old = value.name
            value.name = self.unique(f"{old}_float")
            new.name = old

    def uniform(self, value: ir.Value, spec: TensorSpec, place: Place | None) -> ir.Value:
        """[Mul 1/f] → [Clip] → QuantizeLinear → DequantizeLinear; still divided by f."""
        current = value
        if spec.factor is not None and place is not None and place.before == "mul":
            inverse = self.constant(f"{value.name}_inverse_factor", 1 / spec.factor)
            current = self.add(value.producer(), "Mul", [value, inverse], value, "scaled")
        current = self.clipped(current, value, spec)
        return self.codes(current, value, spec)

    def clipped(self, current: ir.Value, value: ir.Value, spec: TensorSpec) -> ir.Value:
        """A Clip to the codes' range where they have less bits than their type."""
        low, high = spec.rule.limits
        if spec.rule.bits < 8:
            zero, step = int(spec.zero_point), float(spec.scale)
            bounds: list[ir.Value | None] = [
                self.constant(f"{value.name}_clip", np.float32((edge - zero) * step))
                for edge in (low, high)
            ]
            anchor = current.producer()
            current = self.add(anchor, "Clip", [current, *bounds], value, "clipped")
        return current

    def codes(self, current: ir.Value, value: ir.Value, spec: TensorSpec) -> ir.Value:
        """QuantizeLinear → DequantizeLinear behind ``current``, named after ``value``."""
        scale = self.constant(f"{value.name}_scale", np.asarray(spec.scale, np.float32))
        point = stored_zero_point(spec)
        zero_point = self.constant(f"{value.name}_zero_point", point)
        dtype = ir.DataType.from_numpy(point.dtype)
        return self.chain(
            current,
            [
                ("QuantizeLinear", [scale, zero_point], "quantized", dtype),
                ("DequantizeLinear", [scale, zero_point], "dequantized", None),
            ],
            value,
        )

    def log2(self, value: ir.Value, spec: TensorSpec) -> ir.Value:
        """LIS codes by division, rounding and logarithm, then their values from a table."""
        bits = spec.rule.bits
        top = top_code(bits)
        one = self.constant(f"{value.name}_one", np.float32(1))
        t = self.add(value.producer(), "Div", [one, value], value, "reciprocal")
        threshold = self.constant(f"{value.name}_threshold", np.float32(THRESHOLD))
        to_log2 = self.constant(f"{value.name}_log2e", np.float32(1 / math.log(2)))
        zero = self.constant(f"{value.name}_zero", np.float32(0))
        last = self.constant(f"{value.name}_top", np.float32(top))
        level = self.chain(
            t,
            [
                ("Round", [], "rounded", None),
                ("Mul", [threshold], "threshold_scaled", None),
                ("Log", [], "log", None),
                ("Mul", [to_log2], "log2", None),
                ("Floor", [], "floor", None),
                ("Clip", [zero, last], "level", None),
            ],
            value,
        )
        codes = self.add(
            level.producer(),
            "Cast",
            [level],
            value,
            "quantized",
            ir.DataType.UINT8,
            {"to": int(ir.DataType.UINT8)},
        )
        index = self.add(
            codes.producer(),
            "Cast",
            [codes],
            value,
            "index",
            ir.DataType.INT32,
            {"to": int(ir.DataType.INT32)},
        )
        table = self.constant(
            f"{value.name}_levels", log2_values(np.arange(top + 1, dtype=np.int32), bits)
        )
        return self.add(index.producer(), "Gather", [table, index], value, "dequantized")

    # --- factors ------------------------------------------------------------------------

    def divide(self, place: Place, factor: Factor) -> None:
        """Put 1/f into the op that makes the tensor, as decided."""
        node = place.node
        if place.before == "norm" and node is not None:
            for index in (1, 2):
                old = node.inputs[index] if len(node.inputs) > index else None
                if old is not None and old.const_value is not None:
                    new = old.const_value.numpy() / factor
                    node.replace_input_with(index, self.constant(f"{old.name}_scaled", new))
        if place.columns is not None:
            linear, channels = place.columns.node, place.columns.index.ravel()
            weight = linear.inputs[1]
            if weight is not None and weight.shape is not None:
                width = weight.shape.numpy()[1 if is_linear(linear) else 0]
                scale = self.columns.setdefault(linear, np.ones(width, np.float32))
                scale[channels] = factor.ravel()

    def split_readers(
        self, value: ir.Value, use: tuple[ir.Node, int], out: ir.Value, place: Place
    ) -> None:
        """Give readers that take the scaled tensor, behind layout ops that others share, layout
        ops of their own on ``out``."""
        if not is_layout(use[0]) or use[1] != 0:
            return
        for node, index in leaves(use):
            steps = way(value, node.inputs[index])
            if (node, index) not in place.behind or steps is None:
                continue
            current = out
            for step, position in steps:
                copy = ir.node(
                    step.op_type,
                    [current, *step.inputs[1:]],
                    name=self.unique(f"{step.name}_scaled"),
                    num_outputs=len(step.outputs),
                )
                copy.attributes.update({a.name: a for a in step.attributes.values()})
                for new, old in zip(copy.outputs, step.outputs, strict=True):
                    new.name = self.unique(f"{old.name}_scaled")
                    new.shape, new.type = old.shape, old.type
                self.graph.insert_before(step, copy)
                current = copy.outputs[position]
            node.replace_input_with(index, current)

    # --- weights and products -----------------------------------------------------------

    def linear(self, node: ir.Node) -> None:
        """Quantized weight codes and DequantizeLinear in place of the float weight."""
        weight = node.inputs[1]
        columns = self.columns.get(node)
        if weight is None or weight.const_value is None:
            return
        spec = self.specs.get(str(weight.name))
        if columns is not None:
            self.scale_bias(node, columns)
        if spec is None:
            if columns is not None:
                scaled = weight.const_value.numpy() / columns
                node.replace_input_with(1, self.constant(f"{weight.name}_scaled", scaled))
            return
        self.keep_from_gemm(node)
        if spec.rule.block_size:
            node.replace_input_with(1, self.weight(node, weight, spec))
            return
        scale = np.asarray(spec.scale if columns is None else spec.scale / columns, np.float32)
        if spec.factor is not None and (node, 0) not in self.factors.taken:
            real = self.weight(node, weight, spec, scale)
            factor = self.constant(f"{weight.name}_factor", spec.factor)
            real = self.add(real.producer(), "Mul", [real, factor], weight, "rescaled")
        elif reads_codes(node.inputs[0]):
            real = self.weight(node, weight, spec, scale)
        else:
            # A float product: the scale goes into a Mul, or ONNX Runtime would make a
            # MatMulNBits of it, which rounds the float input to 8 bits (measured, 1.31).
            by = self.constant(f"{weight.name}_scale", scale)
            real = self.weight(node, weight, spec, np.array(1, np.float32))
            real = self.add(real.producer(), "Mul", [real, by], weight, "rescaled")
        node.replace_input_with(1, real)

    def convolution(self, node: ir.Node) -> None:
        """As ``linear``: rows are input channels, columns output channels."""
        weight = node.inputs[1]
        columns = self.columns.get(node)
        if weight is None or weight.const_value is None:
            return
        self.codes_at(node)
        spec = self.specs.get(str(weight.name))
        if columns is not None:
            self.scale_bias(node, columns)
        if spec is None:
            if columns is not None:
                scaled = weight.const_value.numpy() / spread(columns, weight)
                node.replace_input_with(1, self.constant(f"{weight.name}_scaled", scaled))
            return
        scale = np.asarray(spec.scale if columns is None else spec.scale / columns, np.float32)
        real = self.weight(node, weight, spec, scale)
        if spec.factor is not None and (node, 0) not in self.factors.taken:
            factor = self.constant(f"{weight.name}_factor", spec.factor)
            real = self.add(real.producer(), "Mul", [real, factor], weight, "rescaled")
        node.replace_input_with(1, real)

    def codes_at(self, node: ir.Node) -> None:
        """The same codes once more in front of a convolution that reads them behind a Split or a
        Slice, over which ONNX Runtime does not move DequantizeLinear. Nothing is rounded twice."""
        read = node.inputs[0]
        before, cut = read, False
        maker = None if before is None else before.producer()
        while maker is not None and is_layout(maker):
            cut = cut or maker.op_type in ("Split", "Slice", "Gather")
            before = maker.inputs[0]
            maker = None if before is None else before.producer()
        if read is None or not cut or maker is None or maker.op_type != "DequantizeLinear":
            return
        scale, zero_point = maker.inputs[1:3]
        if zero_point is None or zero_point.const_value is None:
            return
        steps: list[tuple[str, list[ir.Value | None], str, ir.DataType | None]] = [
            (
                "QuantizeLinear",
                [scale, zero_point],
                "again_quantized",
                zero_point.const_value.dtype,
            ),
            ("DequantizeLinear", [scale, zero_point], "again_dequantized", None),
        ]
        node.replace_input_with(0, self.chain(read, steps, read))

    def scale_bias(self, node: ir.Node, columns: Factor) -> None:
        """Divide the bias, where there is one, like the columns."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            new = self.constant(f"{bias.name}_scaled", bias.const_value.numpy() / columns)
            node.replace_input_with(2, new)

    def keep_from_gemm(self, node: ir.Node) -> None:
        """Give the bias the rank of the output where all sizes are fixed.

        ONNX Runtime would make a Gemm of the product and a bias vector, and compute it in float
        (measured, 1.31); with a dynamic batch it does not.
        """
        shape, bias = node.outputs[0].shape, node.inputs[2] if len(node.inputs) > 2 else None
        if shape is None or bias is None or bias.const_value is None:
            return
        if all(isinstance(d, int) for d in shape) and len(shape) > 2:
            array = bias.const_value.numpy().reshape(*[1] * (len(shape) - 1), -1)
            node.replace_input_with(2, self.constant(f"{bias.name}_ranked", array))

    def weight(
        self, node: ir.Node, weight: ir.Value, spec: TensorSpec, scale: Factor | None = None
    ) -> ir.Value:
        """DequantizeLinear of the weight's codes, before ``node``, by the spec's scale or by
        ``scale`` ([] or along the spec's axis). Weights are symmetric, zero point 0, but for
        those in blocks, whose codes are uint4."""
        if weight.const_value is None:
            return weight
        codes = quantize(np.asarray(weight.const_value.numpy(), np.float32), spec)
        scale = np.asarray(spec.scale, np.float32) if scale is None else scale
        rule, zero = spec.rule, np.zeros(scale.shape, np.int8)
        if rule.code == "e4m3":
            zero = zero.view(ml_dtypes.float8_e4m3fn)
        elif rule.block_size:
            zero = np.asarray(spec.zero_point, ir.DataType.UINT4.numpy())
        stored = codes.astype(np.uint8 if rule.code == "e4m3" else zero.dtype).view(zero.dtype)
        inputs: list[ir.Value | None] = [
            self.constant(f"{weight.name}_quantized", stored),
            self.constant(f"{weight.name}_scale", scale),
            self.constant(f"{weight.name}_zero_point", zero),
        ]
        attributes = {} if scale.ndim == 0 or spec.axis is None else {"axis": spec.axis}
        if spec.rule.block_size:
            attributes["block_size"] = spec.rule.block_size
        previous = ir.node(
            "DequantizeLinear",
            inputs,
            attributes,
            name=self.unique(f"{weight.name}_dequantize"),
            num_outputs=1,
        )
        output = previous.outputs[0]
        output.name = self.unique(f"{weight.name}_dequantized")
        output.shape, output.type = weight.shape, weight.type
        self.graph.insert_before(node, previous)
        return output

    def renormalize(self, attention: ir.Value) -> None:
        """Divide A·V by the row sums of the log2 levels, which do not sum to one."""
        for node, index in list(consumers(attention)):
            if not is_product(node) or index != 0:
                continue
            out = node.outputs[0]
            uses = list(consumers(out))
            axes = self.constant(f"{out.name}_last_axis", np.array([-1], np.int64))
            total = self.add(node, "ReduceSum", [attention, axes], out, "row_sum")
            total.shape = None
            quotient = self.add(total.producer(), "Div", [out, total], out, "renormalized")
            self.renormalized[out] = quotient
            self.redirect(out, uses, quotient)

    def run(self) -> None:
        nodes = list(self.graph)
        values = [*self.graph.inputs, *(v for node in nodes for v in node.outputs)]
        self.names.update(str(v.name) for v in [*values, *self.graph.initializers.values()])
        quantized = quantized_values(self.graph, self.specs)
        self.factors = plan_factors(self.graph, self.specs)
        for value, place in self.factors.places.items():
            factor = quantized[value].factor
            if factor is not None:
                self.divide(place, factor)
        for value, spec in quantized.items():
            place_of = self.factors.places.get(value)
            self.activation(self.renormalized.get(value, value), spec, place_of)
        for node in nodes:
            if is_linear(node):
                self.linear(node)
            elif is_convolution(node):
                self.convolution(node)
            else:
                self.constants(node)

    def constants(self, node: ir.Node) -> None:
        """Quantized constants that are added to activations."""
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or is_layout(node):
                continue
            spec = self.specs.get(str(value.name))
            if spec is None:
                continue
            real = self.weight(node, value, spec)
            if spec.factor is not None:
                factor = self.constant(f"{value.name}_factor", spec.factor)
                real = self.add(real.producer(), "Mul", [real, factor], value, "rescaled")
            node.replace_input_with(index, real)


def stored_zero_point(spec: TensorSpec) -> NDArray[Any]:
    """The zero point of an activation in the file, in the type of the stored codes.

    Where that is uint8, signed codes are stored 128 higher, zero point included: the same
    numbers, in the type that ONNX Runtime's x86 kernels want. It would convert int8 by itself, but
    then rejects its own graph from opset 21 on (measured with 1.31: the QuantizeLinear that it
    moves over a Transpose keeps output_dtype INT8).
    """
    if spec.rule.code == "e4m3":
        return np.zeros(spec.zero_point.shape, ml_dtypes.float8_e4m3fn)
    if spec.rule.stored == "int8":
        return np.asarray(spec.zero_point).astype(np.int8)
    shift = 128 if spec.rule.signed else 0
    return np.asarray(spec.zero_point + shift).astype(np.uint8)


def reads_codes(value: ir.Value | None) -> bool:
    """True where a product's input comes straight from DequantizeLinear, but for layout ops."""
    node = None if value is None else value.producer()
    while node is not None and is_layout(node):
        before = node.inputs[0]
        node = None if before is None else before.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def spread(columns: Factor, weight: ir.Value) -> Factor:
    """[N] against a convolution's weight [N, C, …]."""
    rank = 1 if weight.shape is None else len(weight.shape)
    return columns.reshape(-1, *[1] * (rank - 1))


def lower(model: ir.Model, specs: Mapping[str, TensorSpec]) -> ir.Model:
    """A copy of ``model`` with every tensor of ``specs`` quantized and dequantized.

    The fused linears stay (the caller expands them); everything else is standard ONNX.
    """
    copy = model.clone()
    lowering = _Lowering(copy.graph, specs)
    lowering.run()
    _remove_copies(copy.graph)
    _remove_unused(copy.graph)
    return copy


def _remove_copies(graph: ir.Graph) -> None:
    """Let the readers of copies (``equalization/reads.py``) read what was copied."""
    for node in list(graph):
        read = node.inputs[0] if node.op_type == "Identity" else None
        if read is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(read)
            graph.remove(node, safe=True)


def _remove_unused(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
