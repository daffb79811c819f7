"""Ranges in an NPU's file, where even the model's output has one."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, sample
from small_transformer import Choices, transformer

from npu.units import quantizer_for, tokens
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer

TOKENS, CHANNELS, SIZES = 6, 8, 8


def inputs(images: int, seed: int) -> np.ndarray:
    """1, 2, 3 … times the same numbers."""
    sizes = np.arange(1, images + 1, dtype=np.float32)
    return sizes[:, None, None] * sample(TOKENS, CHANNELS)


@pytest.mark.parametrize("bits", [8, 16])
def test_an_output_has_room_for_images_unseen(bits: int) -> None:
    """As much as the tails of its channels ask for, all being equal: nothing reads it. Of sixteen
    images, two of each size, the four largest are a tail of sizes 8, 8, 7, 7: it starts at 7, its
    width is the mean of what the first three have beyond. Of 16 bits the range is 2.2 times as wide
    as what was seen, of 8 bits 1.3 times."""
    g = SmallGraph(("batch", TOKENS, CHANNELS))
    model = g.model(g("Relu", "x"))
    quantizer = quantizer_for(model, f"8/{bits}/{bits}", inputs=inputs)
    largest = np.maximum(sample(TOKENS, CHANNELS).max(axis=0), 0).astype(np.float64)
    seen = SIZES * largest.max()
    width = 2 / 3 * largest
    bounds = seen * np.geomspace(1, 4, 25)
    tails = np.exp(-(bounds[:, None] - 7 * largest) / width) * 2 * width**2 * 4 / 16
    rounding = TOKENS * CHANNELS / 12 * (bounds / (2**bits - 1)) ** 2
    expected = bounds[np.argmin(tails.sum(axis=1) + rounding)]
    low, high = quantizer.specs[str(model.graph.outputs[0].name)].clip
    assert low == 0
    assert high == pytest.approx(expected, rel=1e-3)
    assert high / seen == pytest.approx({8: 1.335, 16: 2.245}[bits], rel=1e-3)


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax"])
def test_no_room_is_left_beyond_what_an_op_can_make(op: str) -> None:
    """Its largest value, with inputs of eight sizes, is no more than 1."""
    g = SmallGraph(("batch", TOKENS, CHANNELS))
    model = g.model(g(op, "x"))
    quantizer = quantizer_for(model, "8/16/16", inputs=inputs)
    low, high = quantizer.specs[str(model.graph.outputs[0].name)].clip
    assert (low, high) == (0, pytest.approx(1, rel=1e-6))


def test_a_range_that_clips_for_eight_bits_is_given_up_where_sixteen_are_given() -> None:
    """One tensor of the stream is clipped to a tenth, as steps chosen for 8 bits do with massive
    tokens: its fine step does not make it one that 8 bits hold well."""
    model = transformer(Choices(), blocks=2)
    blocks = find_blocks(model)
    sites = find_sites(model, blocks)
    (stream,) = [s.tensor for s in sites.values() if s.role == "residual2" and s.block == 0]
    config = QuantizeConfig(target="qnn", threads=1)
    batches = [100 * tokens(8), 100 * tokens(8, seed=2)]
    plain = make_quantizer(Plan(model.clone(), blocks, sites, config)).calibrate(batches)[stream]
    assert plain.rule.bits == 16
    narrow = (0.1 * plain.clip[0], 0.1 * plain.clip[1])
    plan = Plan(model.clone(), blocks, sites, config, searched={stream: narrow})
    found = make_quantizer(plan).calibrate(batches)[stream]
    assert found.rule.bits == 16
    assert found.clip == plain.clip
