"""Ranges that the exporter proves: no value leaves them, and values come near both their ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from integer_steps import model_of
from test_integer_steps import grid, term

from ptq_onnx.targets.integer.attention import LogAttentionStep, ShareAttentionStep
from ptq_onnx.targets.integer.builder import RANGE_KEY
from ptq_onnx.targets.integer.fixed_point import fixed_point
from ptq_onnx.targets.integer.interpreter import Interpreter
from ptq_onnx.targets.integer.layer_norm import layer_norm_step
from ptq_onnx.targets.integer.softmax import Kind, SoftmaxStep

Claims = list[tuple[str, int, int]]


def claims_of(proto: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """By the tensor's name, in the order of the graph."""
    found = {}
    for node in proto.graph.node:
        for entry in node.metadata_props:
            if entry.key == RANGE_KEY:
                low, high = map(int, entry.value.split())
                found[node.output[0]] = low, high
    return found


def seen(proto: onnx.ModelProto, inputs: list[tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """The least and the largest value of every tensor over all inputs."""
    found: dict[str, tuple[int, int]] = {}
    for x, *others in inputs:
        interpreter = Interpreter(proto)
        interpreter.inputs = interpreter.inputs[:1]
        interpreter.constants.update({f"x{i}": y for i, y in enumerate(others, 1)})
        interpreter.run(x)
        for name, (low, high) in interpreter.ranges.items():
            least, most = found.get(name, (low, high))
            found[name] = min(least, low), max(most, high)
    return found


def near(claimed: int, reached: int) -> bool:
    """Of one sign, and less than twice apart; zero is zero."""
    return claimed == reached or (
        claimed * reached > 0 and max(claimed / reached, reached / claimed) < 2.1
    )


def check(step: Any, inputs: list[tuple[np.ndarray, ...]], loose: tuple[int, ...] = ()) -> Claims:
    """All claims of a step in order; ``loose``: those whose ends are not reached."""
    proto = model_of(step, *inputs[0])
    claims, values = claims_of(proto), seen(proto, inputs)
    for place, (name, (low, high)) in enumerate(claims.items()):
        least, most = values[name]
        assert low <= least <= most <= high, name
        if place not in loose:
            assert near(low, least), (name, low, least)
            assert near(high, most), (name, high, most)
    return [(name.split("/")[-1].split("_")[0], *ends) for name, ends in claims.items()]


def test_a_layer_norm() -> None:
    """Half of a row at either end has the largest variance, one channel alone the largest value."""
    channels = 64
    read, made = grid(0.02, 100), grid(0.03, 128)
    gamma = np.ones(channels)
    step = layer_norm_step("norm", term(read), read, made, gamma, 0 * gamma, 1e-6)
    rows = np.full((4, channels), 100, np.uint8)
    rows[0, ::2], rows[0, 1::2] = 0, 255
    rows[1, 5], rows[2, 5] = 255, 0
    wide = [rows + np.uint8(0)]
    random = np.random.default_rng(0)
    for top in (1, 2, 3, 5, 9, 17, 40, 100, 255):
        wide.append(random.integers(0, top + 1, (4, channels)).astype(np.uint8))
    found = check(step, [(x,) for x in wide])
    span = 255
    assert found[0][1:] == (0, channels**2 * span**2 // 4)
    assert found[1][1:] == (2**60, 2**62 - 1)
    within = (2**30, 35 * 2**26)  # 1/12 above 2^31
    assert {ends for _, *ends in map(list, found[2:-2]) for ends in [tuple(ends)]} == {within}
    assert found[-2][1:] == (2**30, 2**31 - 1)
    assert found[-1][1:] == (-9 << 20, 9 << 20)  # the root of 64, and one


@pytest.mark.parametrize("kind", ["log2", "uniform", "shares"])
def test_a_softmax(kind: Kind) -> None:
    tokens, span = 16, 200
    step = SoftmaxStep(0.2, tokens, 8, kind, span)
    ln2 = step.constants[0]
    rows = np.full((span + 1, tokens), 250, np.uint8)
    rows[:, 1:] -= np.arange(span + 1, dtype=np.uint8)[:, None]
    found = check(step, [(rows,)], loose=(2, 4))
    ends = [tuple(end) for _, *end in found]
    assert ends[:3] == [(0, span), (0, ln2 - 1), (0, step.largest)]
    assert ln2 == math.floor(math.log(2) / step.unit)
    if kind != "shares":
        assert ends[3] == (step.largest, tokens * step.largest)
    assert ends[4 - (kind == "shares") :] == ([] if kind == "log2" else [(0, 255)])


@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("step_of", [LogAttentionStep, ShareAttentionStep])
def test_a_product_with_a_map(
    step_of: type[LogAttentionStep] | type[ShareAttentionStep], zero: int
) -> None:
    """Σ w up to all of them at the top; a is less than 256 steps of V from zero."""
    tokens, shares = 9, step_of is ShareAttentionStep
    top = 255 if shares else 1 << 14
    finish = fixed_point([np.array(2.0**-16)], np.array(128.0), [256 << 16], (0, 255))
    step = step_of(top, zero, tokens, finish)
    full, none = (255, 0) if shares else (0, 15)
    codes = np.full((1, 1, 2, tokens), full, np.uint8)
    codes[..., 1, :] = none
    single = codes.copy()
    single[..., 0, 1:] = none
    values = np.zeros((1, 1, tokens, 2), np.uint8)
    values[..., 1] = 255
    found = check(step, [(codes, values), (single, values)], loose=(1, 2, 3))
    bound = 256 << 16
    assert [tuple(ends) for _, *ends in found] == [
        (0, tokens * top), (1, 2 * bound * tokens * top), (0, 2 * bound), (-bound, bound),
    ]  # fmt: skip
