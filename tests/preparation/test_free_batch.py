"""A model of a fixed batch size gives the numbers of the same model with any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_graph import SmallGraph
from small_image_model import image_model, pictures, random

from ptq_onnx.analysis.analyse import named
from ptq_onnx.config.names import METHOD_NAMES
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.network import session
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.pipeline.calibration_images import Batches
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("fixed") / "pictures", 9)


def scales(model: Path, folder: Path, output: Path, **options: object) -> dict[str, object]:
    config = QuantizeConfig(report=False, threads=1, images=9, **options)  # type: ignore[arg-type]
    report = quantize(model, config=config, output=output, calib=folder).report
    assert report["calibration"]["images"] == 9
    return report


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    first, second = one["tensors"], other["tensors"]
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert len(first) == len(second) > 10
    for a, b in zip(first, second, strict=True):
        assert a["tensor"] == b["tensor"]
        np.testing.assert_allclose(a["scale"], b["scale"], rtol=2e-5)
        assert np.abs(np.subtract(a["zero_point"], b["zero_point"])).max() <= 1


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_same_scales(method: str, folder: Path, tmp_path: Path) -> None:
    """Nine images at a batch of eight: no statistic sees what fills up the second batch."""
    free = image_model(tmp_path / "free.onnx")
    fixed = image_model(tmp_path / "fixed.onnx", batch=8)
    kw = {"method": method}
    one, other = (scales(m, folder, tmp_path / m.stem, **kw) for m in (free, fixed))
    assert_same(one, other)
    assert not any("copies" in note for note in other["notes"])  # type: ignore[union-attr, attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": "fqvit", "rotate": False},
        {"quantizer": "channelwise", "method": "percentile"},
        {"equalize": False, "rounding": "gptq"},
    ],
)
def test_same_numbers_of_other_quantizers(
    options: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    free = image_model(tmp_path / "free.onnx")
    fixed = image_model(tmp_path / "fixed.onnx", batch=8)
    one, other = (scales(m, folder, tmp_path / m.stem, **options) for m in (free, fixed))
    assert_same(one, other)


def test_files_keep_their_batch(folder: Path, tmp_path: Path) -> None:
    fixed = image_model(tmp_path / "fixed.onnx", batch=8)
    report = scales(fixed, folder, tmp_path / "out")
    for name in ("fused", "quantized"):
        proto = onnx.load(tmp_path / f"out/{name}.onnx")
        sizes = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
        assert sizes == [8, 3, 16, 16]
        opened = session(tmp_path / f"out/{name}.onnx", 1, cpu=True)
        assert opened.get_outputs()[0].shape == [8, 10]
        assert opened.run(None, {"x": np.zeros((8, 3, 16, 16), np.float32)})[0].shape == (8, 10)
    assert report["model"]["inputs"] == [{"name": "x", "shape": [8, 3, 16, 16]}]  # type: ignore[index]


def test_constants_of_every_image_are_freed(tmp_path: Path) -> None:
    """A class token and positions that the exporter repeated for each image, and a Resize."""
    g = SmallGraph((4, 2, 8, 8))
    big = g("Resize", "x", "", "", np.array([4, 2, 16, 16]), mode="nearest")
    small = g("AveragePool", big, kernel_shape=[8, 8], strides=[8, 8])
    tokens = g("Reshape", small, np.array([4, 2, 4]))
    token = np.broadcast_to(random(0, 1, 2, 1), (4, 2, 1))
    joined = g("Concat", tokens, token.copy(), axis=2)
    moved = g("Add", joined, np.broadcast_to(random(1, 1, 2, 5), (4, 2, 5)).copy())
    path = g.save(tmp_path / "m.onnx", g("Relu", moved))
    found = prepare(path, free=True)
    assert found.fixed is not None
    assert found.fixed.size == 4
    assert prepare(path).fixed is None
    assert found.model.graph.outputs[0].shape is not None
    assert not isinstance(found.model.graph.outputs[0].shape[0], int)


def bound_to_its_batch(path: Path) -> Path:
    """Each image less the mean of its batch: no function of one image."""
    g = SmallGraph((4, 3, 16, 16))
    mean = g("ReduceMean", "x", np.array([0]), keepdims=1)
    x = g("Sub", "x", g("Mul", mean, np.float32(0.5)))
    x = g("Conv", x, random(0, 8, 3, 4, 4), random(1, 8), strides=[4, 4])
    x = g("ReduceMean", x, np.array([2, 3]), keepdims=0)
    x = g("Add", g("MatMul", x, random(2, 8, 10)), random(3, 10))
    return g.save(path, x)


def test_what_cannot_be_freed_counts_every_image_once(folder: Path, tmp_path: Path) -> None:
    path = bound_to_its_batch(tmp_path / "m.onnx")
    assert prepare(path, free=True).fixed is None
    source = open_images(folder, Preprocess.named("imagenet", 16))
    batches = list(Batches(source, 8, 4))
    assert [b.shape[0] for b in batches] == [4] * 9
    assert all((b == b[:1]).all() for b in batches)
    assert [n for n, _ in named(source, 2, 4)] == [[name] for name in source.names]
    report = scales(path, folder, tmp_path / "out", quantizer="vanilla", method="robust")
    assert any("4 copies" in note for note in report["notes"])  # type: ignore[union-attr, attr-defined]
    # Of copies the mean of the batch is the image itself: the input's range is that of its half.
    g = SmallGraph(("batch", 3, 16, 16))
    x = g(
        "Conv", g("Mul", "x", np.float32(0.5)), random(0, 8, 3, 4, 4), random(1, 8), strides=[4, 4]
    )
    x = g("ReduceMean", x, np.array([2, 3]), keepdims=0)
    x = g("Add", g("MatMul", x, random(2, 8, 10)), random(3, 10))
    free = g.save(tmp_path / "free.onnx", x)
    other = scales(free, folder, tmp_path / "free", quantizer="vanilla", method="robust")
    for start in ("conv", "add"):
        one, two = (
            next(t["scale"] for t in r["tensors"] if t["tensor"].startswith(start))  # type: ignore[attr-defined]
            for r in (report, other)
        )
        np.testing.assert_allclose(one, two, rtol=1e-5)
