"""Codes of weights in 4 bits: the same numbers and kernels in ONNX Runtime, half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from prepared_models import images, quantized
from small_graph import SmallGraph, assert_shapes, run, sample
from test_known_lowering import activation
from test_targets import run as run_optimised

from ptq_onnx.api import quantize
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.codes.multiples import MultipleCodes
from ptq_onnx.numerics.fake_quantize import dequantize, fake_quantize
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.multiples import rounded_in_blocks
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.four_bits import store_in_four_bits
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.coding import constant
from ptq_onnx.targets.checking.optimised import optimised_histogram

K, N = 48, 32


def linear(bits: int, *, coded: bool, weight: TensorSpec | None = None) -> ir.Model:
    """Relu → MatMul with quantized weights → Add, lowered; the input in codes or in float."""
    g = SmallGraph(("batch", 6, K))
    y = g("Add", g("MatMul", g("Relu", "x"), g.const(sample(K, N), "w")), sample(N, seed=1))
    model = g.model(g("Relu", y))
    fuse(model)
    largest = (1 << bits - 1) - 1
    scale = (np.abs(sample(K, N)).max(axis=0) / largest).astype(np.float32)
    rule = Rule(bits, grain=PerChannel())
    specs = {"w": weight or TensorSpec("w", rule, scale, np.zeros(N, np.int32), 1)}
    if coded:
        specs["relu0"] = activation("relu0")
    return lower(model, specs)


def initializers(model: ir.Model | onnx.ModelProto) -> dict[str, NDArray[Any]]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


def assert_same(
    plain: ir.Model, packed: ir.Model, x: NDArray[Any], coded: bool, folder: Path
) -> list[Path]:
    """Outputs to the bit, optimizations on and off, and the kernels; the files of both."""
    assert_shapes(packed, x)
    np.testing.assert_array_equal(run(packed, x)[0], run(plain, x)[0])
    paths = []
    for name, model in (("plain", plain), ("packed", packed)):
        paths.append(folder / f"{name}.onnx")
        graphs.save(graphs.to_standard(model), paths[-1])
    expected, found = (run_optimised(path, x) for path in paths)
    np.testing.assert_array_equal(found, expected)
    before, after = map(optimised_histogram, paths)
    assert after == before
    assert ("MatMulIntegerToFloat" in after) == coded
    assert not any("NBits" in op for op in after)
    return paths


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("coded", [True, False])
def test_outputs_and_kernels_stay(bits: int, coded: bool, tmp_path: Path) -> None:
    """To the bit, with optimizations on and off; the product's kernel is the one it was."""
    plain, packed = linear(bits, coded=coded), linear(bits, coded=coded)
    assert store_in_four_bits(packed) == 1
    paths = assert_same(plain, packed, sample(3, 6, K, seed=2), coded, tmp_path)
    held = initializers(onnx.load(paths[1]))["w_quantized_int4"]
    assert str(held.dtype) == "int4"
    assert paths[0].stat().st_size - paths[1].stat().st_size > K * N / 2 - 200
    rules = {v.rule for v in check(paths[1], "onnxruntime").violations}
    assert rules == {v.rule for v in check(paths[0], "onnxruntime").violations}


@pytest.mark.parametrize("coded", [True, False])
def test_zero_points_of_columns(coded: bool, tmp_path: Path) -> None:
    """A column's codes count from a zero point of its own, in the integer kernel and in float."""
    scale = np.linspace(0.2, 0.5, N, dtype=np.float32)
    zero = np.arange(N, dtype=np.int32) % 16 - 8
    spec = TensorSpec("w", Rule(4, True, False, PerChannel()), scale, zero, 1)
    model = linear(4, coded=coded, weight=spec)
    assert store_in_four_bits(model) == 1
    x = sample(3, 6, K, seed=2)
    read = np.maximum(x, 0)
    read = fake_quantize(read, activation("relu0")) if coded else read
    made = read @ fake_quantize(sample(K, N), spec) + sample(N, seed=1)
    path = tmp_path / "packed.onnx"
    graphs.save(graphs.to_standard(model), path)
    for found in (run(model, x)[0], run_optimised(path, x)):
        np.testing.assert_allclose(found, np.maximum(made, 0), rtol=1e-4, atol=2e-4)
    assert ("MatMulIntegerToFloat" in optimised_histogram(path)) == coded


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("rows", [48, 300])
def test_blocks_of_rows(rows: int, coded: bool, tmp_path: Path) -> None:
    """As what is multiplied, a last block of fewer rows too; outputs and kernels are those of int8
    codes, to the bit, and what is read back are these codes."""
    weight = sample(rows, N) * np.geomspace(0.1, 3, rows, dtype=np.float32)[:, None]
    found = rounded_in_blocks(weight, np.eye(rows), 4)
    zero, rule = np.zeros(N, np.int32), Rule(4, grain=PerChannel(), code=MultipleCodes())
    spec = TensorSpec("w", rule, found.step, zero, 1, order=found.order)
    g = SmallGraph(("batch", 6, rows))
    y = g("Add", g("MatMul", g("Relu", "x"), g.const(dequantize(found.codes, spec), "w")),
          sample(N, seed=1))  # fmt: skip
    model = g.model(g("Relu", y))
    fuse(model)
    specs = {"w": spec, **({"relu0": activation("relu0")} if coded else {})}
    plain, packed = lower(model.clone(), specs), lower(model.clone(), specs)
    assert store_in_four_bits(packed) == 1
    paths = assert_same(plain, packed, sample(3, 6, rows, seed=2), coded, tmp_path)
    arrays = [a for a in initializers(onnx.load(paths[1])).values() if a.ndim == 3]
    small = (-(-rows // 32), 1, N)
    held = sorted((a.dtype.name, a.shape) for a in arrays)
    assert held == [("int4", small), ("int4", (small[0], 32, N)), ("uint4", small)]
    read = [n.inputs[0] for n in packed.graph if n.op_type == "DequantizeLinear"]
    codes = [held for v in read if (held := constant(v)) is not None]
    assert len(codes) == 1
    np.testing.assert_array_equal(codes[0], found.codes)
    rules = [[v.rule for v in check(path, "onnxruntime").violations] for path in paths]
    assert rules[0] == rules[1] == ([] if coded else ["float-product"])


def test_codes_of_more_bits_stay() -> None:
    model = linear(5, coded=True)
    assert store_in_four_bits(model) == 0
    assert "Cast" not in {n.op_type for n in model.graph}


def test_codes_that_two_read_are_widened_once() -> None:
    g = SmallGraph((4, 8))
    codes = g.const(np.arange(-8, 8, dtype=np.int8).reshape(8, 2), "codes")
    one, other = (g("MatMul", "x", g("DequantizeLinear", codes, g.const(s))) for s in (0.5, 0.25))
    model = g.model(one, other)
    x = sample(4, 8)
    before = run(model, x)
    assert store_in_four_bits(model) == 1
    assert [n.op_type for n in model.graph].count("Cast") == 1
    assert "codes" not in model.graph.initializers
    for found, expected in zip(run(model, x), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_file_of_lowbit_has_them(tmp_path: Path) -> None:
    """All but patch embedding and head, which have 8 bits; it computes what was simulated."""
    model = Path(__file__).resolve().parents[2] / "models/digits_vit.onnx"
    calib = model.parents[1] / "img/digits/calib"
    quantize(
        model, output=tmp_path / "out", calib=calib, quantizer="lowbit", bits="4/4/4", images=8,
        threads=1, report=False,
    )  # fmt: skip
    path = tmp_path / "out/quantized.onnx"
    arrays = initializers(onnx.load(path)).values()
    assert [str(a.dtype) for a in arrays if a.ndim == 2].count("int8") == 2
    blocks = [a for a in arrays if a.ndim == 3 and a.shape[1] == 32]
    assert {str(a.dtype) for a in blocks} == {"int4"}
    assert len(blocks) == 36
    x = images()[:4]
    quantizer = quantized(calibration=images()[:8], quantizer="lowbit", bits="4/4/4")
    plain = graphs.to_standard(lower(quantizer.model, quantizer.specs))
    packed = graphs.to_standard(lower(quantizer.model, quantizer.specs))
    store_in_four_bits(packed)
    for name, one in (("plain", plain), ("packed", packed)):
        graphs.save(one, tmp_path / f"{name}.onnx")
    found, expected = (run_optimised(tmp_path / f"{n}.onnx", x) for n in ("packed", "plain"))
    np.testing.assert_array_equal(found, expected)
