"""Damage, and odd but valid changes, at the level of the graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Graph = onnx.GraphProto
DIMS = (0, -1, 1, 2, 7, 1 << 20, 1 << 40)
UNARY = ("Identity", "Relu", "Neg", "Abs", "Sqrt", "Exp", "Dropout", "Sigmoid", "Softmax", "Erf")
SCALES = (0.0, 1e-30, 1e30, float("nan"), float("inf"), -1.0)


def edit_graph(model: onnx.ModelProto, rng: random.Random, most: int = 2) -> None:
    """One to ``most`` edits."""
    for _ in range(rng.randint(1, most)):
        edit = rng.choice(EDITS)
        if model.graph.node:
            edit(model, rng)


def _names(graph: Graph) -> list[str]:
    outputs = [name for node in graph.node for name in node.output]
    return [v.name for v in graph.input] + [t.name for t in graph.initializer] + outputs


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(list(model.graph.node))


def rewire(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*_names(model.graph), "", "?"])


def swap_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if len(node.input) > 1:
        a, b = rng.sample(range(len(node.input)), 2)
        node.input[a], node.input[b] = node.input[b], node.input[a]


def drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def insert_node(model: onnx.ModelProto, rng: random.Random) -> None:
    at = rng.randrange(len(model.graph.node))
    node = model.graph.node[at]
    if not node.input:
        return
    slot = rng.randrange(len(node.input))
    name = f"between{rng.randrange(1 << 30)}"
    new = helper.make_node(rng.choice(UNARY), [node.input[slot]], [name])
    node.input[slot] = name
    model.graph.node.insert(at, new)


def insert_cast(model: onnx.ModelProto, rng: random.Random) -> None:
    at = rng.randrange(len(model.graph.node))
    node = model.graph.node[at]
    if not node.input:
        return
    slot, name = rng.randrange(len(node.input)), f"cast{rng.randrange(1 << 30)}"
    to = rng.choice((1, 6, 7, 9, 10, 11, 16))
    model.graph.node.insert(at, helper.make_node("Cast", [node.input[slot]], [name], to=to))
    back = f"{name}_back"
    model.graph.node.insert(at + 1, helper.make_node("Cast", [name], [back], to=1))
    model.graph.node[at + 2].input[slot] = back


def change_weight(model: onnx.ModelProto, rng: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(list(model.graph.initializer))
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:  # another damage was first
        return
    if array.dtype.kind == "f" and array.size:
        with np.errstate(all="ignore"):
            if rng.random() < 0.5:
                array.flat[rng.randrange(array.size)] = rng.choice(SCALES)
            else:
                array = (array * np.float32(rng.choice(SCALES))).astype(array.dtype)
    elif array.size:
        array.flat[rng.randrange(array.size)] = rng.choice((0, 1, -1, 2, 100))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    """The dims of a tensor, which then are not those of its data."""
    tensors = [t for t in model.graph.initializer if t.dims]
    if tensors:
        tensor = rng.choice(tensors)
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(DIMS)


def reshape_weight(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another shape of the same data."""
    if model.graph.initializer:
        tensor = rng.choice(list(model.graph.initializer))
        dims = list(tensor.dims)
        rng.shuffle(dims)
        tensor.dims[:] = rng.choice((dims, [1, *dims], [*dims, 1], [int(np.prod(dims))]))


def change_input(model: onnx.ModelProto, rng: random.Random) -> None:
    shape = rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if shape.dim:
        dim = rng.choice(list(shape.dim))
        if rng.random() < 0.5:
            dim.dim_value = rng.choice((*DIMS, 3, 8, 12, 224))
        else:
            dim.dim_param = rng.choice(("", "batch", "h", "N + 1", "\x00"))


def change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    attribute = rng.choice(list(node.attribute))
    if rng.random() < 0.15:
        attribute.ref_attr_name = "alpha"
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice((-3, -2, -1, 0, 1, 2, 3, 100))
    elif attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice((-1, 0, 1, 2, 5))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(SCALES)
    else:
        node.attribute.remove(attribute)


def change_op(model: onnx.ModelProto, rng: random.Random) -> None:
    others = ("Add", "Mul", "Sub", "Div", "MatMul", "Concat", "Gather", "Reshape", "Loop", "Gelu")
    node = _node(model, rng)
    node.op_type = rng.choice((*others, *UNARY))
    node.domain = rng.choice(("", "", "", "com.microsoft", "my"))


def change_opset(model: onnx.ModelProto, rng: random.Random) -> None:
    for opset in model.opset_import:
        opset.version = rng.choice((-1, 0, 1, 7, 11, 13, 17, 18, 20, 22, 23, 24, 25, 99))
    model.ir_version = rng.choice((0, 3, 8, 10, 11, 13, 99))


def move_node(model: onnx.ModelProto, rng: random.Random) -> None:
    at, to = rng.randrange(len(model.graph.node)), rng.randrange(len(model.graph.node))
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[at])
    del model.graph.node[at]
    model.graph.node.insert(to, node)


def add_output(model: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice(_names(model.graph))
    kind = rng.choice((TensorProto.FLOAT, TensorProto.INT64))
    shape = rng.choice((None, [], ["batch", 4], [0], ["batch", 6, 8]))
    model.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def external(model: onnx.ModelProto, rng: random.Random) -> None:
    """Weights elsewhere: a device, a file beside, the parent folder."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(list(model.graph.initializer))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    places = ("/dev/zero", "../model.onnx", "model.onnx", "", "weights.bin", ".", "a" * 300)
    where = {"location": rng.choice(places), "offset": rng.choice(("0", "-1", "99999999999", "x"))}
    where["length"] = rng.choice(("0", "4", "-4", "9" * 30))
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)


def rename(model: onnx.ModelProto, rng: random.Random) -> None:
    names = _names(model.graph)
    old, new = rng.choice(names), rng.choice((*names, "", "\x1b[1m", "n" * 400, "\n", "x"))
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name


def sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    dense = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims]
    if not dense:
        return
    tensor = rng.choice(dense)
    array = numpy_helper.to_array(tensor).ravel()
    indices = np.arange(array.size, dtype=np.int64)
    made = helper.make_sparse_tensor(
        numpy_helper.from_array(array, tensor.name),
        numpy_helper.from_array(indices, f"{tensor.name}_indices"),
        list(tensor.dims),
    )
    model.graph.sparse_initializer.append(made)
    model.graph.initializer.remove(tensor)


def preprocessing(model: onnx.ModelProto, rng: random.Random) -> None:
    """Metadata that this package reads."""
    texts = (
        "", "{}", "[]", "{" * 3000, '{"mean": [0], "std": [1], "size": [8, 12], "channels": 1}',
        '{"mean": [0,0,0], "std": [0,1,1], "size": [8, 12]}',
        '{"mean": [0,0,0], "std": [1,1,1], "size": [8, 12], "crop_pct": 1e-9}',
        '{"mean": [0,0,NaN], "std": [1,1,1], "size": [8, 12]}',
        '{"mean": [0,0,0], "std": [1,1,1], "size": [100000000, 12]}',
        '{"mean": [0,0,0], "std": [1,1,1], "size": [8, 12], "interpolation": []}',
        '{"mean": "abc", "std": {"a": 1}, "size": 3}', "9" * 5000,
    )  # fmt: skip
    entry = model.metadata_props.add()
    entry.key, entry.value = "ptq_onnx.preprocess", rng.choice(texts)


EDITS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    rewire, swap_inputs, drop_node, insert_node, insert_node, insert_cast, change_weight,
    change_weight, change_dims, reshape_weight, change_input, change_attribute, change_attribute,
    change_op, change_opset, move_node, add_output, external, rename, sparse, preprocessing,
)  # fmt: skip
