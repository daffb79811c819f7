"""What is read of a file before it is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graph import SmallGraph, sample

from ptq_onnx.errors import ModelError
from ptq_onnx.targets.timing.timed_model import read_subject


def picture_model(path: Path, shape: tuple[int | str, ...], dtype: int = 1) -> Path:
    g = SmallGraph(shape, dtype=dtype)
    return g.save(path, g("GlobalAveragePool", "x"))


def test_unknown_axes_get_usual_sizes(tmp_path: Path) -> None:
    subject = read_subject(picture_model(tmp_path / "a.onnx", ("n", "c", "h", 40)))
    assert subject.batch is None
    assert subject.shapes(5) == {"x": (5, 3, 224, 40)}
    fixed = read_subject(picture_model(tmp_path / "b.onnx", (2, 1, 8, 8)))
    assert (fixed.batch, fixed.shapes(2)) == (2, {"x": (2, 1, 8, 8)})


def test_input_is_normal_and_always_the_same(tmp_path: Path) -> None:
    subject = read_subject(picture_model(tmp_path / "a.onnx", ("n", 3, 64, 64)))
    x = subject.feed(4)["x"]
    assert (x.shape, x.dtype) == ((4, 3, 64, 64), np.float32)
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    np.testing.assert_array_equal(x, subject.feed(4)["x"])
    half = read_subject(picture_model(tmp_path / "h.onnx", ("n", 3, 64, 64), dtype=10))
    assert half.feed(1)["x"].dtype == np.float16


def test_every_input_is_fed(tmp_path: Path) -> None:
    g = SmallGraph(("n", 4))
    g.inputs.append(helper.make_tensor_value_info("index", 7, ("n",)))
    g.output_shape = ("n", 4)
    path = g.save(tmp_path / "two.onnx", g("Add", "x", g("Gather", sample(9, 4), "index")))
    feed = read_subject(path).feed(3)
    assert {k: (v.shape, v.dtype.name) for k, v in feed.items()} == {
        "x": ((3, 4), "float32"),
        "index": ((3,), "int64"),
    }
    assert not feed["index"].any()


def test_size_counts_weights_beside_the_file(tmp_path: Path) -> None:
    g = SmallGraph(("n", 64))
    g.output_shape = ("n", 64)
    whole = g.save(tmp_path / "whole.onnx", g("MatMul", "x", sample(64, 64)))
    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(whole), path, save_as_external_data=True, location="w.bin")
    weights = tmp_path / "w.bin"
    assert weights.stat().st_size == 64 * 64 * 4
    assert read_subject(path).bytes == path.stat().st_size + weights.stat().st_size
    weights.unlink()
    with pytest.raises(ModelError, match=r"w\.bin"):
        read_subject(path)


@pytest.mark.parametrize("op", ["plain", "Q", "integer"])
def test_what_counts_as_quantized(tmp_path: Path, op: str) -> None:
    g = SmallGraph(("n", 4))
    g.output_shape = ("n", 4)
    if op == "plain":
        last = g("MatMul", "x", sample(4, 4))
    elif op == "Q":
        last = g("DequantizeLinear", g("QuantizeLinear", "x", 0.1), 0.1)
    else:
        codes = g("QuantizeLinear", "x", 0.1, np.array(0, np.int8))
        weight = np.ones((4, 4), np.int8)
        last = g("Cast", g("MatMulInteger", codes, weight), to=1)
    assert read_subject(g.save(tmp_path / "m.onnx", last)).quantized == (op != "plain")


def test_refused_inputs(tmp_path: Path) -> None:
    g = SmallGraph(("n", 4))
    g.inputs = []
    path = g.save(tmp_path / "none.onnx", g("Add", sample(1, 4), sample(1, 4)))
    with pytest.raises(ModelError, match="has no input"):
        read_subject(path)
    scalar = SmallGraph(())
    path = scalar.save(tmp_path / "scalar.onnx", scalar("Neg", "x"))
    with pytest.raises(ModelError, match="known rank"):
        read_subject(path)
