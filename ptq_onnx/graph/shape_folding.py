"""Shape arithmetic and layout detours, folded by the shapes that inference has found.

Each rule takes the graph and one node, and returns whether it changed something. Dynamic
dimensions are compared by name, so a result never depends on their value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.graph.formula import constant, new_constant, sizes

Dim = int | str


def simplify_layout(graph: ir.Graph) -> int:
    """Apply all rules once to every node; returns the number of changes."""
    rules = (
        _select_from_shape,
        _constant_reshape,
        _expand_for_arithmetic,
        _constant_expand,
        _transpose_detour,
        _empty_pad,
        _softmax_detour,
        _product_detour,
        _split_constant,
    )
    changes = 0
    for node in list(graph):
        changes += any(rule(graph, node) for rule in rules)
    for value in [v for node in graph for v in node.outputs]:
        changes += _slices_to_split(graph, value)
    return changes


def _integers(graph: ir.Graph, name: str, numbers: Sequence[int] | NDArray[np.int64]) -> ir.Value:
    """A new int64 constant."""
    return new_constant(graph, name, np.array(numbers, dtype=np.int64))


def _replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``node``; output, shape and metadata are kept."""
    old, output = node.outputs[0], new.outputs[0]
    output.name, output.type, output.shape = old.name, old.type, old.shape
    new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _select_from_shape(graph: ir.Graph, node: ir.Node) -> bool:
    """Slice or Gather of Shape(x), where the dimensions it takes are static: a constant."""
    if node.op_type not in ("Slice", "Gather") or node.outputs[0].is_graph_output():
        return False
    value = node.inputs[0]
    shape = None if value is None else value.producer()
    if shape is None or shape.op_type != "Shape":
        return False
    dims = sizes(shape.inputs[0])
    arrays = [a for a in map(constant, node.inputs[1:]) if a is not None]
    old = node.outputs[0]
    if dims is None or len(arrays) < len(node.inputs) - 1:
        return False
    if not old.uses() or old.is_graph_output():
        return False
    dims = dims[shape.attributes.get_int("start", 0) : shape.attributes.get_int("end", None)]
    if node.op_type == "Gather":
        taken = np.array(dims, dtype=object)[arrays[0]]
    else:
        start, end, *_ = (int(a.reshape(-1)[0]) for a in arrays)
        step = int(arrays[3].reshape(-1)[0]) if len(arrays) == 4 else 1
        taken = np.array(dims[start:end:step], dtype=object)
    if not all(isinstance(d, int) for d in np.ravel(taken)):
        return False
    old.replace_all_uses_with(_integers(graph, f"{old.name}_folded", taken))
    graph.remove(node, safe=True)
    return True


def _constant_reshape(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape to a computed shape: to a constant one, with 0 or -1 for dynamic dimensions."""
    if node.op_type != "Reshape":
        return False
    if constant(node.inputs[1]) is not None:
        return _drop_allowzero(node)
    data, target = sizes(node.inputs[0]), sizes(node.outputs[0])
    if data is None or target is None or 0 in target:
        return False
    dynamic = [i for i, d in enumerate(target) if isinstance(d, str)]
    copied = [i for i in dynamic if i < len(data) and data[i] == target[i]]
    if len(dynamic) == 1:
        copied = []
    if len(dynamic) - len(copied) > 1:
        return False
    numbers = [0 if i in copied else d if isinstance(d, int) else -1 for i, d in enumerate(target)]
    node.replace_input_with(1, _integers(graph, f"{node.outputs[0].name}_shape", numbers))
    node.attributes.pop("allowzero", None)
    return True


def _drop_allowzero(node: ir.Node) -> bool:
    """``allowzero`` says nothing where the constant shape has no zero."""
    shape = constant(node.inputs[1])
    if "allowzero" not in node.attributes or shape is None or not shape.all():
        return False
    del node.attributes["allowzero"]
    return True


def _constant_expand(graph: ir.Graph, node: ir.Node) -> bool:
    """Expand to a computed shape: to ``Concat(Shape(input)[i], constants)`` at most."""
    if node.op_type != "Expand" or constant(node.inputs[1]) is not None:
        return False
    target = sizes(node.outputs[0])
    if target is None or _is_small(graph, node.inputs[1]):
        return False
    parts: list[ir.Value] = []
    new_nodes: list[ir.Node] = []
    name = node.outputs[0].name
    for dim in target:
        if isinstance(dim, int):
            parts.append(_integers(graph, f"{name}_size", [dim]))
            continue
        source = _input_with(graph, dim)
        if source is None:
            return False
        value, axis = source
        shape = ir.node("Shape", [value], {"start": axis, "end": axis + 1}, name=f"{name}_{dim}")
        shape.outputs[0].shape = ir.Shape([1])
        new_nodes.append(shape)
        parts.append(shape.outputs[0])
    if not new_nodes:
        node.replace_input_with(
            1, _integers(graph, f"{name}_shape", [d for d in target if isinstance(d, int)])
        )
        return True
    new_nodes.append(ir.node("Concat", parts, {"axis": 0}, name=f"{name}_shape"))
    new_nodes[-1].outputs[0].shape = ir.Shape([len(parts)])
    for new in new_nodes:
        new.outputs[0].name = new.name
        new.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph.insert_before(node, new_nodes)
    node.replace_input_with(1, new_nodes[-1].outputs[0])
    return True


BROADCASTING = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max"))


def _expand_for_arithmetic(graph: ir.Graph, node: ir.Node) -> bool:
    """Expand in front of arithmetic that broadcasts to the same shape by itself: gone."""
    if node.op_type != "Expand":
        return False
    output, data = node.outputs[0], node.inputs[0]
    if data is None or output.is_graph_output() or not output.uses():
        return False
    before = sizes(data)
    for use in output.uses():
        others = [v for v in use.node.inputs if v is not output]
        target = sizes(use.node.outputs[0])
        if use.node.op_type not in BROADCASTING or use.node.domain or target is None:
            return False
        widest = [sizes(v) for v in others]
        if before is None or len(before) > len(target) or target not in widest:
            return False
    output.replace_all_uses_with(data)
    graph.remove(node, safe=True)
    return True


def _empty_pad(graph: ir.Graph, node: ir.Node) -> bool:
    """Pad by nothing: gone."""
    if node.op_type != "Pad" or node.outputs[0].is_graph_output() or node.inputs[0] is None:
        return False
    pads = constant(node.inputs[1])
    if pads is None or pads.any():
        return False
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)
    return True


def _softmax_detour(graph: ir.Graph, node: ir.Node) -> bool:
    """Flatten to rows, Softmax over the last axis, Reshape back (opset 11): Softmax alone."""
    if node.op_type != "Softmax":
        return False
    flat = _producer(node.inputs[0], "Reshape") or _producer(node.inputs[0], "Flatten")
    uses = list(node.outputs[0].uses())
    if flat is None or flat.inputs[0] is None or len(uses) != 1:
        return False
    back, data = uses[0].node, flat.inputs[0]
    dims, rows = sizes(data), sizes(flat.outputs[0])
    axis = node.attributes.get_int("axis", -1)
    if back.op_type != "Reshape" or dims is None or rows is None or uses[0].idx != 0:
        return False
    if axis % len(rows) != len(rows) - 1 or rows[-1] != dims[-1] or sizes(back.outputs[0]) != dims:
        return False
    if node.outputs[0].is_graph_output():
        return False
    _replace(graph, back, ir.node("Softmax", [data], {"axis": -1}, name=node.name))
    graph.remove(node, safe=True)
    return True


def _product_detour(graph: ir.Graph, node: ir.Node) -> bool:
    """Flatten to rows, MatMul with a constant, Reshape back (Keras): MatMul alone."""
    weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
    flat = _producer(node.inputs[0], "Reshape") if weight is not None else None
    uses = list(node.outputs[0].uses())
    if weight is None or weight.ndim != 2 or flat is None or flat.inputs[0] is None:
        return False
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx != 0:
        return False
    back, data = uses[0].node, flat.inputs[0]
    dims, rows = sizes(data), sizes(flat.outputs[0])
    if dims is None or rows is None or len(rows) != 2 or node.outputs[0].is_graph_output():
        return False
    if dims[-1] != weight.shape[0] or sizes(back.outputs[0]) != [*dims[:-1], weight.shape[1]]:
        return False
    _replace(graph, back, ir.node("MatMul", [data, node.inputs[1]], name=node.name))
    graph.remove(node, safe=True)
    return True


def _split_constant(graph: ir.Graph, node: ir.Node) -> bool:
    """Split of a constant (packed weights of torch's cross attention): constants."""
    array = constant(node.inputs[0]) if node.op_type == "Split" else None
    if array is None or any(v.is_graph_output() for v in node.outputs):
        return False
    axis, lengths = node.attributes.get_int("axis", 0), None
    if len(node.inputs) > 1:
        lengths = constant(node.inputs[1])
    if lengths is None:
        step = -(-array.shape[axis] // len(node.outputs))
        lengths = np.full(len(node.outputs) - 1, step)
    else:
        lengths = lengths[:-1]
    parts = np.split(array, np.cumsum(lengths.astype(np.int64)), axis=axis)
    for value, part in zip(node.outputs, parts, strict=True):
        value.replace_all_uses_with(new_constant(graph, f"{value.name}_folded", part))
    graph.remove(node, safe=True)
    return True


def _is_small(graph: ir.Graph, value: ir.Value | None) -> bool:
    """True for a Concat of constants and single dimensions of graph inputs."""
    concat = None if value is None else value.producer()
    if concat is None or concat.op_type != "Concat":
        return False
    for part in concat.inputs:
        shape = None if part is None else part.producer()
        if constant(part) is None and (
            shape is None or shape.op_type != "Shape" or shape.inputs[0] not in graph.inputs
        ):
            return False
    return True


def _input_with(graph: ir.Graph, dim: str) -> tuple[ir.Value, int] | None:
    """The graph input, and its axis, that has the dynamic dimension of that name."""
    for value in graph.inputs:
        dims = sizes(value)
        if dims is not None and dim in dims:
            return value, dims.index(dim)
    return None


def _transpose_detour(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape to three dimensions, swap the last two, Reshape back: one Transpose."""
    if node.op_type != "Reshape":
        return False
    swap = _producer(node.inputs[0], "Transpose")
    flat = None if swap is None else _producer(swap.inputs[0], "Reshape")
    if swap is None or flat is None or flat.inputs[0] is None:
        return False
    before, middle = sizes(flat.inputs[0]), sizes(flat.outputs[0])
    after, perm = sizes(node.outputs[0]), swap.attributes.get_ints("perm")
    if before is None or middle is None or after is None or len(before) < 3:
        return False
    rank = len(before)
    if list(perm or ()) != [0, 2, 1] or middle[-2:] != before[-2:]:
        return False
    if after != [*before[:-2], before[-1], before[-2]]:
        return False
    order = [*range(rank - 2), rank - 1, rank - 2]
    _replace(graph, node, ir.node("Transpose", [flat.inputs[0]], {"perm": order}, name=swap.name))
    return True


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _slices_to_split(graph: ir.Graph, value: ir.Value) -> bool:
    """Slices that together cut one axis of ``value`` into consecutive pieces: one Split."""
    by_axis: dict[int, list[tuple[int, int, ir.Node]]] = defaultdict(list)
    dims = sizes(value)
    if dims is None or len(value.uses()) < 2:
        return False
    for use in value.uses():
        piece = _piece(use.node, dims) if use.idx == 0 else None
        if piece is not None:
            by_axis[piece[0]].append((piece[1], piece[2], use.node))
    for axis, pieces in by_axis.items():
        pieces.sort(key=lambda p: p[:2])
        edges = [0, *(end for _, end, _ in pieces)]
        if len(pieces) < 2 or edges[-1] != dims[axis]:
            continue
        if any(start != edge for (start, _, _), edge in zip(pieces, edges, strict=False)):
            continue
        lengths = [end - start for start, end, _ in pieces]
        _split(graph, value, axis, lengths, [node for _, _, node in pieces])
        return True
    return False


def _piece(node: ir.Node, dims: list[Dim]) -> tuple[int, int, int] | None:
    """Axis, start and end of a Slice with constant bounds on one static axis, step 1."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    arrays = [constant(v) for v in node.inputs[1:]]
    if any(a is None or a.size != 1 for a in arrays):
        return None
    start, end, axis, *step = (int(a.reshape(-1)[0]) for a in arrays if a is not None)
    axis %= len(dims)
    size = dims[axis]
    if step not in ([], [1]) or not isinstance(size, int):
        return None
    start, end, _ = slice(start, end).indices(size)
    return (axis, start, end) if start < end else None


def _split(
    graph: ir.Graph, value: ir.Value, axis: int, lengths: list[int], slices: list[ir.Node]
) -> None:
    bounds = _integers(graph, f"{value.name}_split", lengths)
    first = min(slices, key=list(graph).index)
    split = ir.node(
        "Split", [value, bounds], {"axis": axis}, name=first.name, num_outputs=len(slices)
    )
    split.metadata_props.update(first.metadata_props)
    graph.insert_before(first, split)
    for node, output in zip(slices, split.outputs, strict=True):
        old = node.outputs[0]
        output.name, output.type, output.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
