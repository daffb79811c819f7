"""Equal graphs that a runtime computes faster in integers; nothing here depends on data.

* a patch embedding as Reshape → Transpose → Linear: ONNX Runtime leaves a Conv without a
  quantized output in float, a matrix product it does not;
* a packed projection of one pixel as Transpose → Linear → Transpose: the parts are quantized
  apart, so that the Conv has no quantized output either;
* q, k and v as linears of their own: the packed result would be transposed and split as floats;
* the scale of QKᵀ in the weights of q;
* a linear on [batch, C] as one on [batch, 1, C]: ONNX Runtime makes a float Gemm of the other;
* a convolution's padding as a Pad, where its input is to be shifted.

Each function returns how often it fired, leaves alone what it does not recognise, and does
nothing on a second run. Weights are new initializers; the old ones are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.element_map import layout_indices
from ptq_onnx.blocks.roles import (
    consumers,
    is_constant,
    is_layout,
    is_linear,
    is_product,
    name_of,
    source,
    through_layout,
)
from ptq_onnx.fusion.patch_embed import is_patch_embed
from ptq_onnx.graph.formula import constant, new_constant, scalar, unique_name

Array = NDArray[np.float32]
QUERY_COLUMNS = "query_columns"


class _Writer:
    """Puts new nodes in front of an old one; they take over its metadata."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph, self.anchor = graph, anchor

    def node(
        self,
        op: str,
        inputs: list[ir.Value],
        shape: Sequence[int | ir.SymbolicDim],
        like: ir.Value,
        suffix: str,
        domain: str = "",
        **attributes: int | tuple[int, ...],
    ) -> ir.Value:
        name = unique_name(self.graph, f"{like.name}_{suffix}")
        made = ir.node(op, inputs, attributes, domain=domain, name=f"{name}_node")
        output = made.outputs[0]
        output.name, output.type, output.shape = name, like.type, ir.Shape(shape)
        made.metadata_props.update(self.anchor.metadata_props)
        self.graph.insert_before(self.anchor, made)
        return output

    def reshape(
        self,
        value: ir.Value,
        sizes: list[int],
        shape: Sequence[int | ir.SymbolicDim],
        suffix: str,
    ) -> ir.Value:
        target = new_constant(self.graph, f"{value.name}_{suffix}_shape", np.array(sizes, np.int64))
        return self.node("Reshape", [value, target], list(shape), value, suffix)


def patches_as_linear(model: ir.Model) -> int:
    """Write convolutions whose kernel is their stride as products; returns how many."""
    return sum(_patches_as_linear(model.graph, node) for node in list(model.graph))


def _patches_as_linear(graph: ir.Graph, conv: ir.Node) -> bool:
    image = conv.inputs[0]
    weight = constant(conv.inputs[1]) if conv.op_type == "Conv" else None
    if weight is None or image is None or not is_patch_embed(conv) or weight.ndim != 4:
        return False
    tokens = _tokens(conv.outputs[0])
    sides = [] if image.shape is None else list(image.shape)[1:]
    if tokens is None or not all(isinstance(d, int) for d in sides):
        return False
    outputs, channels, kernel_h, kernel_w = weight.shape
    height, width = (d if isinstance(d, int) else 0 for d in sides[1:])
    rows, columns = height // kernel_h, width // kernel_w
    if (rows * kernel_h, columns * kernel_w) != (height, width) or not height * width:
        return False
    assert image.shape is not None
    batch = image.shape[0]
    write = _Writer(graph, conv)
    split = [channels, rows, kernel_h, columns, kernel_w]
    grid = write.reshape(image, [0, *split], [batch, *split], "grid")
    order = (0, 2, 4, 1, 3, 5)
    moved = [batch, *([channels, rows, kernel_h, columns, kernel_w][a - 1] for a in order[1:])]
    turned = write.node("Transpose", [grid], list(moved), image, "turned", perm=order)
    flat = [rows * columns, channels * kernel_h * kernel_w]
    patches = write.reshape(turned, [0, *flat], [batch, *flat], "patches")
    matrix = np.ascontiguousarray(weight.reshape(outputs, -1).T)
    inputs = [patches, new_constant(graph, f"{conv.inputs[1].name}_matrix", matrix)]  # type: ignore[union-attr]
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        inputs.append(conv.inputs[2])
    shape = [batch, rows * columns, outputs]
    result = write.node("Linear", inputs, list(shape), tokens, "linear", "ptq_onnx")
    _describe_node(result, conv)
    wanted = [] if tokens.shape is None else list(tokens.shape)
    if [str(d) for d in wanted[1:]] != [str(d) for d in shape[1:]]:
        sizes = [0, *(int(d) for d in wanted[1:] if isinstance(d, int))]
        result = write.reshape(result, sizes, wanted, "shaped")
    _take_over(graph, tokens, result)
    return True


def packed_pixels_as_linear(model: ir.Model) -> int:
    """Write convolutions of one pixel that several products read parts of as linears; returns how
    many."""
    return sum(_packed_pixels_as_linear(model.graph, node) for node in list(model.graph))


def _packed_pixels_as_linear(graph: ir.Graph, conv: ir.Node) -> bool:
    image, output = conv.inputs[0], conv.outputs[0]
    weight = constant(conv.inputs[1]) if conv.op_type == "Conv" else None
    if weight is None or image is None or weight.shape[2:] != (1, 1) or not _is_pointwise(conv):
        return False
    leaves = list(through_layout(output))
    if len(leaves) < 2 or not all(is_product(node) for node, _ in leaves):
        return False
    if image.shape is None or output.shape is None or output.is_graph_output():
        return False
    write = _Writer(graph, conv)
    batch, channels, height, width = image.shape
    sizes = [batch, height, width]
    turned = write.node("Transpose", [image], [*sizes, channels], image, "last", perm=(0, 2, 3, 1))
    matrix = np.ascontiguousarray(weight[:, :, 0, 0].T)
    inputs = [turned, new_constant(graph, f"{conv.inputs[1].name}_matrix", matrix)]  # type: ignore[union-attr]
    inputs += [bias for bias in conv.inputs[2:] if bias is not None]
    result = write.node("Linear", inputs, [*sizes, len(weight)], output, "linear", "ptq_onnx")
    _describe_node(result, conv)
    order = [batch, len(weight), height, width]
    back = write.node("Transpose", [result], order, output, "first", perm=(0, 3, 1, 2))
    _take_over(graph, output, back)
    return True


def _is_pointwise(conv: ir.Node) -> bool:
    """One group, step 1, nothing padded."""
    get = conv.attributes
    return (
        get.get_int("group", 1) == 1
        and set(get.get_ints("strides", (1,))) == {1}
        and not any(get.get_ints("pads", ()))
    )


def _tokens(value: ir.Value) -> ir.Value | None:
    """The first tensor behind a convolution's output that holds it with channels last.

    None unless a chain of layout ops without side branches leads there.
    """
    if value.shape is None or not all(isinstance(d, int) for d in list(value.shape)[1:]):
        return None
    sizes = [d for d in list(value.shape)[1:] if isinstance(d, int)]
    channels, size = sizes[0], math.prod(sizes)
    images = value.shape[0] if isinstance(value.shape[0], int) else 1
    expected = np.arange(images * size).reshape(images, channels, -1).transpose(0, 2, 1).ravel()
    current = value
    while True:
        uses = list(consumers(current))
        if len(uses) != 1 or current.is_graph_output() or not is_layout(uses[0][0]):
            return None
        node = uses[0][0]
        if node.op_type in ("Concat", "Shape") or len(node.outputs) != 1:
            return None
        current = node.outputs[0]
        found = layout_indices(value, current)
        if found is None or current.shape is None:
            return None
        last = current.shape[-1]
        if last == channels and np.array_equal(found.ravel(), expected):
            return current


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let the readers of ``old`` read ``new``, and drop what nobody reads any more."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node = old.producer()
    while node is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
        before = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
        graph.remove(node, safe=True)
        node = None if before is None else before.producer()


def _describe_node(value: ir.Value, like: ir.Node) -> None:
    node = value.producer()
    if node is not None:
        node.name = like.name or node.name
        like.name = f"{like.name}_replaced"


def fold_attention_scales(model: ir.Model) -> int:
    """Move the scalar behind QKᵀ into the weights of q; returns how many."""
    return sum(_fold_scale(model.graph, node) for node in list(model.graph))


def _fold_scale(graph: ir.Graph, mul: ir.Node) -> bool:
    if mul.op_type != "Mul" or None in mul.inputs:
        return False
    data, number = mul.inputs
    factor = scalar(number)
    product = None if data is None else data.producer()
    if factor is None or product is None or data is None or not is_product(product):
        return False
    if len(data.uses()) != 1 or data.is_graph_output():
        return False
    query = product.inputs[0]
    linear = None if query is None else source(query)
    if query is None or linear is None or not is_linear(linear):
        return False
    columns = own_columns(linear, query)
    if columns is None:
        return False
    scale_columns(graph, linear, columns, np.float64(1 / factor))
    output = mul.outputs[0]
    data.shape, data.type = output.shape, output.type
    name = output.name
    output.replace_all_uses_with(data, replace_graph_outputs=True)
    graph.remove(mul, safe=True)
    data.name = name
    return True


def own_columns(linear: ir.Node, value: ir.Value) -> NDArray[np.int64] | None:
    """The columns of a linear that end up in ``value``, which one node reads, and nowhere else."""
    output = linear.outputs[0]
    if output.is_graph_output() or output.shape is None:
        return None
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    width = output.shape[-1]
    if not isinstance(width, int):
        return None
    mine = columns_of(output, value, width)
    if mine is None:
        return None
    for node, index in through_layout(output):
        read = node.inputs[index]
        if read is value or read is None:
            continue
        other = columns_of(output, read, width)
        if other is None or np.intersect1d(mine, other).size:
            return None
    return mine


def columns_of(start: ir.Value, end: ir.Value, width: int) -> NDArray[np.int64] | None:
    """Sorted last-axis indices of ``start`` that ``end`` holds, or None where unknown."""
    indices = layout_indices(start, end)
    return None if indices is None else np.unique(indices % width)


def scale_columns(
    graph: ir.Graph,
    linear: ir.Node,
    columns: NDArray[np.int64],
    factor: NDArray[np.float64] | np.float64,
    shift: NDArray[np.float64] | np.float64 | None = None,
) -> None:
    """Columns of the linear's output become (y - shift) / factor ([columns] each)."""
    weight = constant(linear.inputs[1])
    if weight is None:
        raise ValueError(f"The weight of '{name_of(linear)}' is no constant.")
    new = weight.astype(np.float64)
    new[:, columns] /= factor
    bias = _bias(linear, weight.shape[1])
    bias[columns] = (bias[columns] - (0 if shift is None else shift)) / factor
    set_linear(graph, linear, new, bias)


def move_rows(
    graph: ir.Graph,
    linear: ir.Node,
    factor: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> None:
    """The linear for inputs that have become (x - shift) / factor ([K] each)."""
    weight = constant(linear.inputs[1])
    if weight is None:
        raise ValueError(f"The weight of '{name_of(linear)}' is no constant.")
    old = weight.astype(np.float64)
    bias = _bias(linear, weight.shape[1]) + shift @ old
    set_linear(graph, linear, old * factor[:, None], bias)


def move_input_channels(
    graph: ir.Graph, conv: ir.Node, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """The convolution for images that have become (x - shift) / factor ([channels] each).

    A shift is exact only where nothing is padded: padding stays zero, which then stands for
    ``shift``. Raises ValueError there; :func:`pad_apart` takes the padding out.
    """
    weight = constant(conv.inputs[1])
    if weight is None:
        raise ValueError(f"The weight of '{name_of(conv)}' is no constant.")
    if np.any(shift) and pads_of(conv) != 0:
        raise ValueError(f"'{name_of(conv)}' pads with zeros, which a shift would move.")
    old = weight.astype(np.float64)
    bias = np.zeros(len(old))
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = np.array(constant(conv.inputs[2]), np.float64)
    # Channels that each output reads, [O, C / groups]: those of its group
    groups = conv.attributes.get_int("group", 1)
    read = np.arange(len(factor)).reshape(groups, -1).repeat(len(old) // groups, axis=0)
    spread = (*read.shape, *(1,) * (old.ndim - 2))
    bias = bias + np.sum(old * shift[read].reshape(spread), axis=tuple(range(1, old.ndim)))
    set_linear(graph, conv, old * factor[read].reshape(spread), bias)


def pads_of(conv: ir.Node) -> tuple[int, ...] | int | None:
    """What a convolution pads, begins then ends; 0 where nothing; None where that is not known."""
    attributes = conv.attributes
    auto = attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(attributes.get_ints("pads", ()))
    if auto == "VALID" or (auto == "NOTSET" and not any(pads)):
        return 0
    return pads if auto == "NOTSET" else _same_pads(conv, upper=auto == "SAME_UPPER")


def _same_pads(conv: ir.Node, *, upper: bool) -> tuple[int, ...] | int | None:
    """The pads of ``auto_pad`` SAME: as many outputs as input / stride, rounded up."""
    image, weight = conv.inputs[0], constant(conv.inputs[1])
    sides = [] if image is None or image.shape is None else list(image.shape)[2:]
    if weight is None or not sides or not all(isinstance(d, int) for d in sides):
        return None
    ones = (1,) * len(sides)
    strides = conv.attributes.get_ints("strides", ones)
    dilations = conv.attributes.get_ints("dilations", ones)
    begins, ends = [], []
    for side, kernel, stride, step in zip(sides, weight.shape[2:], strides, dilations, strict=True):
        assert isinstance(side, int)
        reach = (-(-side // stride) - 1) * stride + (kernel - 1) * step + 1
        total = max(reach - side, 0)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return (*begins, *ends) if any(begins) or any(ends) else 0


def pad_apart(graph: ir.Graph, conv: ir.Node, value: ir.Value) -> ir.Value | None:
    """Let a Pad do what the convolution pads of ``value``, its input; returns what it reads then.

    None where the padding is not known; the graph is then as it was.
    """
    pads = pads_of(conv)
    if pads is None or value.shape is None:
        return None
    if isinstance(pads, int):
        return value
    axes = len(pads) // 2
    begins, ends = pads[:axes], pads[axes:]
    wide = [
        d + low + high if isinstance(d, int) else ir.SymbolicDim(None)
        for d, low, high in zip(list(value.shape)[2:], begins, ends, strict=True)
    ]
    sizes = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
    constant_pads = new_constant(graph, f"{value.name}_pads", sizes)
    write = _Writer(graph, conv)
    shape = [*list(value.shape)[:2], *wide]
    made = write.node("Pad", [value, constant_pads], shape, value, "padded")
    conv.replace_input_with(0, made)
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    return made


def _bias(linear: ir.Node, width: int) -> NDArray[np.float64]:
    found = constant(linear.inputs[2]) if len(linear.inputs) > 2 else None
    return np.zeros(width) if found is None else np.array(found, np.float64)


def set_linear(
    graph: ir.Graph, linear: ir.Node, weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> None:
    """Give a linear a weight and a bias of its own, float32."""
    values = [weight.astype(np.float32), bias.astype(np.float32)]
    for index, (array, suffix) in enumerate(zip(values, ("weight", "bias"), strict=True), 1):
        old = linear.inputs[index] if len(linear.inputs) > index else None
        name = f"{name_of(linear)}_{suffix}" if old is None else str(old.name)
        if old is not None and len(old.uses()) == 1:
            old.const_value = ir.tensor(array, name=old.name)
            old.shape = ir.Shape(array.shape)
            continue
        value = new_constant(graph, name, array)
        if old is None and len(linear.inputs) <= index:
            linear.resize_inputs(index + 1)
        linear.replace_input_with(index, value)


def unpack_attention(model: ir.Model) -> int:
    """Split packed q, k, v linears into one linear each; returns how many were packed."""
    return sum(_unpack(model.graph, n) for n in list(model.graph) if is_linear(n))


def _unpack(graph: ir.Graph, linear: ir.Node) -> bool:
    output, weight = linear.outputs[0], constant(linear.inputs[1])
    leaves = list(through_layout(output))
    if weight is None or output.is_graph_output() or len(leaves) < 2:
        return False
    if output.shape is None or len(output.shape) != 3 or not isinstance(output.shape[1], int):
        return False
    reads: list[ir.Value] = []
    for node, index in leaves:
        value = node.inputs[index]
        if not is_product(node) or value is None:
            return False
        if all(value is not other for other in reads):
            reads.append(value)
    plans = [_part(output, value) for value in reads]
    if len(reads) < 2 or any(plan is None for plan in plans):
        return False
    bias = constant(linear.inputs[2]) if len(linear.inputs) > 2 else None
    batch, tokens = output.shape[0], int(output.shape[1])
    for number, (value, plan) in enumerate(zip(reads, plans, strict=True)):
        assert plan is not None
        columns, order = plan
        heads, width = columns.shape
        write = _Writer(graph, linear)
        flat = columns.ravel()
        name = str(linear.inputs[1].name)  # type: ignore[union-attr]
        data = linear.inputs[0]
        assert data is not None
        part = np.ascontiguousarray(weight[:, flat])
        inputs = [data, new_constant(graph, f"{name}_{number}", part)]
        if bias is not None:
            inputs.append(new_constant(graph, f"{name}_bias_{number}", bias[flat]))
        shape = [batch, tokens, heads * width]
        made = write.node("Linear", inputs, list(shape), output, f"part{number}", "ptq_onnx")
        split = [tokens, heads, width]
        apart = write.reshape(made, [0, *split], [batch, *split], "heads")
        dims = [batch, *split]
        turned = write.node(
            "Transpose", [apart], [dims[a] for a in order], value, "turned", perm=order
        )
        old = value.name
        value.replace_all_uses_with(turned, replace_graph_outputs=True)
        value.name = f"{old}_packed"
        turned.name = old
    _drop_unread(graph, linear)
    return True


def _part(
    output: ir.Value, value: ir.Value
) -> tuple[NDArray[np.int64], tuple[int, int, int, int]] | None:
    """Columns [heads, width] of a packed output in ``value``, and its order of axes.

    ``value`` must be [batch, heads, tokens, width] or [batch, heads, width, tokens].
    """
    if value.shape is None or len(value.shape) != 4 or output.shape is None:
        return None
    indices = layout_indices(output, value)
    if indices is None or indices.shape[0] != 1:
        return None
    tokens, columns = int(output.shape[1]), int(output.shape[2])  # type: ignore[arg-type]
    for order in ((0, 2, 1, 3), (0, 2, 3, 1)):
        # As [heads, tokens, width], whichever way round the last two are.
        found = indices[0] if order[2] == 1 else indices[0].transpose(0, 2, 1)
        if found.shape[1] != tokens:
            continue
        part = found[:, 0] % columns
        expected = np.arange(tokens)[None, :, None] * columns + part[:, None]
        if np.array_equal(found, expected):
            return part, order
    return None


def _drop_unread(graph: ir.Graph, start: ir.Node) -> None:
    """Remove a node and the layout ops behind it, none of which is read any more."""
    behind: list[ir.Node] = []
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.append(node)
            pending.extend(use.node for v in node.outputs for use in v.uses())
    order = {node: i for i, node in enumerate(graph)}
    for node in sorted(behind, key=lambda n: -order[n]):
        graph.remove(node, safe=True)


def keep_rank(model: ir.Model) -> int:
    """Write linears on [batch, C] with an axis of one token; returns how many."""
    return sum(_keep_rank(model.graph, n) for n in list(model.graph) if is_linear(n))


def _keep_rank(graph: ir.Graph, linear: ir.Node) -> bool:
    data, output = linear.inputs[0], linear.outputs[0]
    if data is None or data.shape is None or len(data.shape) != 2 or output.shape is None:
        return False
    write = _Writer(graph, linear)
    axes = new_constant(graph, f"{data.name}_token_axis", np.array([1], np.int64))
    batch, width = data.shape
    token = write.node("Unsqueeze", [data, axes], [batch, 1, width], data, "token")
    linear.replace_input_with(0, token)
    flat = ir.node("Squeeze", [output, axes], name=f"{name_of(linear)}_flat")
    result = flat.outputs[0]
    result.type, result.shape = output.type, output.shape
    name = str(output.name)
    output.shape = ir.Shape([output.shape[0], 1, output.shape[1]])
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    flat.replace_input_with(0, output)
    output.name, result.name = f"{name}_token", name
    graph.insert_after(linear, flat)
    return True
