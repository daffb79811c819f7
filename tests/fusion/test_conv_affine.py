"""Arithmetic around convolutions goes into them: every spelling, near misses, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_graph import SmallGraph, assert_same, assert_shapes, ops, sample, text

from ptq_onnx.fusion.rules import fuse

SHAPE = ("batch", 4, 6, 6)
X = sample(2, 4, 6, 6)
WEIGHT = sample(8, 4, 3, 3, seed=1)
DEPTHWISE = sample(4, 1, 3, 3, seed=2)
PADS = [1, 1, 1, 1]


def channels(count: int, seed: int = 3) -> np.ndarray:
    return (np.abs(sample(count, 1, 1, seed=seed)) + 0.5).astype(np.float32)


def conv(
    g: SmallGraph, x: str, weight: np.ndarray = WEIGHT, *more: object, **options: object
) -> str:
    return g("Conv", x, weight, *more, **options)


def norm(g: SmallGraph, x: str) -> str:
    numbers = [channels(8, seed).ravel() for seed in range(4)]
    return g("BatchNormalization", x, *numbers, epsilon=1e-3)


BEHIND: dict[str, Callable[[SmallGraph], str]] = {
    "factor": lambda g: g("Mul", conv(g, "x"), 1.5),
    "factor first": lambda g: g("Mul", channels(8), conv(g, "x")),
    "factors": lambda g: g("Mul", conv(g, "x", WEIGHT, sample(8)), channels(8)),
    "divisor": lambda g: g("Div", conv(g, "x"), channels(8)[None]),
    "shift": lambda g: g("Add", conv(g, "x", WEIGHT, sample(8)), channels(8)),
    "minus": lambda g: g("Sub", conv(g, "x"), channels(8)),
    "batch norm": lambda g: norm(g, conv(g, "x", pads=PADS)),
    "two": lambda g: g("Add", g("Mul", conv(g, "x"), 1.38), 0.59),
    "grouped": lambda g: g("Mul", conv(g, "x", DEPTHWISE, group=4, pads=PADS), channels(4)),
}


@pytest.mark.parametrize("spelling", BEHIND)
def test_behind(spelling: str) -> None:
    g = SmallGraph(SHAPE)
    y = BEHIND[spelling](g)
    check(g, y, ["Conv"])


BEFORE: dict[str, tuple[Callable[[SmallGraph, str], str], list[str]]] = {
    "factor": (lambda g, x: conv(g, g("Mul", x, 0.3), pads=PADS), ["Conv"]),
    "factors": (lambda g, x: conv(g, g("Mul", x, channels(4))), ["Conv"]),
    "depthwise": (
        lambda g, x: conv(g, g("Mul", x, channels(4)), DEPTHWISE, group=4, pads=PADS),
        ["Conv"],
    ),
    "shift": (lambda g, x: conv(g, g("Add", x, channels(4))), ["Conv"]),
    "padded shift": (lambda g, x: conv(g, g("Add", x, 0.2), pads=PADS), ["Add", "Conv"]),
    "same padding": (
        lambda g, x: conv(g, g("Add", x, 0.2), auto_pad="SAME_UPPER"),
        ["Add", "Conv"],
    ),
    "both": (lambda g, x: conv(g, g("Add", g("Mul", x, 0.3), 0.2)), ["Conv"]),
    "padded both": (
        lambda g, x: conv(g, g("Add", g("Mul", x, channels(4)), 0.2), pads=PADS),
        ["Add", "Conv"],
    ),
    "zero factor": (
        lambda g, x: conv(g, g("Add", g("Mul", x, 0.0), 0.2), pads=PADS),
        ["Add", "Conv", "Mul"],
    ),
}


@pytest.mark.parametrize("spelling", BEFORE)
def test_before(spelling: str) -> None:
    build, expected = BEFORE[spelling]
    g = SmallGraph(SHAPE)
    check(g, build(g, g("Tanh", "x")), [*expected, "Tanh"])


NEAR: dict[str, Callable[[SmallGraph], list[str]]] = {
    "pixels": lambda g: [g("Mul", conv(g, "x", pads=PADS), sample(6, 6))],
    "of the batch": lambda g: [g("Mul", conv(g, "x", pads=PADS), channels(2)[..., None])],
    "no constant": lambda g: [g("Mul", conv(g, "x"), conv(g, "x"))],
    "zero divisor": lambda g: [g("Div", conv(g, "x"), channels(8) * 0)],
    "constant first": lambda g: [g("Sub", channels(8), conv(g, "x"))],
    "output": lambda g: (lambda y: [y, g("Mul", y, 1.5)])(conv(g, "x")),
    "second reader": lambda g: (lambda y: [g("Add", g("Mul", y, 1.5), y)])(conv(g, "x")),
}


@pytest.mark.parametrize("miss", NEAR)
def test_near_misses_stay(miss: str) -> None:
    g = SmallGraph(SHAPE)
    outputs = NEAR[miss](g)
    proto = g.proto(*outputs)
    model = g.model(*outputs)
    assert fuse(model)["ConvAffine"] == 0
    if miss != "zero divisor":
        assert_same(model, proto, X)


def test_the_normalisation_of_the_image_is_left_to_be_read() -> None:
    g = SmallGraph(SHAPE)
    model = g.model(conv(g, g("Mul", g("Mul", "x", 1.0), 0.3), pads=PADS))
    assert fuse(model)["Normalisation"] + fuse(model)["ConvAffine"] <= 1


def check(g: SmallGraph, output: str, expected: list[str]) -> None:
    proto, model = g.proto(output), g.model(output)
    fuse(model)
    assert ops(model) == sorted(expected)
    assert_same(model, proto, X)
    assert_shapes(model, X)
    before = text(model)
    assert fuse(model)["ConvAffine"] == 0
    assert text(model) == before
