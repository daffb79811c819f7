"""The image in pixels in front of any first convolution: padding stays zero, groups stay apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, text
from small_image_model import image_model, random

from ptq_onnx.blocks.element_map import layout_indices
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.equalization.linear_weights import move_input_channels
from ptq_onnx.equalization.pixels import image_in_pixels
from ptq_onnx.graph.formula import constant
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.quantizers.base import Plan

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
X = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
FIRST = {
    "plain": {},
    "padded": {"kernel": 7, "pads": (3, 3, 2, 2)},
    "unequal": {"kernel": 6, "pads": (2, 0, 0, 2)},
    "same upper": {"kernel": 7, "auto_pad": "SAME_UPPER"},
    "same lower": {"kernel": 6, "auto_pad": "SAME_LOWER"},
    "explicit": {"kernel": 7, "pads": (3, 3, 2, 2), "explicit_pad": True},
    "depthwise": {"first": "depthwise"},
    "gray": {"kernel": 7, "pads": (3, 3, 2, 2), "channels": 1},
    "gray explicit": {"pads": (2, 2, 2, 2), "explicit_pad": True, "channels": 1, "kernel": 8},
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", FIRST)
def test_equal_in_float(name: str, target: str, tmp_path: Path) -> None:
    options = FIRST[name]
    channels = int(options.get("channels", 3))  # type: ignore[call-overload]
    found = prepare(image_model(tmp_path / "m.onnx", **options))  # type: ignore[arg-type]
    config = QuantizeConfig(quantizer="deploy", target=target, threads=1)
    plan = Plan(found.model, found.blocks, found.sites, config)
    plan = replace(plan, pixels=(MEAN[:channels], STD[:channels]))
    x = X[:, :channels]
    equal = equalise(plan, [x])
    (expected,), (other,) = run(found.model, x), run(equal.model, x)
    assert np.abs(other - expected).max() < 1e-5 * np.abs(expected).max()
    # ONNX Runtime leaves these convolutions in float, so that their input stays what it is.
    assert bool(equal.fixed) == (target != "onnxruntime" or name == "plain")


def test_border_codes_are_those_of_the_mean() -> None:
    """What the quantized convolution reads beyond the image is within half a code of zero."""
    g = SmallGraph((1, 3, 8, 8))
    model = g.model(g("Conv", "x", random(0, 4, 3, 3, 3), pads=[1, 1, 1, 1]))
    (tensor,) = image_in_pixels(model, MEAN, STD)[1]
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == tensor))
    black = ((0 - np.float32(MEAN)) / np.float32(STD)).reshape(1, 3, 1, 1)
    pixels = run(model, np.broadcast_to(black, (1, 3, 8, 8)).astype(np.float32))[1]
    assert pixels.shape == (1, 3, 10, 10)
    np.testing.assert_allclose(pixels[:, :, 1:-1, 1:-1], 0, atol=1e-3)
    np.testing.assert_allclose(pixels[0, :, 0, 0], 255 * np.float32(MEAN), rtol=1e-4)


@pytest.mark.parametrize(
    ("std", "step"), [((0.5,) * 3, 1 / 127.5), (STD, 1.0)], ids=["one unit", "a unit each"]
)
def test_signed_codes_are_pixels_less_128(std: tuple[float, ...], step: float) -> None:
    g = SmallGraph((1, 3, 8, 8))
    model = g.model(g("Conv", "x", random(0, 4, 3, 3, 3)))
    ((tensor, ends),) = image_in_pixels(model, MEAN, std, centred=True)[1].items()
    assert ends == pytest.approx((-128 * step, 127 * step), rel=1e-6)
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == tensor))
    pixels = np.arange(192).reshape(1, 3, 8, 8)
    x = (pixels / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    codes = run(model, x.astype(np.float32))[1] / step
    np.testing.assert_allclose(codes, pixels - 128, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_read_their_own_channels(groups: int) -> None:
    g = SmallGraph((2, 4, 6, 6))
    out = g("Conv", "x", random(0, 8, 4 // groups, 3, 3), random(1, 8), group=groups)
    model = g.model(out)
    x = random(2, 2, 4, 6, 6, scale=1)
    (expected,) = run(model, x)
    factor, shift = np.array([1.0, 2, 3, 4]), np.array([0.5, -1, 2, 0])
    conv = next(iter(model.graph))
    move_input_channels(model.graph, conv, factor, shift)
    moved = (x - shift.reshape(4, 1, 1)) / factor.reshape(4, 1, 1)
    np.testing.assert_allclose(run(model, moved.astype(np.float32))[0], expected, atol=1e-5)


def test_a_shift_under_padding_is_refused() -> None:
    g = SmallGraph((1, 1, 6, 6))
    model = g.model(g("Conv", "x", random(0, 2, 1, 3, 3), pads=[1, 1, 1, 1]))
    conv = next(iter(model.graph))
    with pytest.raises(ValueError, match="pads with zeros"):
        move_input_channels(model.graph, conv, np.ones(1), np.ones(1))
    before = constant(conv.inputs[1])
    assert before is not None
    move_input_channels(model.graph, conv, np.full(1, 2.0), np.zeros(1))
    np.testing.assert_array_equal(constant(conv.inputs[1]), before * 2)


def test_what_a_pad_fills_in_is_no_element() -> None:
    """Its index would be that of the first element, and a shift would reach it."""
    g = SmallGraph((1, 1, 4, 4))
    padded = g("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    mirrored = g("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
    model = g.model(g("Neg", padded), g("Neg", mirrored))
    image = model.graph.inputs[0]
    values: dict[str | None, ir.Value] = {v.name: v for n in model.graph for v in n.outputs}
    assert layout_indices(image, values[padded]) is None
    found = layout_indices(image, values[mirrored])
    assert found is not None
    assert found[0, 0, 0, 0] == 5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("two readers", {}), ("an output of the image", {}), ("other channels", {}),
        ("as a weight", {}), ("no weight", {}), ("plain", {"convolutions": False}),
        ("reshaped", {}),
    ],
)  # fmt: skip
def test_other_images_stay_in_their_units(kind: str, options: dict[str, bool]) -> None:
    channels = 2 if kind == "other channels" else 3
    g = SmallGraph((1, channels, 8, 8))
    weight, read = random(0, 4, channels, 3, 3), "x"
    if kind == "reshaped":
        read = g("Reshape", "x", np.array([1, channels, 4, 16]))
    if kind == "as a weight":
        out = g("Conv", random(1, 1, 8, 9, 9), g("Reshape", "x", np.array([3, 8, 8, 1])))
    elif kind == "no weight":
        out = g("Relu", "x")
    else:
        out = g("Conv", read, weight)
    more = {"two readers": lambda: g("Neg", "x"), "an output of the image": lambda: g("Abs", "x")}
    model = g.model(out, *([more[kind]()] if kind in more else []))
    before = text(model)
    assert image_in_pixels(model, MEAN, STD, **options) == ({}, {})
    assert text(model) == before
