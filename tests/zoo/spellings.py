"""Rewrites LayerNormalization and Gelu of a file the way other converters spell them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper


class _Writer:
    """Collects the nodes that stand for one."""

    def __init__(
        self, graph: onnx.GraphProto, stem: str, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.graph, self.stem, self.shapes = graph, stem, shapes
        self.nodes: list[onnx.NodeProto] = []

    def __call__(
        self, op: str, *inputs: str | float, output: str = "", **attributes: object
    ) -> str:
        names = [self.number(i) if isinstance(i, float) else i for i in inputs]
        name = output or f"{self.stem}/{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [name], name, **attributes))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = f"{self.stem}/c{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def respell(model: onnx.ModelProto, flavour: str) -> onnx.ModelProto:
    """Every LayerNormalization and Gelu, in the converter's spelling, in place."""
    graph = model.graph
    nodes = list(graph.node)
    del graph.node[:]
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for node in nodes:
        write = _Writer(graph, node.name or node.output[0], shapes)
        if node.op_type == "LayerNormalization":
            NORMS[flavour](write, node)
        elif flavour == "keras" and _is_dense(node, shapes):
            _keras_dense(write, node, shapes[node.input[1]][1])
        elif node.op_type == "Gelu":
            GELUS[flavour](write, node.input[0], node.output[0])
        graph.node.extend(write.nodes or [node])
    return model


def _is_dense(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    return node.op_type == "MatMul" and len(shapes.get(node.input[1], ())) == 2


def _epsilon(node: onnx.NodeProto) -> float:
    return next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)


def _tf_norm(write: _Writer, node: onnx.NodeProto) -> None:
    """tf.nn.batch_normalization: x·s + (β - μ·s), s = γ / √(σ² + ε)."""
    x, gamma, beta = node.input
    axes = write.constant(np.array([-1], np.int64))
    mean = write("ReduceMean", x, axes, keepdims=1)
    centred = write("Sub", x, mean)
    variance = write("ReduceMean", write("Mul", centred, centred), axes, keepdims=1)
    root = write("Sqrt", write("Add", variance, _epsilon(node)))
    scale = write("Mul", write("Reciprocal", root), gamma)
    offset = write("Sub", beta, write("Mul", mean, scale))
    write("Add", write("Mul", x, scale), offset, output=node.output[0])


def _keras_norm(write: _Writer, node: onnx.NodeProto) -> None:
    """What tf2onnx 1.17 makes of Keras 3.15's LayerNormalization on [N, T, C]: the means as
    GlobalAveragePool, x·s + (-μ·s + β)."""
    x, *rest = node.input
    gamma, beta = (write("Unsqueeze", v, write.constant(np.array([0, 1]))) for v in rest)
    mean = write("GlobalAveragePool", x)
    centred = write("Sub", x, mean)
    variance = write("GlobalAveragePool", write("Mul", centred, centred))
    root = write("Sqrt", write("Add", variance, _epsilon(node)))
    scale = write("Mul", write("Reciprocal", root), gamma)
    offset = write("Add", write("Mul", write("Neg", mean), scale), beta)
    write("Add", write("Mul", x, scale), offset, output=node.output[0])


def _keras_dense(write: _Writer, node: onnx.NodeProto, width: int) -> None:
    """Keras' Dense on [N, T, C]: a product of matrices, the shape put back behind it."""
    x, weight = node.input
    shape = write("Cast", write("Shape", x), to=onnx.TensorProto.INT32)
    outer = write("Gather", shape, write.constant(np.array([0, 1], np.int32)), axis=0)
    target = write("Concat", outer, write.constant(np.array([width], np.int32)), axis=0)
    flat = write("Reshape", x, write.constant(np.array([-1, write.shapes[weight][0]])))
    target = write("Cast", target, to=onnx.TensorProto.INT64)
    write("Reshape", write("MatMul", flat, weight), target, output=node.output[0])


def _paddle_norm(write: _Writer, node: onnx.NodeProto) -> None:
    x, gamma, beta = node.input
    axes = write.constant(np.array([-1], np.int64))
    centred = write("Sub", x, write("ReduceMean", x, axes, keepdims=1))
    squared = write("Pow", centred, 2.0)
    variance = write("ReduceMean", squared, axes, keepdims=1)
    root = write("Sqrt", write("Add", variance, _epsilon(node)))
    normed = write("Mul", write("Div", centred, root), gamma)
    write("Add", normed, beta, output=node.output[0])


def _tf_gelu(write: _Writer, x: str, output: str) -> None:
    erf = write("Erf", write("Mul", x, 1 / math.sqrt(2)))
    half = write("Mul", x, 0.5)
    write("Mul", half, write("Add", erf, 1.0), output=output)


def _paddle_gelu(write: _Writer, x: str, output: str) -> None:
    erf = write("Erf", write("Div", x, math.sqrt(2)))
    product = write("Mul", x, write("Add", erf, 1.0))
    write("Mul", product, 0.5, output=output)


NORMS = {"tf2onnx": _tf_norm, "paddle2onnx": _paddle_norm, "keras": _keras_norm}
GELUS = {"tf2onnx": _tf_gelu, "paddle2onnx": _paddle_gelu, "keras": _tf_gelu}
