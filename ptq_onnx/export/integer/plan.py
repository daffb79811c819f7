"""What each node of a fused graph becomes in integers: its step, and the grids around it.

Grids follow the specs. A linear whose output is quantized behind layout ops (q, k, v out of
a packed linear; patches behind the Concat with the class token) is requantized at once, each
column to the grid of the place where it ends up, so that layout ops move bytes. One whose
output has no spec (proj, fc2, QKᵀ before its scale) leaves its accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks import consumers, is_constant, is_layout, is_linear, is_product, name_of
from ptq_onnx.errors import ModelError
from ptq_onnx.export.integer.attention import QUOTIENT_BITS, AttentionStep
from ptq_onnx.export.integer.elementwise import FUNCTIONS, MeanStep, SumStep, Term, table_step
from ptq_onnx.export.integer.fixed_point import MULTIPLIER_BITS, FixedPoint, requantize
from ptq_onnx.export.integer.grid import Double, Grid, LogGrid
from ptq_onnx.export.integer.layer_norm import layer_norm_step
from ptq_onnx.export.integer.products import (
    WEIGHT_ZERO,
    ConvStep,
    LinearStep,
    ProductStep,
    largest_sum,
    scale_of,
)
from ptq_onnx.export.integer.softmax import SoftmaxStep
from ptq_onnx.kernels import carried_specs
from ptq_onnx.layout import layout_indices
from ptq_onnx.quantizers.uniform import quantize
from ptq_onnx.sites import image_input
from ptq_onnx.spec import TensorSpec

ONE = np.ones((), np.float64)
PLAIN = Term(np.zeros((), np.int64), np.zeros((), np.int64), widen=False)
"""An accumulator as it is."""


@dataclass(frozen=True, eq=False)
class Planned:
    """One compute node: which of its inputs it reads as integers, its step, and the grids."""

    node: ir.Node
    step: Any
    positions: tuple[int, ...]
    read: tuple[Grid, ...]
    made: Grid

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The values at ``positions``."""
        return tuple(v for i in self.positions if (v := self.node.inputs[i]) is not None)


@dataclass
class Plan:
    """Plans the nodes of one graph, in order.

    ``strict``: raises ModelError for a node that cannot be in integers; else lists it in
    ``left``.
    """

    model: ir.Model
    specs: Mapping[str, TensorSpec]
    bits: int = MULTIPLIER_BITS
    strict: bool = True
    left: list[ir.Node] = field(default_factory=list)
    steps: dict[ir.Node, Planned] = field(default_factory=dict)
    """Compute nodes in graph order."""
    accumulators: dict[ir.Value, tuple[Grid, int]] = field(default_factory=dict)
    """Outputs without a grid of their own: theirs, and the largest magnitude."""
    log_grids: dict[str, LogGrid] = field(default_factory=dict)

    def run(self) -> Plan:
        """Plan every node; returns itself."""
        self.carried = carried_specs(self.model, self.specs)
        for node in self.model.graph:
            if is_layout(node) or node.op_type == "Constant":
                continue
            try:
                self.steps[node] = self.planned(node)
            except ModelError:
                if self.strict:
                    raise
                self.left.append(node)
        if self.strict:
            self.check_ends()
        return self

    def check_ends(self) -> None:
        """The image and the outputs must have scales."""
        image = image_input(self.model)
        if str(image.name) not in self.specs:
            raise ModelError(f"Input '{image.name}': the integer target needs its scale.")
        for value in self.model.graph.outputs:
            if str(value.name) not in self.specs:
                raise ModelError(f"Output '{value.name}': the integer target needs its scale.")

    def planned(self, node: ir.Node) -> Planned:
        """The integer form of a compute node. Raises ModelError where there is none."""
        planner = self.planner(node)
        if planner is None:
            raise refusal(node, "the integer target has no integer form of this op")
        return planner(node)

    def planner(self, node: ir.Node) -> Callable[[ir.Node], Planned] | None:
        """The method for the node's op."""
        if is_linear(node):
            return self.linear
        if is_product(node):
            return self.product
        if node.op_type in FUNCTIONS:
            return self.activation
        planners = {
            "Conv": self.conv,
            "Add": self.add,
            "Mul": self.scale,
            "Div": self.scale,
            "LayerNormalization": self.layer_norm,
            "Softmax": self.softmax,
            "ReduceMean": self.mean,
        }
        return planners.get(node.op_type)

    # --- grids --------------------------------------------------------------------------

    def spec_of(self, value: ir.Value) -> TensorSpec | None:
        """The spec of a tensor that a compute node reads, its own or carried by layout ops."""
        name = str(value.name)
        found = self.specs.get(name)
        if found is None and name in self.carried:
            found = self.carried[name][1]
        return found

    def read(self, node: ir.Node, index: int) -> Grid:
        """The grid of an input."""
        value = node.inputs[index]
        assert value is not None
        if value in self.accumulators:
            return self.accumulators[value][0]
        name = str(value.name)
        origin = self.carried[name][0] if name in self.carried else name
        if origin in self.log_grids:
            return self.log_grids[origin]
        spec = self.spec_of(value)
        if spec is None:
            raise refusal(node, f"its input '{name}' stays in float")
        return Grid.of(spec)

    def scalar(self, node: ir.Node, grid: Grid, index: int) -> None:
        """Refuse a per-channel grid where one scale is needed."""
        if grid.scale.ndim:
            raise refusal(node, f"its input {index} has a factor per channel")

    def target(self, output: ir.Value, axis: int) -> Grid | None:
        """The grid that a node's output is to have along ``axis``; None: an accumulator."""
        spec = self.specs.get(str(output.name))
        if spec is not None:
            return Grid.of(spec)
        places = list(self.places(output))
        if not places:
            return None
        if output.shape is None or not isinstance(output.shape[axis], int):
            raise ModelError(f"Tensor '{output.name}': the number of channels is not known.")
        channels = int(output.shape[axis])
        scale, zero = np.zeros(channels), np.zeros(channels, np.int64)
        low, high = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
        for place, spec in places:
            grid = Grid.of(spec)
            indices = layout_indices(output, place)
            if indices is None:
                raise ModelError(f"Tensor '{output.name}': its way to '{place.name}' is dynamic.")
            shape = [1, *(int(d) for d in output.shape[1:])]  # type: ignore[arg-type]
            channel = np.unravel_index(indices, shape)[axis]
            for array, value in (
                (scale, grid.scale),
                (zero, grid.zero),
                (low, np.asarray(grid.low)),
                (high, np.asarray(grid.high)),
            ):
                array[channel] = np.broadcast_to(value, channel.shape)
            if not np.array_equal(scale[channel], np.broadcast_to(grid.scale, channel.shape)):
                raise ModelError(f"Tensor '{place.name}': its factors mix channels.")
        if not bool(np.all(scale > 0)) or len(set(high)) > 1 or len(set(low)) > 1:
            raise ModelError(f"Tensor '{output.name}': some of it is not quantized.")
        form = (-1,) + (1,) * (len(output.shape) - 1 - axis % len(output.shape))
        return Grid(scale.reshape(form), zero.reshape(form), int(low[0]), int(high[0]))

    def places(self, value: ir.Value) -> Iterator[tuple[ir.Value, TensorSpec]]:
        """Where layout ops bring a value to a quantized place. A Concat's place counts at its
        input: both have the same channels."""
        for node, index in consumers(value):
            if not is_layout(node) or node.op_type == "Shape":
                continue
            if index > 0 and node.op_type != "Concat":
                continue
            for out in node.outputs:
                spec = self.specs.get(str(out.name))
                if spec is None:
                    yield from self.places(out)
                elif node.op_type == "Concat":
                    yield value, spec
                else:
                    yield out, spec

    def plan(
        self, node: ir.Node, step: Any, inputs: tuple[int, ...], made: Grid
    ) -> Planned:
        return Planned(node, step, inputs, tuple(self.read(node, i) for i in inputs), made)

    def accumulate(
        self, node: ir.Node, made: Grid | None, step: Double, offset: Double, bound: int
    ) -> tuple[FixedPoint | None, Grid]:
        """How a product ends: requantized to ``made``, or as an accumulator."""
        if made is not None:
            return requantize([step], offset, [bound], made, self.bits), made
        zero = np.zeros((), np.int64)
        grid = Grid(step, zero, -bound, bound, offset=offset, accumulator=True)
        self.accumulators[node.outputs[0]] = grid, bound
        return None, grid

    # --- nodes --------------------------------------------------------------------------

    def weight(self, node: ir.Node) -> tuple[NDArray[np.int64], TensorSpec]:
        value = node.inputs[1]
        spec = None if value is None else self.specs.get(str(value.name))
        if value is None or value.const_value is None or spec is None:
            raise refusal(node, "its weight stays in float")
        array = np.asarray(value.const_value.numpy(), np.float32)
        return quantize(array, spec).astype(np.int64), spec

    def linear(self, node: ir.Node) -> Planned:
        x = self.read(node, 0)
        weight, spec = self.weight(node)
        rows = np.ones(()) if spec.factor is None else spec.factor.astype(np.float64).ravel()
        base = x.step * ONE
        if x.accumulator or not np.allclose(x.scale * rows, base, rtol=1e-6, atol=0):
            raise refusal(node, "its weight does not take the factors of its input")
        bias = self.constant(node, 2)
        step = scale_of(x.step, spec.scale)
        bound = largest_sum(weight, int(x.zero), (x.low, x.high), 1)
        finish, made = self.accumulate(
            node, self.target(node.outputs[0], -1), step, bias, bound
        )
        return self.plan(node, LinearStep(weight, int(x.zero), finish), (0,), made)

    def conv(self, node: ir.Node) -> Planned:
        x = self.read(node, 0)
        self.scalar(node, x, 0)
        weight, spec = self.weight(node)
        kernel = list(weight.shape[2:])
        plain = (
            len(kernel) == 2
            and list(node.attributes.get_ints("strides", [1, 1])) == kernel
            and not any(node.attributes.get_ints("pads", [0]))
            and set(node.attributes.get_ints("dilations", [1])) == {1}
            and node.attributes.get_int("group", 1) == 1
            and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        )
        if not plain:
            raise refusal(node, "only a patch embedding (stride = kernel, no padding) is covered")
        bias = self.constant(node, 2)
        shape = (-1, 1, 1)
        step = scale_of(x.step, spec.scale.reshape(shape) if spec.scale.ndim else spec.scale)
        bound = largest_sum(weight, int(x.zero), (x.low, x.high), 0)
        finish, made = self.accumulate(
            node,
            self.target(node.outputs[0], 1),
            step,
            bias.reshape(shape) if bias.ndim else bias,
            bound,
        )
        return self.plan(node, ConvStep(weight, int(x.zero), finish), (0,), made)

    def product(self, node: ir.Node) -> Planned:
        x, y = self.read(node, 0), self.read(node, 1)
        made = self.target(node.outputs[0], -1)
        depth = node.inputs[0].shape[-1] if node.inputs[0] is not None and node.inputs[0].shape else 0
        if isinstance(x, LogGrid):
            if made is None:
                raise refusal(node, "its output has no scale")
            if not isinstance(depth, int) or depth * 255 * 255 >= 1 << 31:
                raise refusal(node, "the number of tokens is not known, or beyond 33,000")
            column = column_scale(y.scale)
            if column is None or y.zero.ndim:
                raise refusal(node, "the factors of V vary over the tokens")
            bound = 256 << QUOTIENT_BITS
            finish = requantize(
                [column / (1 << QUOTIENT_BITS)], np.zeros(()), [bound], made, self.bits
            )
            step = AttentionStep(x.last, int(y.zero), depth, finish)
            return self.plan(node, step, (0, 1), made)
        scale = self.product_scale(node, x, y)
        if not isinstance(depth, int):
            raise refusal(node, "the length of its sums is not known")
        bound = depth * spread(x) * spread(y)
        if bound >= 1 << 31:
            raise refusal(node, f"sums of {depth} products overflow 32 bits")
        finish_, made = self.accumulate(node, made, scale, np.zeros(()), bound)
        return self.plan(
            node, ProductStep((int(x.zero), int(y.zero)), finish_), (0, 1), made
        )

    def product_scale(self, node: ir.Node, x: Grid, y: Grid) -> Double:
        """The real value of one step of x·y: the factors inside the sum must cancel."""
        inner = x.scale / x.step * np.swapaxes(np.atleast_2d(y.scale / y.step), -1, -2)
        if y.scale.ndim and y.scale.shape[-2:-1] in ((), (1,)) and x.scale.ndim == 0:
            return np.asarray(x.step * y.scale, np.float64)  # factors of the columns
        if x.accumulator or y.accumulator or not np.allclose(inner, 1, rtol=1e-6, atol=0):
            raise refusal(node, "the factors of its two inputs do not cancel")
        return np.asarray(x.step * y.step, np.float64)

    def term(self, node: ir.Node, index: int) -> tuple[Term, Double, Double, int]:
        """One addend: its form, its step, its offset and its largest magnitude."""
        value = node.inputs[index]
        assert value is not None
        constant = None
        if is_constant(value):
            spec = self.specs.get(str(value.name))
            if spec is None or value.const_value is None:
                raise refusal(node, f"its constant '{value.name}' stays in float")
            grid = Grid.of(spec)
            constant = quantize(np.asarray(value.const_value.numpy(), np.float32), spec)
        else:
            if value in self.accumulators:
                grid, bound = self.accumulators[value]
                return PLAIN, grid.scale, grid.offset, bound
            grid = self.read(node, index)
        if grid.alpha is None or grid.alpha.ndim > 1 or bool(np.any(grid.alpha < 0)):
            raise refusal(node, f"its input '{value.name}' needs power-of-two factors")
        codes, zero = None, grid.zero
        if constant is not None:  # stored as uint8, as weights are
            codes, zero = constant.astype(np.int64) + WEIGHT_ZERO, zero + WEIGHT_ZERO
        term = Term(zero, grid.alpha, widen=True, constant=codes)
        bound = spread(grid) << int(grid.alpha.max())
        return term, np.asarray(grid.step), np.zeros(()), bound

    def add(self, node: ir.Node) -> Planned:
        parts = [self.term(node, i) for i in range(2)]
        free = tuple(i for i, part in enumerate(parts) if part[0].constant is None)
        made = self.needed(node)
        finish = requantize(
            [step for _, step, _, _ in parts],
            np.asarray(sum(offset for _, _, offset, _ in parts)),
            [bound for *_, bound in parts],
            made,
            self.bits,
        )
        return self.plan(node, SumStep(tuple(p[0] for p in parts), finish), free, made)

    def scale(self, node: ir.Node) -> Planned:
        """Mul or Div by a constant: 1/√d on QKᵀ, LayerScale."""
        index = next((i for i, v in enumerate(node.inputs) if is_constant(v)), None)
        if index is None or (node.op_type == "Div" and index == 0):
            raise refusal(node, "only scaling by a constant is covered")
        number = self.constant(node, index)
        if number.ndim and any(d != 1 for d in number.shape[:-1]):
            raise refusal(node, "its constant is no scalar and no vector of channels")
        number = number.reshape(-1) if number.size > 1 else number.reshape(())
        by = number if node.op_type == "Mul" else 1 / number
        term, step, offset, bound = self.term(node, 1 - index)
        made = self.needed(node)
        finish = requantize([step * by], offset * by, [bound], made, self.bits)
        return self.plan(node, SumStep((term,), finish), (1 - index,), made)

    def mean(self, node: ir.Node) -> Planned:
        axes = self.axes(node)
        value = node.inputs[0]
        assert value is not None and value.shape is not None
        rank = len(value.shape)
        if len(axes) != 1 or axes[0] % rank in (0, rank - 1):
            raise refusal(node, "only the mean over the tokens is covered")
        axis = axes[0] % rank
        count = value.shape[axis]
        if not isinstance(count, int):
            raise refusal(node, "the number of tokens is not known")
        term, step, offset, bound = self.term(node, 0)
        made = self.needed(node)
        finish = requantize([step / count], offset, [bound * count], made, self.bits)
        keep = bool(node.attributes.get_int("keepdims", 1))
        return self.plan(node, MeanStep(term, axis, keep, finish), (0,), made)

    def axes(self, node: ir.Node) -> list[int]:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            found = node.inputs[1].const_value
            return [] if found is None else [int(a) for a in found.numpy()]
        return list(node.attributes.get_ints("axes", []))

    def layer_norm(self, node: ir.Node) -> Planned:
        value = node.inputs[0]
        assert value is not None and value.shape is not None
        if node.attributes.get_int("axis", -1) not in (-1, len(value.shape) - 1):
            raise refusal(node, "only the last axis can be normalised")
        term, *_ = self.term(node, 0)
        read, made = self.read(node, 0), self.needed(node)
        if read.accumulator:
            raise refusal(node, f"its input '{value.name}' is not quantized")
        channels = value.shape[-1]
        if not isinstance(channels, int):
            raise refusal(node, "the number of channels is not known")
        gamma = np.broadcast_to(self.constant(node, 1, 1.0), (channels,))
        beta = np.broadcast_to(self.constant(node, 2), (channels,))
        epsilon = float(node.attributes.get_float("epsilon", 1e-5))
        step = layer_norm_step(
            name_of(node), term, read, made, gamma, beta, epsilon, self.bits
        )
        return self.plan(node, step, (0,), made)

    def softmax(self, node: ir.Node) -> Planned:
        value = node.inputs[0]
        assert value is not None and value.shape is not None
        if node.attributes.get_int("axis", -1) not in (-1, len(value.shape) - 1):
            raise refusal(node, "only a softmax over the last axis is covered")
        tokens = value.shape[-1]
        if not isinstance(tokens, int) or tokens > 1 << 15:
            raise refusal(node, "the number of tokens is not known, or beyond 32,768")
        read = self.read(node, 0)
        self.scalar(node, read, 0)
        name = str(node.outputs[0].name)
        spec = self.specs.get(name)
        if spec is None or read.accumulator:
            raise refusal(node, "its input or output has no scale")
        log2 = spec.rule.code == "log2"
        step = SoftmaxStep(read.step, tokens, spec.rule.bits, log2, read.high - read.low)
        made: Grid = Grid.of(spec)
        if log2:
            self.log_grids[name] = LogGrid.codes(step.last)
            made = self.log_grids[name]
        return self.plan(node, step, (0,), made)

    def activation(self, node: ir.Node) -> Planned:
        read, made = self.read(node, 0), self.needed(node)
        if read.accumulator:
            raise refusal(node, "its input has no scale")
        return self.plan(node, table_step(node, read, made), (0,), made)

    def needed(self, node: ir.Node) -> Grid:
        """The grid of an output that must have one."""
        made = self.target(node.outputs[0], -1)
        if made is None:
            raise refusal(node, f"its output '{node.outputs[0].name}' stays in float")
        return made

    def constant(self, node: ir.Node, index: int, default: float = 0.0) -> Double:
        """The float value of a constant input; ``default`` where it is left out."""
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            return np.asarray(default, np.float64)
        if value.const_value is None:
            raise refusal(node, f"its input '{value.name}' must be a constant")
        return np.asarray(value.const_value.numpy(), np.float64)


def spread(grid: Grid) -> int:
    """The largest |code - zero|."""
    return int(np.max(np.maximum(np.abs(grid.high - grid.zero), np.abs(grid.low - grid.zero))))


def column_scale(scale: Double) -> Double | None:
    """A scale [.., T, C] that is the same over T (or has no such axis); None otherwise."""
    if scale.ndim < 2 or scale.shape[-2] == 1:
        return scale
    return None


def refusal(node: ir.Node, reason: str) -> ModelError:
    """One line that names node and op."""
    return ModelError(f"Node '{name_of(node)}' ({node.op_type}): {reason}.")
