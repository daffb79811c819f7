"""Small models of images, in the choices that exports differ in, to be damaged."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, _block, _linear, _norm

HEIGHT, WIDTH_OF_IMAGE, PATCH = 8, 12, 4
DIGITS = Path(__file__).resolve().parents[2] / "models/digits_vit.onnx"

CHOICES = (
    Choices(),
    Choices(packed=False, scale="before"),
    Choices(mask=True, layer_scale=True),
    Choices(pool=True, activation="Relu"),
    Choices(norms=False, mlp=False),
)


def seed_model(rng: random.Random) -> onnx.ModelProto:
    """One of the small models, a copy."""
    model = onnx.ModelProto()
    model.CopyFrom(_seed(rng.randrange(COUNT)))
    return model


COUNT = len(CHOICES) + 3


@lru_cache(maxsize=COUNT)
def _seed(index: int) -> onnx.ModelProto:
    if index < len(CHOICES):
        return vit(CHOICES[index])
    return (fixed_batch, branched, no_transformer)[index - len(CHOICES)]()


def vit(choices: Choices = CHOICES[0], batch: int | str = "batch") -> onnx.ModelProto:
    """[batch, 3, 8, 12] → patches → a block → norm → head."""
    g, x = _patches(batch)
    x = _norm(g, _block(g, x, choices, 10))
    if choices.pool:
        token = g("ReduceMean", x, np.array([1]), keepdims=0)
    else:
        token = g("Gather", x, np.array(0), axis=1)
    return g.proto(_linear(g, token, WIDTH, 4, 99))


def _patches(batch: int | str = "batch") -> tuple[SmallGraph, str]:
    g = SmallGraph((batch, 3, HEIGHT, WIDTH_OF_IMAGE))
    weight = sample(WIDTH, 3, PATCH, PATCH, seed=1) * 0.2
    x = g("Conv", "x", weight, sample(WIDTH, seed=2), strides=[PATCH, PATCH], kernel_shape=[4, 4])
    x = g("Transpose", g("Reshape", x, np.array([0, WIDTH, TOKENS])), perm=[0, 2, 1])
    return g, g("Add", x, sample(1, TOKENS, WIDTH, seed=3))


def fixed_batch() -> onnx.ModelProto:
    return vit(batch=2)


def no_transformer() -> onnx.ModelProto:
    g, x = _patches()
    return g.proto(_linear(g, g("ReduceMean", x, np.array([1]), keepdims=0), WIDTH, 4, 99))


def branched(condition: bool = True) -> onnx.ModelProto:
    """An If whose condition is a constant and whose branches are Identities."""
    model = vit()
    constant = helper.make_tensor("condition", TensorProto.BOOL, [], [condition])
    model.graph.initializer.append(constant)
    name = next(n for n in model.graph.node if n.op_type == "LayerNormalization").output[0]
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = "chosen"
    shape = (None, TOKENS, WIDTH)
    branches = {
        side: helper.make_graph(
            [helper.make_node("Identity", [name], [side])],
            side,
            [],
            [helper.make_tensor_value_info(side, TensorProto.FLOAT, shape)],
        )
        for side in ("then", "else")
    }
    choice = helper.make_node(
        "If",
        ["condition"],
        ["chosen"],
        "choice",
        then_branch=branches["then"],
        else_branch=branches["else"],
    )
    at = next(i for i, n in enumerate(model.graph.node) if name in n.output) + 1
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], choice, *nodes[at:]])
    return model
