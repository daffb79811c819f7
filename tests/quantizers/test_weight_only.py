"""4-bit weights in blocks: the grid on arrays, rounding on it, and the whole job on a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from prepared_models import DIGITS, ROOT, decibels, images, quantized
from small_graph import sample

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.blockwise import block_grid
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import Blocks
from ptq_onnx.numerics.rounding import adaround, gptq, loss, nearest
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.pipeline.quantize import quantize as run_pipeline
from ptq_onnx.pipeline.quantize import read_scales
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.optimised import optimised_histogram


def spec_of(weight: np.ndarray, power: np.ndarray | None = None, size: int = 32) -> TensorSpec:
    rule = Rule(4, False, False, Blocks(size))
    return TensorSpec("w", rule, *block_grid(weight, 4, power, size), axis=0)


@pytest.mark.parametrize("rows", [8, 32, 70, 192])
@pytest.mark.parametrize("size", [16, 32])
def test_each_block_has_a_step_of_its_own(rows: int, size: int) -> None:
    """Codes 0 to 15, zero exact, blocks on different scales do not disturb each other, and no
    block is worse than min-max."""
    weight = sample(rows, 9, seed=1) * np.geomspace(1, 1e4, rows)[:, None].astype(np.float32)
    spec = spec_of(weight, size=size)
    blocks = -(-rows // size)
    assert spec.scale.shape == spec.zero_point.shape == (blocks, 9)
    codes = quantize(weight, spec)
    assert codes.min() >= 0
    assert codes.max() <= 15
    found = dequantize(codes, spec)
    np.testing.assert_array_equal(dequantize(quantize(found, spec), spec), found)
    np.testing.assert_array_equal(dequantize(quantize(0 * weight, spec), spec), 0)
    for block in range(blocks):
        part = slice(block * size, (block + 1) * size)
        w = weight[part].astype(np.float64)
        low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
        step = (high - low) / 15
        zero = np.rint(-low / step)
        plain = (np.clip(np.rint(w / step) + zero, 0, 15) - zero) * step
        mine = ((found[part] - w) ** 2).sum(axis=0)
        assert np.all(mine <= ((plain - w) ** 2).sum(axis=0) * (1 + 1e-5))


def test_power_weighs_the_rows() -> None:
    weight = sample(64, 20, seed=2)
    power = np.where(np.arange(64) % 8 == 0, 1000.0, 1.0)
    with_power, without = (
        dequantize(quantize(weight, s), s) for s in (spec_of(weight, power), spec_of(weight))
    )
    errors = [power @ ((w - weight) ** 2).sum(axis=1) for w in (with_power, without)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -3.0, 1e30])
def test_constant_blocks_stay_finite(value: float) -> None:
    weight = np.full((40, 3), value, np.float32)
    spec = spec_of(weight, np.zeros(40))
    found = dequantize(quantize(weight, spec), spec)
    assert np.all(spec.scale > 0)
    np.testing.assert_allclose(found, weight, rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("method", [gptq, adaround])
def test_rounding_on_blocks(method: object) -> None:
    """Codes stay on the grid and the loss falls, though steps differ from row to row."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2000, 4)) @ random.normal(size=(4, 70)) + random.normal(size=(2000, 70))
    moments = x.T @ x / 2000
    weight = sample(70, 12, seed=3) * np.repeat([1, 5, 0.2], [32, 32, 6])[:, None]
    weight = weight.astype(np.float32)
    spec = spec_of(weight, np.diag(moments))
    scale, zero = (
        spec.rule.grain.spread(v, spec.axis, weight.shape) for v in (spec.scale, spec.zero_point)
    )
    codes = method(weight, scale, moments, 4, zero)  # type: ignore[operator]
    plain = nearest(weight, scale, 4, zero)
    np.testing.assert_array_equal(plain + zero, quantize(weight, spec))
    assert (codes + zero).min() >= 0
    assert (codes + zero).max() <= 15
    before, after = (loss(weight, scale, moments, c) for c in (plain, codes))
    assert np.all(after <= before)
    assert after.sum() < 0.8 * before.sum()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "tensorrt"}, "--target tensorrt: use --target onnxruntime"),
        ({"quantizer": "fqvit"}, "--quantizer fqvit: use --quantizer deploy"),
        ({"bits": "4/8/8"}, "--bits 4/8/8: leave it out"),
        ({"method": "mse"}, "--method mse: leave it out"),
        ({"per_channel": ("fc2",)}, "--per-channel: leave it out"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        QuantizeConfig(weights=4, **options)  # type: ignore[arg-type]
    assert QuantizeConfig(weights=4).quantizer == "deploy"
    with pytest.raises(ConfigError, match="must be 8, or 4"):
        QuantizeConfig(weights=5)


def test_torch_simulates_what_onnxruntime_does() -> None:
    """PPQ's executor rounds the weights as the file does; inputs it leaves in float."""
    quantizer = quantized(quantizer="deploy", weights=4)
    model = quantizer.model
    batch = images()[:4]
    found = [Simulator(model, quantizer, mode=m, threads=1).run(batch) for m in ("exact", "torch")]
    for name in found[0]:
        assert decibels(found[1][name], found[0][name]) > 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "out"
    config = QuantizeConfig(
        weights=4, images=32, analysis_images=8, pictures=False, threads=1, rounding="gptq"
    )
    run_pipeline(DIGITS, config=config, output=folder, calib=ROOT / "img/digits/calib")
    return folder


def test_every_linear_becomes_matmulnbits(made: Path) -> None:
    linears = sum(map(is_linear, quantized(quantizer="deploy", weights=4).model.graph))
    ops = optimised_histogram(made / "quantized.onnx")
    assert ops["MatMulNBits"] == linears
    assert ops.get("DequantizeLinear", 0) == ops.get("Conv", 0) == ops.get("Gemm", 0) == 0


def test_the_checker_takes_the_file(made: Path) -> None:
    found = check(made / "quantized.onnx", "onnxruntime")
    assert not [v for v in found.violations if v.severity == "error"]
    assert {v.rule for v in found.violations} <= {"float-product"}


def test_codes_take_four_bits(made: Path) -> None:
    model = onnx.load(made / "quantized.onnx")
    codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT4]
    weights = [t for t in codes if t.name.endswith("_quantized")]
    floats = sum(t.data_type == 1 for t in model.graph.initializer)
    assert weights
    assert floats
    for tensor in codes:
        assert len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) // 2)
        assert numpy_helper.to_array(tensor).astype(int).max() <= 15
    size = (made / "quantized.onnx").stat().st_size / (made / "fused.onnx").stat().st_size
    assert size < 0.4


def test_file_and_simulator_agree(made: Path) -> None:
    """One kernel at a time, fed with the simulator's floats, gives the file's logits."""
    quantizer = quantized(quantizer="deploy", weights=4, rounding="gptq", images=32)
    batch = images()[:8]
    file = graphs.to_standard(lower(quantizer.model, quantizer.specs))
    session = ort.InferenceSession(graphs.serialize(file))
    expected = session.run(None, {session.get_inputs()[0].name: batch})[0]
    found = Simulator(quantizer.model, quantizer, threads=1).run(batch)
    assert decibels(next(iter(found.values())), expected) > 35


def test_report_and_scales_hold_the_blocks(made: Path) -> None:
    specs = read_scales(made / "report.json")
    assert specs
    assert all(s.rule.grain.block_size == 32 and s.scale.ndim == 2 for s in specs.values())
