"""A small transformer for images with several outputs: classes, boxes, a dense map, an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, _block, _linear, _norm

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SIZE = 12
"""Pixels: two rows of three patches of 6 x 4, the six tokens."""


def save_network(
    path: Path,
    wanted: tuple[str, ...] = ("logits", "boxes", "depth", "index"),
    batch: int | str = "batch",
) -> Path:
    """[batch, 3, 12, 12] → ``logits`` [batch, 5], ``boxes`` [batch, 6, 4], ``depth`` [batch, 1,
    6, 8], ``index`` int64 [batch], ``embedding`` [batch, 8], ``memory`` [6, batch, 8], ``kinds``
    [batch, 6, 4]: logits of the boxes."""
    g = SmallGraph((batch, 3, SIZE, SIZE))
    patches = g("Conv", "x", sample(WIDTH, 3, 6, 4) / 8, sample(WIDTH), kernel_shape=[6, 4],
                strides=[6, 4])  # fmt: skip
    flat = g("Reshape", patches, np.array([0, WIDTH, TOKENS]))
    x = g("Transpose", flat, perm=[0, 2, 1])
    for index in range(2):
        x = _block(g, x, Choices(), 10 * index)
    x = _norm(g, x)
    first = g("Gather", x, np.array(0), axis=1)
    made = {
        "logits": lambda: _linear(g, first, WIDTH, 5, 90),
        "boxes": lambda: g("Sigmoid", _linear(g, x, WIDTH, 4, 91)),
        "depth": lambda: g("Reshape", _linear(g, x, WIDTH, 8, 92), np.array([0, 1, 6, 8])),
        "embedding": lambda: g("Tanh", _linear(g, first, WIDTH, 8, 93)),
        "kinds": lambda: _linear(g, x, WIDTH, 4, 94),
        "memory": lambda: g("Transpose", x, perm=[1, 0, 2]),
    }
    shapes: dict[str, list[int | str]] = {
        "logits": [batch, 5], "boxes": [batch, 6, 4], "depth": [batch, 1, 6, 8],
        "kinds": [batch, 6, 4], "embedding": [batch, 8], "memory": [6, batch, 8],
    }  # fmt: skip
    infos = []
    for name in wanted:
        if name == "index":
            top = g("ArgMax", made["logits"](), axis=1, keepdims=0)
            g.nodes.append(helper.make_node("Identity", [top], ["index"], "/index"))
            infos.append(helper.make_tensor_value_info("index", INT64, [batch]))
            continue
        g.nodes.append(helper.make_node("Identity", [made[name]()], [name], f"/{name}"))
        infos.append(helper.make_tensor_value_info(name, FLOAT, shapes[name]))
    graph = helper.make_graph(g.nodes, "several", g.inputs, infos, g.constants)
    opsets = [helper.make_opsetid("", g.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
