"""The integer form of each kind of node: which step, with which constants.

Raises ModelError, one line that names node and op, for what has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import is_layout, is_linear, is_product, name_of
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.targets.integer.attention import (
    QUOTIENT_BITS,
    AttentionStep,
    LogAttentionStep,
    ShareAttentionStep,
)
from ptq_onnx.targets.integer.elementwise import (
    FUNCTIONS,
    table_step,
)
from ptq_onnx.targets.integer.elementwise_nodes import (
    plan_add,
    plan_batch_norm,
    plan_mean,
    plan_scale,
)
from ptq_onnx.targets.integer.fixed_point import MULTIPLIER_BITS, requantize
from ptq_onnx.targets.integer.gelu import gelu_step
from ptq_onnx.targets.integer.grid import Double, Grid, LogGrid, MaskedGrid, ShareGrid
from ptq_onnx.targets.integer.layer_norm import layer_norm_step
from ptq_onnx.targets.integer.plan import IntegerPlan, Planned, Planning, refusal, shape_of, spread
from ptq_onnx.targets.integer.products import (
    ConvStep,
    LinearStep,
    ProductStep,
    largest_sum,
    scale_of,
)
from ptq_onnx.targets.integer.reasons import INSTEAD, without_form
from ptq_onnx.targets.integer.softmax import Kind, SoftmaxStep

Planner = Callable[[Planning, ir.Node], Planned]


def make_plan(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    *,
    strict: bool = True,
    bits: int = MULTIPLIER_BITS,
    gelu: str = "table",
) -> IntegerPlan:
    """Plan every compute node of a fused graph.

    ``strict``: raises ModelError for a node that cannot be in integers; else it is listed in
    ``left``. ``bits``: width of the fixed-point multipliers. ``gelu``: ``table`` or
    ``polynomial``; raises ModelError for the latter where there is no Gelu.
    """
    plan = Planning(model, specs, bits, gelu)
    if gelu == "polynomial" and not any(node.op_type == "Gelu" for node in model.graph):
        raise ModelError("--gelu polynomial: the model has no GELU; leave the option out.")
    for node in model.graph:
        if is_layout(node) or node.op_type == "Constant":
            plan.moved(node)
            continue
        try:
            planner = planner_of(node)
            if planner is None:
                raise refusal(node, "the integer target has no integer form of this op")
            plan.steps[node] = planner(plan, node)
        except ModelError as error:
            if strict:
                raise ModelError(f"{error}{without_form(model, node, planner_of)}") from error
            plan.left.append(node)
    image = None
    if strict:
        image = plan.image_spec()
        for value in model.graph.outputs:
            if str(value.name) not in specs:
                raise ModelError(f"Output '{value.name}': the integer target needs its scale.")
    return IntegerPlan(specs, plan.steps, tuple(plan.left), image, plan.maps, plan.masks)


def planner_of(node: ir.Node) -> Planner | None:
    """The function for the node's op."""
    if is_linear(node):
        return plan_linear
    if is_product(node):
        return plan_product
    if node.op_type in FUNCTIONS:
        return plan_activation
    return PLANNERS.get(node.op_type)


def plan_linear(plan: Planning, node: ir.Node) -> Planned:
    """x W + b."""
    x = plan.byte(node, 0)
    weight, spec = plan.weight(node)
    plan.taken_in(node, x, spec)
    bias = plan.constant(node, 2)
    step = scale_of(x.step, spec.scale)
    bound = largest_sum(weight, int(x.zero), (x.low, x.high), 1)
    finish, made = plan.accumulate(node, plan.target(node.outputs[0], -1), step, bias, bound)
    return plan.planned(node, LinearStep(weight, int(x.zero), finish), (0,), made)


def plan_conv(plan: Planning, node: ir.Node) -> Planned:
    """A convolution over two axes: the patch embedding, and those of a stem."""
    x = plan.byte(node, 0)
    weight, spec = plan.weight(node)
    plan.taken_in(node, x, spec)
    if weight.ndim != 4:
        raise refusal(node, "only convolutions over two axes are covered")
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise refusal(node, "its padding follows the size of its input (auto_pad)")
    bias = plan.constant(node, 2)
    shape = (-1, 1, 1)
    step = scale_of(x.step, spec.scale.reshape(shape) if spec.scale.ndim else spec.scale)
    pads = tuple(node.attributes.get_ints("pads", [0, 0, 0, 0]))
    bound = largest_sum(weight, int(x.zero), (x.low, x.high), 0, filled=any(pads))
    finish, made = plan.accumulate(
        node,
        plan.target(node.outputs[0], 1),
        step,
        bias.reshape(shape) if bias.ndim else bias,
        bound,
    )
    how = node.attributes
    conv = ConvStep(
        weight,
        int(x.zero),
        finish,
        strides=tuple(how.get_ints("strides", [1, 1])),
        pads=pads,
        dilations=tuple(how.get_ints("dilations", [1, 1])),
        group=how.get_int("group", 1),
    )
    return plan.planned(node, conv, (0,), made)


def plan_product(plan: Planning, node: ir.Node) -> Planned:
    """QKᵀ, or A·V."""
    x, y = plan.byte(node, 0), plan.byte(node, 1)
    made = plan.target(node.outputs[0], -1)
    depth = shape_of(node)[-1]
    if isinstance(x, LogGrid | ShareGrid):
        if made is None:
            raise refusal(node, "its output has no scale")
        if not isinstance(depth, int) or depth * 255 * 255 >= 1 << 31:
            raise refusal(node, "the number of tokens is not known, or beyond 33,000")
        column = column_scale(y.scale)
        if column is None or y.zero.ndim:
            raise refusal(node, "the factors of V vary over the tokens")
        bound = 256 << QUOTIENT_BITS
        finish = requantize([column / (1 << QUOTIENT_BITS)], np.zeros(()), [bound], made, plan.bits)
        zero = int(y.zero)
        step: AttentionStep = (
            LogAttentionStep(1 << x.last, zero, depth, finish)
            if isinstance(x, LogGrid)
            else ShareAttentionStep(x.high, zero, depth, finish)
        )
        return plan.planned(node, step, (0, 1), made)
    scale = product_scale(node, x, y)
    if not isinstance(depth, int):
        raise refusal(node, "the length of its sums is not known")
    bound = depth * spread(x) * spread(y)
    if bound >= 1 << 31:
        raise refusal(node, f"sums of {depth} products overflow 32 bits")
    finish_, made = plan.accumulate(node, made, scale, np.zeros(()), bound)
    return plan.planned(node, ProductStep((int(x.zero), int(y.zero)), finish_), (0, 1), made)


def product_scale(node: ir.Node, x: Grid, y: Grid) -> Double:
    """The real value of one step of x·y: factors inside the sum must cancel, those of the
    columns of y stay."""
    columns = column_scale(y.scale)
    if x.scale.ndim == 0 and columns is not None:
        return np.asarray(x.step * columns, np.float64)
    if x.accumulator or y.accumulator:
        raise refusal(node, "its inputs are not quantized")
    inner = np.swapaxes(np.atleast_2d(y.scale / y.step), -1, -2)
    if not np.allclose(x.scale / x.step * inner, 1, rtol=1e-6, atol=0):
        raise refusal(node, "the factors of its two inputs do not cancel")
    return np.asarray(x.step * y.step, np.float64)


def column_scale(scale: Double) -> Double | None:
    """A scale [.., T, C] that is the same over T (or has no such axis); None otherwise."""
    if scale.ndim < 2 or scale.shape[-2] == 1:
        return scale
    return None


def plan_layer_norm(plan: Planning, node: ir.Node) -> Planned:
    """LayerNormalization."""
    shape = shape_of(node)
    if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
        raise refusal(node, "only the last axis can be normalised")
    term, *_ = plan.term(node, 0)
    read, made = plan.read(node, 0), plan.needed(node)
    if read.accumulator:
        raise refusal(node, "its input is not quantized")
    if term.alpha.ndim > 1:
        raise refusal(node, "its input has factors along another axis than the last")
    channels = shape[-1]
    if not isinstance(channels, int):
        raise refusal(node, "the number of channels is not known")
    gamma = _per_channel(node, plan.constant(node, 1, 1.0), channels)
    beta = _per_channel(node, plan.constant(node, 2), channels)
    epsilon = float(node.attributes.get_float("epsilon", 1e-5))
    step = layer_norm_step(name_of(node), term, read, made, gamma, beta, epsilon, plan.bits)
    return plan.planned(node, step, (0,), made)


def _per_channel(node: ir.Node, array: Double, channels: int) -> Double:
    """A constant of a norm as one number per channel [C]."""
    if array.size != 1 and not (array.size == channels == array.shape[-1]):
        raise refusal(
            node,
            f"its scale or bias {list(array.shape)} is not one number for each of the {channels}"
            f" channels; {INSTEAD}",
        )
    return np.broadcast_to(array.ravel(), (channels,))


def plan_softmax(plan: Planning, node: ir.Node) -> Planned:
    """Softmax, to log2 or uniform codes, or to uniform ones of shares of the row's largest."""
    shape = shape_of(node)
    if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
        raise refusal(node, "only a softmax over the last axis is covered")
    tokens = shape[-1]
    if not isinstance(tokens, int) or tokens > 1 << 15:
        raise refusal(node, "the number of tokens is not known, or beyond 32,768")
    read = plan.byte(node, 0)
    plan.scalar(node, read, 0)
    name = str(node.outputs[0].name)
    spec = plan.specs.get(name)
    if spec is None or read.accumulator:
        raise refusal(node, "its input or output has no scale")
    if spec.rule.bits > 8:
        raise refusal(node, "its output has codes of more than 8 bits; give it 8 at most")
    around = spec.rule.around
    shares = RowMaximum() in around
    kind: Kind = "log2" if spec.rule.code == Log2() else "shares" if shares else "uniform"
    masked = isinstance(read, MaskedGrid)
    step = SoftmaxStep(read.step, tokens, spec.rule.bits, kind, read.high - read.low, masked)
    if kind == "uniform":
        return plan.planned(node, step, (0,), Grid.of(spec))
    if shares and RowSums() not in around:
        raise refusal(node, "its rows are not divided by their sums behind A·V")
    made = ShareGrid.codes(step.top) if shares else LogGrid.codes(step.last)
    plan.maps[name] = made
    return plan.planned(node, step, (0,), made)


def plan_activation(plan: Planning, node: ir.Node) -> Planned:
    """GELU and its like, by table; GELU by polynomial where asked for."""
    read, made = plan.byte(node, 0), plan.needed(node)
    if read.accumulator:
        raise refusal(node, "its input has no scale")
    if node.op_type == "Gelu" and plan.gelu == "polynomial":
        return plan.planned(node, gelu_step(read, made, plan.bits), (0,), made)
    return plan.planned(node, table_step(node, read, made), (0,), made)


PLANNERS: dict[str, Planner] = {
    "Conv": plan_conv,
    "Add": plan_add,
    "Mul": plan_scale,
    "Div": plan_scale,
    "LayerNormalization": plan_layer_norm,
    "Softmax": plan_softmax,
    "ReduceMean": plan_mean,
    "GlobalAveragePool": plan_mean,
    "BatchNormalization": plan_batch_norm,
}
"""Linears, products of activations and activations apart (see :func:`planner_of`)."""
