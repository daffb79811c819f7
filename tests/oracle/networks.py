"""Tiny networks with the parts that change where numbers go, as float ONNX with random weights.

An image [batch, 3, 16, 16] becomes 16 tokens of 16 channels, one or two blocks follow, and a head
on the mean of the tokens. Channels differ in size by up to a factor of eight, so that factors per
channel are not all one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
SIDE, TOKENS, WIDTH, HEADS, CLASSES = 16, 16, 16, 2, 5
HEAD = WIDTH // HEADS
IMAGE = (3, SIDE, SIDE)


class Graph:
    """``g("Mul", x, 0.5)`` adds a node and returns the name of its first output."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        stem = f"{op.lower()}_{len(self.nodes)}"
        results = [stem, *(f"{stem}_{k}" for k in range(1, outputs))]
        self.nodes.append(helper.make_node(op, names, results, f"n_{stem}", **attributes))
        return stem

    def constant(self, value: Any, name: str = "") -> str:
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape)

    def uneven(self, size: int) -> Array:
        """Channels of different size."""
        return np.exp2(self.random.uniform(-1.5, 1.5, size))

    def weight(self, rows: int, columns: int) -> str:
        return self.constant(self.normal(rows, columns) / np.sqrt(rows) * self.uneven(columns))

    def linear(self, x: str, rows: int, columns: int, weight: str | None = None) -> str:
        product = self("MatMul", x, weight or self.weight(rows, columns))
        return self("Add", product, 0.2 * self.normal(columns))

    def norm(self, x: str, width: int = WIDTH) -> str:
        gamma, beta = self.uneven(width), 0.3 * self.normal(width)
        return self("LayerNormalization", x, gamma, beta, axis=-1, epsilon=1e-6)

    def model(self, output: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["logits"], "out"))
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "network",
            [info("image", TensorProto.FLOAT, ["batch", *IMAGE])],
            [info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            self.constants,
        )
        opset = [helper.make_opsetid("", 20)]
        return helper.make_model(graph, opset_imports=opset, ir_version=9)


def patches(g: Graph) -> str:
    """Tokens [batch, 16, 16] with positions."""
    kernel = g.normal(WIDTH, 3, 4, 4) / 7 * g.uneven(WIDTH)[:, None, None, None]
    x = g("Conv", "image", kernel, 0.1 * g.normal(WIDTH), kernel_shape=[4, 4], strides=[4, 4])
    x = g("Transpose", g("Reshape", x, np.array([0, WIDTH, TOKENS])), perm=[0, 2, 1])
    return g("Add", x, 0.3 * g.normal(1, TOKENS, WIDTH))


def head(g: Graph, x: str) -> onnx.ModelProto:
    mean = g("ReduceMean", g.norm(x), np.array([1]), keepdims=0)
    return g.model(g.linear(mean, WIDTH, CLASSES))


def heads(g: Graph, x: str, count: int = HEADS, tokens: int = TOKENS) -> str:
    split = g("Reshape", x, np.array([-1 if tokens else 0, tokens, count, HEAD]))
    return g("Transpose", split, perm=[0, 2, 1, 3])


def joined(g: Graph, x: str, tokens: int = TOKENS) -> str:
    x = g("Transpose", x, perm=[0, 2, 1, 3])
    return g("Reshape", x, np.array([-1, tokens, WIDTH]))


def softmax(g: Graph, q: str, k: str, *added: Any) -> str:
    logits = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
    logits = g("Mul", logits, HEAD**-0.5)
    for more in added:
        logits = g("Add", logits, more)
    return g("Softmax", logits, axis=-1)


def packed(g: Graph, x: str, weight: str | None = None) -> list[str]:
    """q, k, v [batch, heads, tokens, depth] out of one linear."""
    qkv = g.linear(x, WIDTH, 3 * WIDTH, weight)
    qkv = g("Reshape", qkv, np.array([-1, TOKENS, 3, HEADS, HEAD]))
    qkv = g("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    return [g("Gather", qkv, np.array(i), axis=0) for i in range(3)]


def attention(g: Graph, x: str, *added: Any, weight: str | None = None) -> str:
    q, k, v = packed(g, x, weight)
    return joined(g, g("MatMul", softmax(g, q, k, *added), v))


Attend = Callable[[Graph, str], str]


def block(g: Graph, x: str, attend: Attend = attention) -> str:
    x = g("Add", x, g.linear(attend(g, g.norm(x)), WIDTH, WIDTH))
    return g("Add", x, mlp(g, g.norm(x)))


def mlp(g: Graph, x: str) -> str:
    hidden = g("Gelu", g.linear(x, WIDTH, 2 * WIDTH))
    return g.linear(hidden, 2 * WIDTH, WIDTH)


def plain() -> onnx.ModelProto:
    """Two ordinary blocks."""
    g = Graph(1)
    return head(g, block(g, block(g, patches(g))))


def _shared_heads(count: int) -> Attend:
    def attend(g: Graph, x: str) -> str:
        """All heads of q, ``count`` of k and v, each repeated."""
        q = heads(g, g.linear(x, WIDTH, WIDTH), HEADS)
        k, v = (heads(g, g.linear(x, WIDTH, count * HEAD), count) for _ in range(2))
        if count > 1:
            return joined(g, g("MatMul", softmax(g, q, k), v))
        full = np.array([1, HEADS, 1, 1])
        k, v = (g("Expand", t, full) for t in (k, v))
        return joined(g, g("MatMul", softmax(g, q, k), v))

    return attend


def multi_query() -> onnx.ModelProto:
    """One head of k and v for all of q."""
    g = Graph(2)
    return head(g, block(g, patches(g), _shared_heads(1)))


def grouped_query() -> onnx.ModelProto:
    """Four heads of q of four channels on two of k and v."""
    g = Graph(3)

    def attend(g: Graph, x: str) -> str:
        def apart(t: str, count: int) -> str:
            t = g("Reshape", t, np.array([-1, TOKENS, count, 4]))
            return g("Transpose", t, perm=[0, 2, 1, 3])

        def twice(t: str) -> str:
            t = g("Expand", g("Unsqueeze", t, np.array([2])), np.array([1, 1, 2, 1, 1]))
            return g("Reshape", t, np.array([-1, 4, TOKENS, 4]))

        q = apart(g.linear(x, WIDTH, WIDTH), 4)
        k, v = (twice(apart(g.linear(x, WIDTH, 8), 2)) for _ in range(2))
        y = g("Transpose", g("MatMul", softmax(g, q, k), v), perm=[0, 2, 1, 3])
        return g("Reshape", y, np.array([-1, TOKENS, WIDTH]))

    return head(g, block(g, patches(g), attend))


def masked() -> onnx.ModelProto:
    """Tokens see those before them only."""
    g = Graph(4)
    mask = np.triu(np.full((TOKENS, TOKENS), -1e4), 1)
    return head(g, block(g, patches(g), lambda g, x: attention(g, x, mask)))


def relative_bias() -> onnx.ModelProto:
    """A table is added to the logits."""
    g = Graph(5)
    bias = g.normal(1, HEADS, TOKENS, TOKENS)
    return head(g, block(g, patches(g), lambda g, x: attention(g, x, bias)))


def tied_weights() -> onnx.ModelProto:
    """Two blocks with the same weights for q, k, v; one weight for two linears of one input."""
    g = Graph(6)
    qkv, other = g.weight(WIDTH, 3 * WIDTH), g.weight(WIDTH, WIDTH)

    def attend(g: Graph, x: str) -> str:
        return attention(g, x, weight=qkv)

    x = block(g, block(g, patches(g), attend), attend)
    y = g.norm(x)
    gate = g("Sigmoid", g.linear(y, WIDTH, WIDTH, other))
    return head(g, g("Add", x, g("Mul", gate, g.linear(y, WIDTH, WIDTH, other))))


def grouped_convolution() -> onnx.ModelProto:
    """A convolution in groups on the patches, a depthwise one inside the MLP."""
    g = Graph(7)
    x = block(g, patches(g))
    y = g("Reshape", g("Transpose", g.norm(x), perm=[0, 2, 1]), np.array([0, WIDTH, 4, 4]))
    kernel = g.normal(WIDTH, WIDTH // 4, 3, 3) / 6
    y = g("Conv", y, kernel, 0.1 * g.normal(WIDTH), group=4, pads=[1] * 4, kernel_shape=[3, 3])
    y = g("Gelu", y)
    y = g("Conv", y, g.normal(WIDTH, 1, 3, 3) / 3, group=WIDTH, pads=[1] * 4, kernel_shape=[3, 3])
    y = g("Transpose", g("Reshape", y, np.array([0, WIDTH, TOKENS])), perm=[0, 2, 1])
    return head(g, g("Add", x, y))


def einsum() -> onnx.ModelProto:
    """Both products of the attention as Einsum."""
    g = Graph(8)

    def attend(g: Graph, x: str) -> str:
        q, k, v = (
            g("Reshape", g.linear(x, WIDTH, WIDTH), np.array([-1, TOKENS, HEADS, HEAD]))
            for _ in range(3)
        )
        logits = g("Mul", g("Einsum", q, k, equation="bqhd,bkhd->bhqk"), HEAD**-0.5)
        y = g("Einsum", g("Softmax", logits, axis=-1), v, equation="bhqk,bkhd->bqhd")
        return g("Reshape", y, np.array([-1, TOKENS, WIDTH]))

    return head(g, block(g, patches(g), attend))


def three_axes() -> onnx.ModelProto:
    """Heads in the batch axis: products of three axes."""
    g = Graph(9)

    def attend(g: Graph, x: str) -> str:
        q, k, v = (
            g("Reshape", heads(g, g.linear(x, WIDTH, WIDTH)), np.array([-1, TOKENS, HEAD]))
            for _ in range(3)
        )
        logits = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 2, 1])), HEAD**-0.5)
        y = g("MatMul", g("Softmax", logits, axis=-1), v)
        return joined(g, g("Reshape", y, np.array([-1, HEADS, TOKENS, HEAD])))

    return head(g, block(g, patches(g), attend))


def windows() -> onnx.ModelProto:
    """Swin: windows of 2 × 2, shifted, with a table of positions and a mask for what the shift
    brought together."""
    g = Graph(10)
    size, count = 4, 4

    def attend(g: Graph, x: str, shifted: bool) -> str:
        x = g("Reshape", x, np.array([-1, 4, 4, WIDTH]))
        if shifted:
            x = roll(g, x, 1)
        x = g("Reshape", x, np.array([-1, 2, 2, 2, 2, WIDTH]))
        x = g("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = g("Reshape", x, np.array([-1, size, WIDTH]))
        qkv = g.linear(x, WIDTH, 3 * WIDTH)
        qkv = g("Reshape", qkv, np.array([-1, size, 3, HEADS, HEAD]))
        qkv = g("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = (g("Gather", qkv, np.array(i), axis=0) for i in range(3))
        logits = g("MatMul", g("Mul", q, HEAD**-0.5), g("Transpose", k, perm=[0, 1, 3, 2]))
        logits = g("Add", logits, g.normal(1, HEADS, size, size))
        if shifted:
            mask = np.zeros((1, count, 1, size, size))
            mask[0, 1:, 0, :2, 2:] = mask[0, 1:, 0, 2:, :2] = -100
            logits = g("Reshape", logits, np.array([-1, count, HEADS, size, size]))
            logits = g("Reshape", g("Add", logits, mask), np.array([-1, HEADS, size, size]))
        y = joined(g, g("MatMul", g("Softmax", logits, axis=-1), v), size)
        y = g("Reshape", y, np.array([-1, 2, 2, 2, 2, WIDTH]))
        y = g("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
        y = g("Reshape", y, np.array([-1, 4, 4, WIDTH]))
        if shifted:
            y = roll(g, y, 3)
        return g("Reshape", y, np.array([-1, TOKENS, WIDTH]))

    def roll(g: Graph, x: str, by: int) -> str:
        for axis in (1, 2):
            parts = [
                g("Slice", x, np.array([a]), np.array([b]), np.array([axis]))
                for a, b in ((by, 4), (0, by))
            ]
            x = g("Concat", *parts, axis=axis)
        return x

    x = block(g, patches(g), lambda g, x: attend(g, x, False))
    return head(g, block(g, x, lambda g, x: attend(g, x, True)))


def class_token() -> onnx.ModelProto:
    """A token of its own in front, scales behind the branches, the head on the first token."""
    g = Graph(11)
    first = g("Expand", 0.5 * g.normal(1, 1, WIDTH), batch_of(g, WIDTH))
    x = g("Concat", first, patches(g), axis=1)
    q, k, v = (heads(g, g.linear(g.norm(x), WIDTH, WIDTH), HEADS, 0) for _ in range(3))
    y = g("Transpose", g("MatMul", softmax(g, q, k), v), perm=[0, 2, 1, 3])
    y = g("Reshape", y, np.array([0, 0, WIDTH]))
    x = g("Add", x, g("Mul", g.linear(y, WIDTH, WIDTH), g.uneven(WIDTH) / 2))
    x = g("Add", x, g("Mul", mlp(g, g.norm(x)), g.uneven(WIDTH) / 2))
    token = g("Gather", g.norm(x), np.array(0), axis=1)
    return g.model(g.linear(token, WIDTH, CLASSES))


def batch_of(g: Graph, width: int) -> str:
    """The shape [batch, 1, width], from the image."""
    batch = g("Slice", g("Shape", "image"), np.array([0]), np.array([1]))
    return g("Concat", batch, np.array([1, width]), axis=0)


def shared_norm() -> onnx.ModelProto:
    """One norm read by attention, MLP and the residual add; norms of q and k; a depthwise
    convolution of the values beside the attention."""
    g = Graph(12)
    x = g.norm(patches(g))
    q, k, v = (heads(g, g.linear(x, WIDTH, WIDTH)) for _ in range(3))
    y = joined(g, g("MatMul", softmax(g, g.norm(q, HEAD), g.norm(k, HEAD)), v))
    image = g("Transpose", v, perm=[0, 1, 3, 2])
    image = g("Reshape", image, np.array([-1, WIDTH, 4, 4]))
    near = g("Conv", image, g.normal(WIDTH, 1, 3, 3) / 3, group=WIDTH, pads=[1] * 4)
    near = g("Transpose", g("Reshape", near, np.array([0, WIDTH, TOKENS])), perm=[0, 2, 1])
    y = g.linear(g("Add", y, near), WIDTH, WIDTH)
    return head(g, g("Add", x, g("Add", y, mlp(g, x))))


def stem() -> onnx.ModelProto:
    """Convolutions that pay on codes, a residual add between them, in front of the patches."""
    g = Graph(14)
    wide = 2 * WIDTH

    def convolution(x: str, channels: int, side: int = 3, **more: Any) -> str:
        kernel = g.normal(wide, channels, side, side) / (side * np.sqrt(channels))
        kernel *= g.uneven(wide)[:, None, None, None]
        return g("Conv", x, kernel, 0.1 * g.normal(wide), kernel_shape=[side] * 2, **more)

    x = g("Relu", convolution("image", 3, pads=[1] * 4))
    y = g("Relu", convolution(x, wide, pads=[1] * 4))
    x = g("Relu", g("Add", x, convolution(y, wide, pads=[1] * 4)))
    x = g("Reshape", convolution(x, wide, 4, strides=[4, 4]), np.array([0, wide, TOKENS]))
    return head(g, block(g, g.linear(g("Transpose", x, perm=[0, 2, 1]), wide, WIDTH)))


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": plain,
    "multi_query": multi_query,
    "grouped_query": grouped_query,
    "masked": masked,
    "relative_bias": relative_bias,
    "tied_weights": tied_weights,
    "grouped_convolution": grouped_convolution,
    "einsum": einsum,
    "three_axes": three_axes,
    "windows": windows,
    "class_token": class_token,
    "shared_norm": shared_norm,
    "stem": stem,
}


def write(name: str, folder: Path) -> Path:
    """The network's file, written once."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        onnx.save(NETWORKS[name](), path)
    return path


def images(count: int, seed: int = 0) -> Array:
    """Inputs of the networks, [count, 3, 16, 16], the same at every call."""
    return np.random.default_rng(seed).standard_normal((count, *IMAGE)).astype(np.float32)
