"""The seam to PPQ: import, graph, configs, and simulation against ONNX Runtime."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from prepared_models import DIGITS, ROOT, decibels, images, prepared, quantized, subject
from small_graph import SmallGraph, run, sample
from small_transformer import Choices, transformer

from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.engine.executor import Mode
from ptq_onnx.engine.ppq_graph import FAKE, ORIGIN, build_graph
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.engine.vit_quantizer import calibrate_config, config_for, is_active
from ptq_onnx.errors import ModelError
from ptq_onnx.evaluation.network import session
from ptq_onnx.numerics.codes.log2 import Log2, log2_codes
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer

Array = NDArray[np.float32]
OPTIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"quantizer": "vanilla"},
    "channelwise all": {"quantizer": "channelwise", "per_channel": ("all",)},
    "fqvit": {},
    "fqvit 8/8/4": {"bits": "8/8/4"},
    "deploy": {"quantizer": "deploy"},
}
MODES: tuple[Mode, ...] = ("exact", "torch")


@cache
def quantizer_of(name: str) -> SiteQuantizer:
    return quantized(**OPTIONS[name])


# --- PPQ ----------------------------------------------------------------------------------------


def test_ppq_imports_with_the_stand_ins_and_says_nothing() -> None:
    """In a fresh interpreter, as users start it."""
    code = (
        "import ptq_onnx.engine.simulator, sys, onnx;"
        "import ppq, ppq.executor, ppq.parser;"
        "assert sys.modules['ppq.parser.caffe.ppl_caffe_pb2'].NetParameter;"
        "assert onnx.mapping.TENSOR_TYPE_TO_NP_TYPE[1] == 'float32'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_only_the_engine_imports_ppq() -> None:
    found = {
        path.relative_to(ROOT / "ptq_onnx").as_posix()
        for path in (ROOT / "ptq_onnx").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import ppq", "from ppq"))
    }
    assert found == {"engine/ppq_import.py"}


def test_the_graph_keeps_names_and_kinds() -> None:
    model = prepared(DIGITS).model
    graph = build_graph(model)
    assert list(graph.operations) == [name_of(node) for node in model.graph]
    assert list(graph.inputs) == ["input"]
    assert list(graph.outputs) == ["logits"]
    kinds = Counter(op.type for op in graph.operations.values())
    assert kinds["PPQBiasFusedMatMul"] == sum(is_linear(n) for n in model.graph) == 25
    for node in model.graph:
        operation = graph.operations[name_of(node)]
        assert [v.name for v in operation.outputs] == [v.name for v in node.outputs]
        assert len(operation.inputs) == len(node.inputs)
        for variable in operation.inputs:
            assert operation in variable.dest_ops
            assert not variable.is_parameter or len(variable.dest_ops) == 1


def test_a_shared_parameter_is_given_to_each_reader() -> None:
    g = SmallGraph(("batch", 4, 8))
    weight = g.const(sample(8, 8), "w")
    first = g("MatMul", "x", weight)
    model = g.model(g("Add", g("MatMul", first, weight), first))
    graph = build_graph(model)
    copies = {k: v for k, v in graph.extension_attrib[ORIGIN].items() if v == "w"}
    assert len(copies) == 2
    for name in copies:
        assert torch.equal(graph.variables[name].value, torch.from_numpy(sample(8, 8)))
    for mode in MODES:
        found = Simulator(model, mode=mode, threads=1).run(sample(2, 4, 8))
        np.testing.assert_allclose(
            found[model.graph.outputs[0].name], run(model, sample(2, 4, 8))[0], atol=1e-4
        )


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(4), Rule(8, False, False), Rule(6, grain=PerChannel())]
)
def test_configs_say_what_the_rule_says(rule: Rule) -> None:
    config = config_for(rule)
    assert (config.quant_min, config.quant_max) == rule.limits
    assert config.num_of_bits == rule.bits
    assert config.rounding.name == "ROUND_HALF_EVEN"
    assert not is_active(config)
    wide = rule.granularity == "channel"
    scale = np.linspace(0.1, 0.2, 5).astype(np.float32) if wide else np.array(0.25, np.float32)
    zero = np.full(scale.shape, 0 if rule.symmetric else 7, np.int32)
    calibrate_config(config, TensorSpec("x", rule, scale, zero, 1 if wide else None))
    assert is_active(config)
    np.testing.assert_array_equal(config.scale.numpy(), scale)
    np.testing.assert_array_equal(config.offset.numpy(), zero)
    if wide:
        assert config.channel_axis == 1


def test_every_spec_has_an_active_config() -> None:
    quantizer = quantizer_of("fqvit")
    assert len(quantizer.specs) > 100
    assert all(quantizer.is_active(tensor) for tensor in quantizer.specs)
    assert not any(quantizer.is_active(tensor) for tensor in quantizer.floats)
    assert not quantizer.is_active("no such tensor")


# --- float --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_float_simulation_is_onnx_runtimes(mode: Mode) -> None:
    model = prepared(DIGITS).model
    found = Simulator(model, mode=mode, threads=1).run(images()[:8])["logits"]
    expected = session(DIGITS, 1, cpu=True).run(None, {"input": images()[:8]})[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.real
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vit", "vit-dynamo", "deit"])
def test_float_simulation_of_real_models(
    real_models: dict[str, Path], shared: Path, name: str, mode: Mode
) -> None:
    path = real_models[name]
    x = images(path, shared / "imagenet/calib", 8)[:2]
    found = Simulator(prepared(path).model, mode=mode, threads=1).run(x)
    expected = session(path, 1, cpu=True).run(None, {"input": x})[0]
    np.testing.assert_allclose(next(iter(found.values())), expected, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "choices",
    [Choices(), Choices(packed=False, mask=True), Choices(layer_scale=True, scale="before")],
)
def test_float_variants(choices: Choices, mode: Mode) -> None:
    model = transformer(choices, blocks=2)
    x = sample(3, 6, 8)
    found = next(iter(Simulator(model, mode=mode, threads=1).run(x).values()))
    np.testing.assert_allclose(found, run(model, x)[0], atol=1e-4)


SHAPE = ("batch", 5, 8)
OPS: dict[str, Callable[[SmallGraph], str]] = {
    "layer norm": lambda g: g("LayerNormalization", "x", np.full(8, 2.0), np.ones(8), axis=-1),
    "layer norm without bias": lambda g: g("LayerNormalization", "x", np.full(8, 2.0)),
    "layer norm over two axes": lambda g: g("LayerNormalization", "x", np.ones((5, 8)), axis=1),
    "layer norm epsilon": lambda g: g("LayerNormalization", "x", np.ones(8), epsilon=0.5),
    "gelu": lambda g: g("Gelu", "x"),
    "gelu tanh": lambda g: g("Gelu", "x", approximate="tanh"),
    "softmax": lambda g: g("Softmax", "x"),
    "softmax of an inner axis": lambda g: g("Softmax", "x", axis=1),
    "round": lambda g: g("Round", g("Mul", "x", 4.0)),
    "slice backwards": lambda g: g(
        "Slice", "x", np.array([-1]), np.array([-(2**62)]), np.array([2]), np.array([-3])
    ),
    "slice beyond": lambda g: g("Slice", "x", np.array([2]), np.array([2**62]), np.array([1])),
    "slice of the first axes": lambda g: g("Slice", "x", np.array([0, 1]), np.array([9, 3])),
    "gather": lambda g: g("Gather", "x", np.array([[-1, 0], [2, 2]]), axis=1),
    "gather one": lambda g: g("Gather", "x", np.array(-1), axis=-1),
    "split": lambda g: g("Split", "x", np.array([3, 5]), axis=2, outputs=2) + "_1",
    "split evenly": lambda g: g("Split", "x", axis=1, num_outputs=2, outputs=2) + "_1",
    "reshape": lambda g: g("Reshape", "x", np.array([0, -1, 2])),
    "expand": lambda g: g("Expand", g("Unsqueeze", "x", np.array([1])), np.array([1, 3, 1, 1])),
    "expand keeps": lambda g: g("Expand", "x", np.array([1])),
    "squeeze": lambda g: g("Squeeze", g("Unsqueeze", "x", np.array([0, -1])), np.array([-1, 0])),
    "transpose": lambda g: g("Transpose", "x"),
    "transpose perm": lambda g: g("Transpose", "x", perm=[0, 2, 1]),
    "concat": lambda g: g("Concat", "x", np.ones((3, 1, 8)), "x", axis=-2),
    "mean": lambda g: g("ReduceMean", "x", np.array([1]), keepdims=0),
    "mean of all": lambda g: g("ReduceMean", "x"),
    "mean of none": lambda g: g("ReduceMean", "x", np.array([], np.int64), noop_with_empty_axes=1),
    "sum": lambda g: g("ReduceSum", "x", np.array([-1, 1])),
    "max": lambda g: g("ReduceMax", "x", np.array([-1])),
    "min": lambda g: g("ReduceMin", "x", np.array([1]), keepdims=0),
    "shape": lambda g: g("Cast", g("Shape", "x", start=1, end=-1), to=1),
    "matmul": lambda g: g("MatMul", "x", g("Transpose", "x", perm=[0, 2, 1])),
    # PPQ has none of these: the nodes run alone in ONNX Runtime.
    "einsum": lambda g: g("Einsum", "x", sample(8, 4), equation="bij,jk->bki"),
    "hard swish": lambda g: g("HardSwish", "x"),
    "trilu": lambda g: g("Trilu", "x", upper=0),
    "sine": lambda g: g("Sin", "x"),
    "mish": lambda g: g("Mish", "x"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, mode: Mode) -> None:
    """Ours, PPQ's or ONNX Runtime's own: the same numbers and shapes."""
    g = SmallGraph(SHAPE)
    model = g.model(g("Identity", OPS[op](g)))
    x = sample(3, 5, 8)
    (found,) = Simulator(model, mode=mode, threads=1).run(x).values()
    (expected,) = run(model, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_missing_ops_fall_back() -> None:
    from ptq_onnx.engine.ppq_graph import EXACT
    from ptq_onnx.engine.ppq_import import OPERATION_FORWARD_TABLE

    for kind in ("Einsum", "Trilu", "Mish"):
        assert kind not in OPERATION_FORWARD_TABLE[FAKE]
    g = SmallGraph(SHAPE)
    model = g.model(g("Relu", g("Einsum", "x", sample(8, 4), equation="bij,jk->bik")))
    simulator = Simulator(model, mode="torch", threads=1)
    platforms = {op.type: op.platform for op in simulator.graph.operations.values()}
    assert platforms == {"Einsum": EXACT, "Relu": FAKE}


# --- quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_simulation_is_the_exported_file(name: str, tmp_path: Path) -> None:
    """Plain ONNX Runtime, its optimizations on, at more than one batch size."""
    quantizer = quantizer_of(name)
    model = subject(quantizer).model
    path = tmp_path / "quantized.onnx"
    graphs.save(lower(model, quantizer.specs), path)
    opened = session(path, 1, cpu=True)
    simulator = Simulator(model, quantizer, mode="exact", threads=1)
    for batch in (images()[:1], images()[8:16]):
        expected = opened.run(None, {"input": batch})[0]
        assert decibels(simulator.run(batch)["logits"], expected) >= 100
    plain = session(DIGITS, 1, cpu=True).run(None, {"input": images()[:8]})[0]
    assert 12 < decibels(simulator.run(images()[:8])["logits"], plain) < 60


def made_by(simulator: Simulator, x: Array) -> dict[str, Array]:
    """All float tensors of one run."""
    found: dict[str, Array] = {"input": x}
    simulator.walk(x, lambda name, value: found.__setitem__(name, value.copy()))
    return found


def codes_of(value: Array, spec: TensorSpec) -> NDArray[np.int32]:
    return log2_codes(value, spec.rule.bits) if spec.rule.code == Log2() else quantize(value, spec)


def test_torch_simulation_gives_the_same_codes() -> None:
    """Op by op, fed the exact simulator's own tensors: one code off at most, on 0.1 %.

    End to end rounding is chaotic, so the logits are only asked to be of the same quality.
    ONNX Runtime computes a softmax between uint8 codes by a table (QLinearSoftmax): 2 %.
    """
    model, x = prepared(DIGITS).model, images()[:4]
    for name in ("vanilla", "fqvit", "fqvit 8/8/4"):
        quantizer = quantizer_of(name)
        exact = made_by(Simulator(model, quantizer, mode="exact", threads=1), x)
        simulator = Simulator(model, quantizer, mode="torch", threads=1)
        checked = 0
        for op in simulator.graph.operations.values():
            read = [v.name for v in op.inputs if not v.is_parameter]
            if not all(n in exact for n in (*read, op.outputs[0].name)):
                continue
            feeds = {n: torch.from_numpy(exact[n]) for n in read}
            names = [v.name for v in op.outputs]
            for made, value in zip(
                names, simulator.executor.partial_graph_forward([op], feeds, names), strict=True
            ):
                spec = quantizer.specs.get(made)
                if spec is None:
                    scale = np.abs(exact[made]).max()
                    np.testing.assert_allclose(value, exact[made], atol=1e-5 * scale, err_msg=made)
                    continue
                off = np.abs(codes_of(value.numpy(), spec) - codes_of(exact[made], spec))
                table = op.type == "Softmax" and spec.rule.code == Uniform()
                assert off.max() <= 1, made
                assert np.mean(off > 0) <= (0.02 if table else 0.001), made
                checked += 1
        assert checked >= 60
        logits = simulator.run(x)["logits"]
        assert np.isfinite(logits).all()
        plain = session(DIGITS, 1, cpu=True).run(None, {"input": x})[0]
        ratio = decibels(logits, plain) - decibels(exact["logits"], plain)
        assert abs(ratio) < 6


def test_torch_products_of_channel_scales_are_float() -> None:
    """x̂ Ŵ + b between quantized values, in NumPy, for every linear of channelwise.

    ONNX Runtime itself fuses DequantizeLinear → MatMul on float inputs to MatMulNBits, which
    rounds its input to 8 bits once more: the exact simulator and the file stay close, not equal.
    """
    model, x = prepared(DIGITS).model, images()[:4]
    quantizer = quantizer_of("channelwise all")
    exact = made_by(Simulator(model, quantizer, mode="exact", threads=1), x)
    simulator = Simulator(model, quantizer, mode="torch", threads=1)
    linears = [o for o in simulator.graph.operations.values() if o.type == "PPQBiasFusedMatMul"]
    assert len(linears) == 25
    for op in linears:
        read, weight, bias = op.inputs
        made = op.outputs[0].name
        value = simulator.executor.partial_graph_forward(
            [op], {read.name: torch.from_numpy(exact[read.name])}, [made]
        )[0].numpy()
        spec = quantizer.specs[
            simulator.graph.extension_attrib[ORIGIN].get(weight.name, weight.name)
        ]
        rounded = weight.value.numpy()
        rounded = dequantize(quantize(rounded, spec), spec)
        expected = exact[read.name] @ rounded + bias.value.numpy()
        out = quantizer.specs.get(made)
        if out is None:
            np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())
            continue
        off = np.abs(quantize(value, out) - quantize(expected, out))
        assert off.max() <= 1
        assert np.mean(off > 0) <= 0.001
        assert np.abs(quantize(exact[made], out) - quantize(expected, out)).max() <= 3
    assert np.isfinite(simulator.run(x)["logits"]).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_quantized_tensors_lie_on_their_grid(name: str) -> None:
    """Every tensor with a spec is a fixed point of it, and has more than one code."""
    quantizer = quantizer_of(name)
    simulator = Simulator(subject(quantizer).model, quantizer, mode="exact", threads=1)
    checked = 0
    for tensor, value in made_by(simulator, images()[:2]).items():
        spec = quantizer.specs.get(tensor)
        if spec is None or tensor == "input":
            continue
        if spec.rule.granularity == "row":
            value = value / value.max(axis=-1, keepdims=True)
        codes = codes_of(value, spec)
        low, high = spec.rule.limits
        assert low <= codes.min() < codes.max() <= high
        if spec.rule.code == Uniform():
            step = spec.scale * (1 if spec.factor is None else spec.factor)
            assert np.abs(dequantize(codes, spec) - value).max() <= 1e-5 * np.max(step) * 256
        checked += 1
    assert checked >= (45 if name == "deploy" else 70)


def test_switched_off_it_is_the_float_model() -> None:
    """No config active: nothing is left quantized, in either mode."""
    from ppq.core import QuantizationStates
    from ppq.IR import QuantableOperation

    quantizer, model = quantized(), prepared(DIGITS).model
    for operation in quantizer.graph.operations.values():
        if isinstance(operation, QuantableOperation):
            for config, _ in operation.config_with_variable:
                if config.dominated_by is config:
                    config.state = QuantizationStates.FP32
    expected = session(DIGITS, 1, cpu=True).run(None, {"input": images()[:4]})[0]
    for mode in MODES:
        found = Simulator(model, quantizer, mode=mode, threads=1).run(images()[:4])["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_two_simulators_of_one_quantizer_do_not_mix() -> None:
    quantizer, model, x = quantizer_of("fqvit"), prepared(DIGITS).model, images()[:2]
    exact = Simulator(model, quantizer, mode="exact", threads=1)
    before = exact.run(x)["logits"]
    other = Simulator(model, quantizer, mode="torch", threads=1)
    torch_logits = other.run(x)["logits"]
    np.testing.assert_array_equal(exact.run(x)["logits"], before)
    np.testing.assert_array_equal(other.run(x)["logits"], torch_logits)


def test_overrides_replace_the_arithmetic_of_a_node() -> None:
    model = prepared(DIGITS).model
    node = next(n for n in model.graph if n.op_type == "Gelu")

    def relu(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.relu(values[0])

    tensor = str(node.outputs[0].name)
    source = str(node.inputs[0].name)  # type: ignore[union-attr]
    for mode in MODES:
        simulator = Simulator(model, mode=mode, threads=1, overrides={name_of(node): relu})
        found = simulator.run(images()[:1], [tensor, source])
        np.testing.assert_array_equal(found[tensor], np.maximum(found[source], 0))


def test_tensors_by_name() -> None:
    model = prepared(DIGITS).model
    simulator = Simulator(model, threads=1)
    site = next(s for s in prepared(DIGITS).sites.values() if s.role == "qk")
    found = simulator.run(images()[:2], [site.tensor, "logits"])
    assert found[site.tensor].shape == (2, *site.shape[1:])
    seen: dict[str, Any] = {}
    simulator.walk(images()[:2], seen.__setitem__)
    np.testing.assert_array_equal(seen[site.tensor], found[site.tensor])
    np.testing.assert_array_equal(seen["logits"], found["logits"])
    for name in ("no such tensor", "input", "pos_embed"):
        with pytest.raises(ModelError, match="no tensor"):
            simulator.run(images()[:1], [name])


def test_the_model_is_left_as_it_was() -> None:
    model: ir.Model = prepared(DIGITS).model
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    Simulator(model, quantizer_of("fqvit"), threads=1).run(images()[:1])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
