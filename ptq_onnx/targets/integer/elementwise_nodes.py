"""The integer form of sums, scalings, masks, gates and means (see nodes.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.masks import SHUT_OUT, is_mask, tiled_constant
from ptq_onnx.blocks.walking import consumers, is_constant, is_row_factors
from ptq_onnx.targets.integer.elementwise import GateStep, MaskStep, MeanStep, SameStep, SumStep
from ptq_onnx.targets.integer.fixed_point import requantize
from ptq_onnx.targets.integer.grid import Double, MaskedGrid
from ptq_onnx.targets.integer.plan import Planned, Planning, refusal, shape_of


def plan_add(plan: Planning, node: ir.Node) -> Planned:
    """Position embedding and residual; a mask."""
    if is_mask(node):
        return plan_mask(plan, node)
    parts = [plan.term(node, i) for i in range(2)]
    free = tuple(i for i, part in enumerate(parts) if part[0].constant is None)
    made = plan.needed(node)
    finish = requantize(
        [step for _, step, _, _ in parts],
        np.asarray(sum(offset for _, _, offset, _ in parts)),
        [bound for *_, bound in parts],
        made,
        plan.bits,
    )
    return plan.planned(node, SumStep(tuple(p[0] for p in parts), finish), free, made)


def plan_mask(plan: Planning, node: ir.Node) -> Planned:
    """Logits, some of which a constant shuts out."""
    arrays = [None if v is None else tiled_constant(v) for v in node.inputs]
    index = next((i for i, array in enumerate(arrays) if array is not None), None)
    if index is None or node.outputs[0].name in plan.specs:
        raise refusal(node, "only a mask that is constant, and is not quantized, is covered")
    array = np.asarray(arrays[index], np.float64)
    shut = array <= SHUT_OUT
    if np.any(array[~shut]) or shut.all(axis=-1).any():
        raise refusal(node, "only a mask of zeros and of what shuts out part of a row is covered")
    fixed = plan.fixed_mask(node.inputs[index])
    read = plan.byte(node, 1 - index)
    plan.scalar(node, read, 1 - index)
    if read.accumulator or read.low < 0:
        raise refusal(node, "its input is not quantized in unsigned codes")
    made = MaskedGrid.of_codes(read)
    plan.derived[node.outputs[0]] = made
    if fixed:
        return plan.planned(node, MaskStep(1 - shut.astype(np.int64)), (1 - index,), made)
    return plan.planned(node, MaskStep(None), (1 - index, index), made)


def plan_scale(plan: Planning, node: ir.Node) -> Planned:
    """Mul or Div by a constant: 1/√d on QKᵀ, LayerScale; Mul of two activations."""
    if node.op_type == "Mul" and not any(map(is_constant, node.inputs)):
        return plan_gate(plan, node)
    index = next((i for i, v in enumerate(node.inputs) if is_constant(v)), None)
    if index is None or (node.op_type == "Div" and index == 0):
        raise refusal(node, "only scaling by a constant is covered")
    number = plan.constant(node, index)
    rows = is_row_factors(node)
    if number.ndim and any(d != 1 for d in number.shape[:-1]) and not rows:
        raise refusal(node, "its constant is neither a scalar nor a vector of channels")
    if not rows:
        number = number.reshape(-1) if number.size > 1 else number.reshape(())
    by = number if node.op_type == "Mul" else 1 / number
    read = plan.read(node, 1 - index)
    if plan.target(node.outputs[0], -1) is None and not read.accumulator and not by.ndim and by > 0:
        made = replace(read, scale=read.scale * by, step=read.step * float(by))
        plan.derived[node.outputs[0]] = made
        return plan.planned(node, SameStep(), (1 - index,), made)
    if rows and plan.target(node.outputs[0], -1) is None:
        return plan_rows(plan, node, 1 - index, by)
    term, step, offset, bound = plan.term(node, 1 - index)
    made = plan.needed(node)
    finish = requantize([step * by], offset * by, [bound], made, plan.bits)
    return plan.planned(node, SumStep((term,), finish), (1 - index,), made)


def plan_rows(plan: Planning, node: ir.Node, index: int, by: Double) -> Planned:
    """Factors of rows [1, T, 1] on a tensor that is rounded later on, in the sum that reads it:
    integers stay as they are, each row on a grid of its own."""
    if any(reader.op_type != "Add" for reader, _ in consumers(node.outputs[0])):
        raise refusal(node, "factors of rows are covered in front of a sum alone")
    read = plan.read(node, index)
    made = replace(read, scale=read.scale * by, offset=read.offset * by, rows=by)
    value, output = node.inputs[index], node.outputs[0]
    assert value is not None
    if value in plan.accumulators:
        plan.accumulators[output] = made, plan.accumulators[value][1]
    else:
        plan.derived[output] = made
    return plan.planned(node, SameStep(), (index,), made)


def plan_gate(plan: Planning, node: ir.Node) -> Planned:
    """Mul of two activations: a gate."""
    parts = [plan.term(node, i) for i in range(2)]
    if any(plan.read(node, i).accumulator for i in range(2)):
        raise refusal(node, "its inputs are not quantized")
    (one, step, _, bound), (other, times, _, most) = parts
    made = plan.needed(node)
    finish = requantize([step * times], np.zeros(()), [bound * most], made, plan.bits)
    return plan.planned(node, GateStep((one, other), finish), (0, 1), made)


def plan_mean(plan: Planning, node: ir.Node) -> Planned:
    """Pooling over the tokens; the channels are the last axis that stays."""
    shape = shape_of(node)
    rank = len(shape)
    axes = axes_of(node) if node.op_type == "ReduceMean" else list(range(2, rank))
    over = tuple(sorted(axis % rank for axis in axes))
    channels = max(set(range(rank)) - set(over), default=0)
    if not over or over[0] == 0 or channels == 0:
        raise refusal(node, "only the mean over the tokens is covered")
    sizes = [shape[axis] for axis in over]
    if not all(isinstance(size, int) for size in sizes):
        raise refusal(node, "the number of tokens is not known")
    count = math.prod(int(size) for size in sizes)
    term, step, offset, bound = plan.term(node, 0)
    keep = bool(node.attributes.get_int("keepdims", 1))
    made = plan.needed(node, channels if keep else -1)
    finish = requantize([step / count], offset, [bound * count], made, plan.bits)
    return plan.planned(node, MeanStep(term, over, keep, finish), (0,), made)


def axes_of(node: ir.Node) -> list[int]:
    """The axes of a reduction."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = node.inputs[1].const_value
        return [] if found is None else [int(a) for a in found.numpy()]
    return list(node.attributes.get_ints("axes", []))


def plan_batch_norm(plan: Planning, node: ir.Node) -> Planned:
    """A BatchNormalization that no convolution takes in: a factor and a shift per channel."""
    gamma, beta, mean, variance = (plan.constant(node, i) for i in range(1, 5))
    by = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shape = (-1,) + (1,) * (len(shape_of(node)) - 2)
    term, step, offset, bound = plan.term(node, 0)
    made = plan.needed(node, 1)
    shift = (beta - mean * by).reshape(shape)
    by = by.reshape(shape)
    finish = requantize([step * by], offset * by + shift, [bound], made, plan.bits)
    return plan.planned(node, SumStep((term,), finish), (0,), made)
