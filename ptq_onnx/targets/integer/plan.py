"""The grids of a fused graph's tensors, and what its nodes become in integers.

Grids follow the specs. A linear whose output is quantized behind layout ops (q, k, v out of
a packed linear; patches behind the Concat with the class token) is requantized at once, each
column to the grid of the place where it ends up, so that layout ops move bytes. One whose
output has no spec (proj, fc2, QKᵀ before its scale) leaves its accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.element_map import layout_indices, static_shape
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import consumers, is_constant, is_layout, is_linear, name_of
from ptq_onnx.engine.node_sessions import carried_specs
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.targets.integer.elementwise import Term
from ptq_onnx.targets.integer.fixed_point import MULTIPLIER_BITS, FixedPoint, requantize
from ptq_onnx.targets.integer.grid import Double, Grid, Ints, OpenGrid
from ptq_onnx.targets.integer.products import WEIGHT_ZERO
from ptq_onnx.targets.integer.reasons import of_batch, of_padding, of_weight

BYTE = 255
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

    def __str__(self) -> str:
        read = ", ".join(map(str, self.read))
        return f"{name_of(self.node)}: {type(self.step).__name__} of {read} → {self.made}"


@dataclass(frozen=True, eq=False)
class IntegerPlan:
    """What every compute node of a graph becomes; prints as a line each."""

    specs: Mapping[str, TensorSpec]
    steps: Mapping[ir.Node, Planned]
    """Compute nodes in graph order."""
    left: tuple[ir.Node, ...] = ()
    """Compute nodes that cannot be in integers, where that is allowed."""
    image: TensorSpec | None = None
    """How the image is quantized; None where nodes may be left."""
    maps: Mapping[str, Grid] = field(default_factory=dict)
    """Grids of attention maps in codes that A·V divides by the sums of their rows, by tensor."""
    masks: frozenset[ir.Value] = frozenset()
    """Constants that layout ops bring to where they shut logits out."""

    def __str__(self) -> str:
        lines = [str(planned) for planned in self.steps.values()]
        return "\n".join([*lines, *(f"{name_of(node)}: left in float" for node in self.left)])


@dataclass
class Planning:
    """The state of planning one graph, node by node in order (see nodes.py)."""

    model: ir.Model
    specs: Mapping[str, TensorSpec]
    bits: int = MULTIPLIER_BITS
    gelu: str = "table"
    left: list[ir.Node] = field(default_factory=list)
    """Compute nodes that cannot be in integers, where that is allowed."""
    steps: dict[ir.Node, Planned] = field(default_factory=dict)
    """Compute nodes in graph order."""
    accumulators: dict[ir.Value, tuple[Grid, int]] = field(default_factory=dict)
    """Outputs without a grid of their own: theirs, and the largest magnitude."""
    maps: dict[str, Grid] = field(default_factory=dict)
    derived: dict[ir.Value, Grid] = field(default_factory=dict)
    """Grids of codes that have no spec: of scaled ones, of logits some of which are shut out, and
    of masks."""
    masks: frozenset[ir.Value] = frozenset()
    """Constants that layout ops bring to where they shut logits out."""

    def __post_init__(self) -> None:
        self.carried = carried_specs(self.model, self.specs)

    def image_spec(self) -> TensorSpec:
        """How the image is quantized: its own spec, or that of the one place where layout ops
        bring it (patches cut by Reshape). Raises ModelError."""
        image = image_input(self.model)
        found = [self.specs[str(image.name)]] if str(image.name) in self.specs else []
        found = found or [spec for _, spec in places(image, self.specs)]
        if len(found) != 1 or found[0].factor is not None:
            raise ModelError(f"Input '{image.name}': the integer target needs one scale for it.")
        return found[0]

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
        if value in self.derived:
            return self.derived[value]
        name = str(value.name)
        origin = self.carried[name][0] if name in self.carried else name
        if origin in self.maps:
            return self.maps[origin]
        spec = self.spec_of(value)
        if spec is None:
            raise refusal(node, f"its input '{name}' stays in float")
        return Grid.of(spec)

    def byte(self, node: ir.Node, index: int) -> Grid:
        """The grid of an input whose codes must be bytes."""
        grid = self.read(node, index)
        if not grid.accumulator and grid.high - min(grid.low, 0) > BYTE:
            raise refusal(
                node,
                f"its input '{named(node, index)}' has codes of more than 8 bits, and integer"
                " kernels and tables take bytes; 16 bits are for the residual stream and what norms"
                " read, as --more-bits residual1=16 gives them",
            )
        return grid

    def scalar(self, node: ir.Node, grid: Grid, index: int) -> None:
        """Refuse a per-channel grid where one scale is needed."""
        if grid.scale.ndim:
            raise refusal(node, f"its input {index} has a factor per channel")

    def target(self, output: ir.Value, axis: int) -> Grid | None:
        """The grid that a node's output is to have along ``axis``; None: an accumulator."""
        spec = self.specs.get(str(output.name))
        if spec is not None:
            return Grid.of(spec)
        found_at = list(places(output, self.specs))
        if not found_at:
            return None
        shape = static_shape(output)
        if shape is None:
            raise ModelError(f"Tensor '{output.name}': the number of channels is not known.")
        scale, zero = np.zeros(shape[axis]), np.zeros(shape[axis], np.int64)
        found: list[tuple[Ints, Grid]] = []
        for place, spec in found_at:
            channel, grid = self._channels(output, place, shape, axis), Grid.of(spec)
            if not fits(grid.scale.shape, channel.shape):
                raise refusal(
                    producer(output),
                    f"its output is reshaped before '{place.name}' is quantized per channel",
                )
            scale[channel] = np.broadcast_to(grid.scale, channel.shape)
            zero[channel] = np.broadcast_to(grid.zero, channel.shape)
            found.append((channel, grid))
        low, high = found_at[0][1].rule.limits
        for channel, grid in found:
            same = (grid.low, grid.high) == (low, high)
            if (
                not same
                or np.any(scale[channel] != grid.scale)
                or np.any(zero[channel] != grid.zero)
            ):
                reason = of_padding(output)
                if reason is not None:
                    raise refusal(producer(output), reason)
                raise ModelError(
                    f"Tensor '{output.name}': one of its channels is quantized in two ways."
                )
        if not bool(np.all(scale > 0)):
            raise ModelError(f"Tensor '{output.name}': some of its channels stay in float.")
        form = (-1,) + (1,) * (len(shape) - 1 - axis % len(shape))
        return Grid(scale.reshape(form), zero.reshape(form), low, high)

    def _channels(self, output: ir.Value, place: ir.Value, shape: list[int], axis: int) -> Ints:
        """Which channel of ``output`` each element of ``place`` is, behind layout ops."""
        indices = layout_indices(output, place)
        if indices is None:
            raise refusal(
                producer(output),
                of_padding(output)
                or f"its output is reshaped before '{place.name}', or joined there with other"
                " values or by sizes that are not fixed",
            )
        reason = of_batch(image_input(self.model))
        if reason is not None:
            raise refusal(producer(output), reason)
        return np.unravel_index(indices, shape)[axis]

    def moved(self, node: ir.Node) -> None:
        """Let accumulators and derived codes keep their grid through a layout op, where all that
        it moves has the same."""
        data = [v for v in node.inputs if v is not None and not is_constant(v)]
        data = data if node.op_type == "Concat" else data[:1]
        if not data:
            return
        grid, sums = self.derived.get(data[0]), self.accumulators.get(data[0])
        if grid is not None and all(self.derived.get(v) is grid for v in data):
            self.derived |= dict.fromkeys(node.outputs, grid)
        if sums is not None and all(self.accumulators.get(v) is sums for v in data):
            kept = (out for out in node.outputs if keeps_channels(node, data[0], out))
            self.accumulators |= dict.fromkeys(kept, sums)

    def fixed_mask(self, value: ir.Value | None) -> bool:
        """Whether a mask is a constant; else its constant is noted, and that it is one."""
        if value is None or is_constant(value):
            return True
        self.derived[value] = OpenGrid.of_mask()
        while (node := value.producer()) is not None and is_layout(node):
            assert node.inputs[0] is not None
            value = node.inputs[0]
        self.masks |= {value}
        return False

    def planned(self, node: ir.Node, step: Any, inputs: tuple[int, ...], made: Grid) -> Planned:
        """The node with its step and the grids of the inputs at those positions."""
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

    def weight(self, node: ir.Node) -> tuple[Ints, TensorSpec]:
        """The int8 codes of a product's weight, and its spec."""
        value = node.inputs[1]
        spec = None if value is None else self.specs.get(str(value.name))
        if value is None or value.const_value is None or spec is None:
            raise refusal(node, "its weight stays in float")
        array = np.asarray(value.const_value.numpy(), np.float32)
        return quantize(array, spec).astype(np.int64), spec

    def taken_in(self, node: ir.Node, x: Grid, weight: TensorSpec) -> None:
        """Refuse a weight that has not taken in the factors of what its product reads."""
        scale: Double = x.scale
        if scale.ndim and scale.size == _inputs_of(node):
            ratio = np.asarray(scale.ravel() / x.step, np.float32)
            scale = rows_in_weight(node, ratio).astype(np.float64) * x.step
        factor = np.ones(()) if weight.factor is None else weight.factor.astype(np.float64)
        whole = not (scale.ndim and factor.ndim) or scale.shape == factor.shape
        if x.accumulator or not whole or not np.allclose(scale * factor, x.step, rtol=1e-6, atol=0):
            raise refusal(node, of_weight(node))

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
        if grid.alpha is None or bool(np.any(grid.alpha < 0)):
            raise refusal(node, f"its input '{value.name}' needs power-of-two factors")
        codes, zero = None, grid.zero
        if constant is not None:  # stored as uint8, as weights are
            codes, zero = constant.astype(np.int64) + WEIGHT_ZERO, zero + WEIGHT_ZERO
        term = Term(zero, grid.alpha, widen=True, constant=codes)
        bound = spread(grid) << int(grid.alpha.max())
        step = np.asarray(grid.step * (1.0 if grid.rows is None else grid.rows))
        return term, step, np.zeros(()), bound

    def needed(self, node: ir.Node, axis: int = -1) -> Grid:
        """The grid of an output that must have one, its channels along an axis."""
        made = self.target(node.outputs[0], axis)
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


def _inputs_of(node: ir.Node) -> int:
    """Channels that a linear or a convolution reads; 0 where that is not known."""
    weight = node.inputs[1]
    sizes = [] if weight is None or weight.shape is None else list(weight.shape)
    inside = sizes[0 if is_linear(node) else 1] if len(sizes) > 1 else 0
    groups = 1 if is_linear(node) else node.attributes.get_int("group", 1)
    return groups * inside if isinstance(inside, int) else 0


def places(
    value: ir.Value, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[ir.Value, TensorSpec]]:
    """Where layout ops bring a value to a quantized place. A Concat's place counts at its
    input: both have the same channels."""
    for node, index in consumers(value):
        if not is_layout(node) or node.op_type == "Shape":
            continue
        if index > 0 and node.op_type != "Concat":
            continue
        for out in node.outputs:
            spec = specs.get(str(out.name))
            if spec is None:
                yield from places(out, specs)
            elif node.op_type == "Concat":
                yield value, spec
            else:
                yield out, spec


def keeps_channels(node: ir.Node, value: ir.Value, output: ir.Value) -> bool:
    """Whether a layout op leaves every channel (the last axis) where it is."""
    before, after = static_shape(value), static_shape(output)
    if before is None or after is None or before[-1] != after[-1]:
        return False
    if node.op_type == "Concat":
        return node.attributes.get_int("axis", 0) % len(after) != len(after) - 1
    indices = layout_indices(value, output)
    return indices is not None and bool(np.all(indices % before[-1] == np.arange(after[-1])))


def fits(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """True where an array of that shape broadcasts to the other."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return len(shape) <= len(other) and all(a in (1, b) for a, b in pairs)


def named(node: ir.Node, index: int) -> str:
    """The name of an input."""
    value = node.inputs[index]
    return "" if value is None else str(value.name)


def producer(value: ir.Value) -> ir.Node:
    """The node that makes a value."""
    node = value.producer()
    assert node is not None
    return node


def spread(grid: Grid) -> int:
    """The largest |code - zero|."""
    return int(np.max(np.maximum(np.abs(grid.high - grid.zero), np.abs(grid.low - grid.zero))))


def shape_of(node: ir.Node) -> list[int | str]:
    """The shape of the first input; names for axes that are not known."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        raise refusal(node, "the shape of its input is not known")
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]


def refusal(node: ir.Node, reason: str) -> ModelError:
    """One line that names node and op."""
    return ModelError(f"Node '{name_of(node)}' ({node.op_type}): {reason}.")
