"""Graphwise: every quantized op is there, and its error is that of an independent run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from prepared_models import DIGITS, ROOT, images, prepared, quantized, subject

from ptq_onnx.analysis.graphwise import graphwise
from ptq_onnx.analysis.results import Graphwise
from ptq_onnx.analysis.tokens import Tokens, find_tokens, patch_layout
from ptq_onnx.blocks.walking import is_layout, is_linear, name_of
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ModelError
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer

VIT = "vit_tiny_patch16_224.opset14.onnx"


def run(path: Path, quantizer: SiteQuantizer, batches: list[np.ndarray]) -> Graphwise:
    p = subject(quantizer, path)
    return graphwise(
        p.model, quantizer, p.blocks, batches, held_apart=True, sites=p.sites, threads=1
    )


@pytest.mark.parametrize("name", ["vanilla", "channelwise", "fqvit", "deploy"])
def test_every_quantized_op_is_counted(name: str) -> None:
    """Each tensor with a spec has its row, and so has every op that makes, reads or weighs one."""
    quantizer = quantized(quantizer=name)
    found = run(DIGITS, quantizer, [images()[:1]])
    p = subject(quantizer)
    tensors = {op.tensor for op in found.ops}
    activations = {t for t in quantizer.specs if not p.sites[t].is_parameter}
    made = {v.name for n in p.model.graph for v in n.outputs}
    assert activations & made <= tensors
    touching = {
        name_of(n)
        for n in p.model.graph
        if not is_layout(n)
        and any(v is not None and v.name in quantizer.specs for v in (*n.inputs, *n.outputs))
    }
    nodes = [op.node for op in found.ops]
    assert touching <= set(nodes)
    compute = [n for n in p.model.graph if not is_layout(n)]
    by_layout = [
        v for n in p.model.graph if is_layout(n) for v in n.outputs if v.name in quantizer.specs
    ]
    assert len(nodes) == len(compute) + len(by_layout)
    parts = {op.tensor: op.role for op in found.ops if op.role in ("q", "k", "v")}
    linears = {str(n.outputs[0].name) for n in p.model.graph if is_linear(n)}
    assert {t: role for t, role in parts.items() if t not in linears} == {
        s.tensor: s.role for s in p.sites.values() if s.role in ("q", "k", "v") and s.tensor in made
    }


# --- an interpreter of its own: one op after the other, rounding by the formula ----------------


def rounded(x: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """FQ-ViT's formulas, written anew; in float32, as pixels lie just between two codes."""
    if spec.rule.code == Log2():
        top = min((1 << spec.rule.bits) - 1, 126)
        with np.errstate(divide="ignore"):
            t = np.rint(np.float32(1) / x).astype(np.float64)
        low = np.floor(np.log2(t))
        code = low + (t >= 1.5 * 2.0**low)
        return np.where(code >= top, 0.0, 2.0**-code)
    shape = [1] * x.ndim
    if spec.axis is not None:
        shape[spec.axis] = -1
    scale = spec.scale.reshape(shape if spec.scale.ndim else ())
    factor = np.float32(1) if spec.factor is None else spec.factor
    smallest, largest = spec.rule.limits
    zero = int(np.max(spec.zero_point))
    codes = np.clip(np.rint(x / factor / scale) + zero, smallest, largest)
    return np.asarray((codes - zero) * scale * factor)


def interpret(
    model: ir.Model,
    specs: dict[str, TensorSpec],
    image: np.ndarray,
    wanted: set[str],
    given: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Tensors of the model on one batch, quantized by ``specs``, node by node.

    ``given``: values that readers get in place of those computed here.
    """
    values: dict[str, Any] = {}
    kept: dict[str, np.ndarray] = {}
    opset = model.graph.opset_imports[""]

    def keep(name: str, value: np.ndarray) -> None:
        if name in specs and value.dtype == np.float32:
            spec = specs[name]
            row = spec.rule.granularity == "row"
            top = value.max(axis=-1, keepdims=True) if row else np.float32(1)
            value = (rounded(value / top, spec) * top).astype(np.float32)
        values[name] = value if given is None else given.get(name, value)
        if name in wanted:
            kept[name] = value

    for name, initializer in model.graph.initializers.items():
        assert initializer.const_value is not None
        keep(name, initializer.const_value.numpy())
    (start,) = [v for v in model.graph.inputs if not v.is_initializer()]
    keep(str(start.name), image)
    for node in model.graph:
        inputs = [None if v is None else values[str(v.name)] for v in node.inputs]
        if node.op_type == "Linear":
            product = inputs[0].astype(np.float64) @ inputs[1].astype(np.float64)
            bias = 0 if len(inputs) < 3 or inputs[2] is None else inputs[2].astype(np.float64)
            outputs = [(product + bias).astype(np.float32)]
        elif node.op_type == "MatMul":
            outputs = [(inputs[0].astype(np.float64) @ inputs[1]).astype(np.float32)]
            spec = specs.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
            if spec is not None and RowSums() in spec.rule.around:
                outputs[0] /= inputs[0].sum(axis=-1, keepdims=True)
        else:
            outputs = alone(node, inputs, opset)
        for value, array in zip(node.outputs, outputs, strict=True):
            keep(str(value.name), array)
    return kept


SESSIONS: dict[Any, ort.InferenceSession] = {}


def alone(node: ir.Node, inputs: list[Any], opset: int) -> list[np.ndarray]:
    """One standard node in ONNX Runtime, without optimizations."""
    proto = ir.to_proto(node)
    names = {n: v for n, v in zip(proto.input, inputs, strict=True) if n}
    key = proto.SerializeToString(), *(v.shape for v in names.values())
    if key not in SESSIONS:
        SESSIONS[key] = open_alone(proto, names, opset)
    used = {i.name for i in SESSIONS[key].get_inputs()}
    return list(SESSIONS[key].run(None, {n: v for n, v in names.items() if n in used}))


def open_alone(
    proto: onnx.NodeProto, names: dict[str, np.ndarray], opset: int
) -> ort.InferenceSession:
    kinds = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_tensor_value_info(n, kinds(v.dtype), v.shape) for n, v in names.items()],
        [onnx.helper.make_tensor_value_info(n, 0, None) for n in proto.output],
    )
    for output in graph.output:
        output.ClearField("type")
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def differences(
    path: Path, quantizer: SiteQuantizer, data: np.ndarray, *follow: bool
) -> list[dict[str, float]]:
    """SNR of ten ops at random in dB, less that of the interpreter; once for each ``follow``.

    ``follow``: every op of the interpreter reads what the simulator's ops read. Without,
    a difference in the last bit becomes a step where it crosses the middle between two codes,
    and the steps add up along the network: two correct runs differ.
    """
    batches = [data[i : i + 16] for i in range(0, len(data), 16)]
    found = run(path, quantizer, batches)
    model = subject(quantizer, path).model
    chosen = np.random.default_rng(7).choice(len(found.ops), 10, replace=False)
    ops = {found.ops[i].tensor: found.ops[i] for i in chosen}
    simulator = Simulator(model, quantizer, threads=1)
    made = [str(v.name) for n in model.graph for v in n.outputs]
    signal = dict.fromkeys(ops, 0.0)
    noise = {way: dict.fromkeys(ops, 0.0) for way in follow}
    for batch in batches:
        floats = {k: v.astype(np.float64) for k, v in interpret(model, {}, batch, set(ops)).items()}
        for name in ops:
            signal[name] += float((floats[name] ** 2).sum())
        for way in follow:
            given = simulator.run(batch, made) if way else None
            others = interpret(model, quantizer.specs, batch, set(ops), given)
            for name in ops:
                noise[way][name] += float(((others[name] - floats[name]) ** 2).sum())
    return [
        {
            f"{op.role} {op.block}": op.snr_db - 10 * np.log10(signal[name] / noise[way][name])
            for name, op in ops.items()
        }
        for way in follow
    ]


@pytest.mark.parametrize(
    "options", [{"quantizer": "fqvit", "lis": True}, {"quantizer": "deploy"}], ids=str
)
def test_snr_of_ten_ops_is_that_of_a_slow_interpreter(options: dict[str, Any]) -> None:
    data = images(DIGITS, ROOT / "img/digits/val", 64)
    (found,) = differences(DIGITS, quantized(**options), data, False)
    assert max(map(abs, found.values())) < 0.1, found


def test_snr_of_ten_ops_that_follow_the_simulator() -> None:
    """Uniform maps have many codes, and a last bit moves some of the ops behind."""
    data = images(DIGITS, ROOT / "img/digits/val", 64)
    (found,) = differences(DIGITS, quantized(quantizer="fqvit"), data, True)
    assert max(map(abs, found.values())) < 1e-4, found


@pytest.mark.real
@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": "fqvit", "lis": True},
        pytest.param({"quantizer": "vanilla"}, marks=pytest.mark.full_matrix),
    ],
    ids=str,
)
def test_snr_of_ten_ops_on_a_real_model(shared: Path, options: dict[str, Any]) -> None:
    path = shared / "models" / VIT
    data = images(path, shared / "imagenet/calib", 20)
    quantizer = quantized(path, data[:16], **options)
    following, found = differences(path, quantizer, data[16:], True, False)
    assert max(map(abs, following.values())) < 0.1, following
    assert max(map(abs, found.values())) < 0.6, found
    assert np.median(np.abs(list(found.values()))) < 0.1, found


def tapped(model: onnx.ModelProto, tensor: str, spec: TensorSpec | None) -> tuple[str, bool]:
    """The tensor of a file that stands for one of the fused graph; whether it holds codes."""
    made = {name for node in model.graph.node for name in node.output}
    if spec is not None and spec.rule.code == Uniform():
        for name in (f"{tensor}_renormalized_quantized", f"{tensor}_quantized"):
            if name in made:
                return name, True
    names = (f"{tensor}_renormalized", f"{tensor}_dequantized", tensor)
    return next(n for n in names if n in made), False


def scaled_by(file: onnx.ModelProto, plain: onnx.ModelProto, tensor: str) -> np.ndarray:
    """The factors per channel that moved from a tensor's codes into the bias before it."""
    node = next(n for n in file.graph.node if tensor in n.output)
    new, old = ({t.name: t for t in m.graph.initializer} for m in (file, plain))
    for name in node.input:
        if name in new and (before := old.get(name.removesuffix("_scaled"))) and name not in old:
            bias, scaled = map(onnx.numpy_helper.to_array, (before, new[name]))
            return np.where(bias == 0, 1, scaled / np.where(bias == 0, 1, bias))
    return np.ones(())


def read_alone(model: onnx.ModelProto, tensor: str, data: np.ndarray) -> np.ndarray:
    """One tensor of a file, ONNX Runtime's optimizations on: another tap would change them."""
    return read_together(model, [tensor], data)[tensor]


def read_together(
    model: onnx.ModelProto, tensors: list[str], data: np.ndarray
) -> dict[str, np.ndarray]:
    own = onnx.ModelProto()
    own.CopyFrom(model)
    known = {o.name for o in own.graph.output}
    own.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in known)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    opened = ort.InferenceSession(
        own.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = opened.get_inputs()[0].name
    parts = [opened.run(tensors, {name: data[i : i + 4]}) for i in range(0, len(data), 4)]
    return {t: np.concatenate([p[k] for p in parts]) for k, t in enumerate(tensors)}


@pytest.mark.real
@pytest.mark.parametrize("name", ["fqvit", "deploy"])
def test_snr_of_ten_ops_is_that_of_the_file(name: str, shared: Path) -> None:
    """End to end: the tensors of the written file in ONNX Runtime against those of the float
    one, codes turned into numbers by the formula."""
    path = shared / "models" / VIT
    data = images(path, shared / "imagenet/calib", 20)
    quantizer = quantized(path, data[:16], quantizer=name)
    found = run(path, quantizer, [data[16:]])
    p = subject(quantizer, path)
    file = ir.to_proto(to_standard(lower(p.model, quantizer.specs)))
    plain = ir.to_proto(to_standard(lower(p.model, {})))
    difference = {}
    chosen = [found.ops[i] for i in np.random.default_rng(11).choice(len(found.ops), 10, False)]
    floats = read_together(plain, [op.tensor for op in chosen], data[16:])  # no codes to change
    for op in chosen:
        spec = quantizer.specs.get(op.tensor)
        place, codes = tapped(file, op.tensor, spec)
        value = read_alone(file, place, data[16:]).astype(np.float64)
        value /= scaled_by(file, plain, place)
        if codes and spec is not None:
            scale = float(spec.scale) * (1 if spec.factor is None else spec.factor.astype(float))
            if spec.rule.granularity == "row":
                scale *= read_alone(file, op.tensor, data[16:]).max(axis=-1, keepdims=True)
            shift = 128 if spec.rule.signed and spec.rule.stored == "uint8" else 0
            value = (value - shift - int(spec.zero_point)) * scale
        f = floats[op.tensor].astype(np.float64)
        snr_db = 10 * np.log10((f**2).sum() / ((value - f) ** 2).sum())
        difference[f"{op.role} {op.block}"] = op.snr_db - snr_db
    assert max(map(abs, difference.values())) < 0.1, difference


def test_class_token_and_patches_apart() -> None:
    tokens = Tokens(count=5, extra=1, rows=2, columns=2)
    for shape, axis in (((2, 5, 7), 1), ((2, 3, 5, 4), 2), ((2, 3, 5, 5), 2), ((2, 3, 4, 5), 3)):
        value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        first, rest = tokens.split(value) or (None, None)
        np.testing.assert_array_equal(first, value.take([0], axis))
        np.testing.assert_array_equal(rest, value.take([1, 2, 3, 4], axis))
    assert tokens.split(np.zeros((2, 5), np.float32)) is None
    assert tokens.split(np.zeros((2, 4, 7), np.float32)) is None
    assert patch_layout((1, 3, 197, 197), (3, 224, 224)) == (14, 14, 1)


def test_class_token_errors_add_up_to_the_whole() -> None:
    quantizer = quantized(quantizer="vanilla")
    found = run(DIGITS, quantizer, [images()[:2]])
    p = prepared(DIGITS)
    tokens = find_tokens(p.model, p.blocks)
    assert tokens is not None
    op = next(o for o in found.ops if (o.role, o.block) == ("residual1", 2))
    simulators = Simulator(p.model, None, threads=1), Simulator(p.model, quantizer, threads=1)
    f, q = (s.run(images()[:2], [op.tensor])[op.tensor].astype(np.float64) for s in simulators)
    for part, got in ((slice(0, 1), op.class_db), (slice(1, None), op.patch_db)):
        noise = ((q - f)[:, part] ** 2).sum() / (f[:, part] ** 2).sum()
        assert got == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    head = next(o for o in found.ops if o.role == "head")
    assert head.class_db is None
    assert found.logits is not None
    assert found.logits.snr_db == pytest.approx(head.snr_db)


def scaled(model: ir.Model, tensor: str, by: float) -> ir.Model:
    """A float model whose norm is larger, and the linear behind it smaller by the same."""
    copy = model.clone()
    norm = next(n for n in copy.graph if n.outputs[0].name == tensor)
    (linear,) = [n for n in copy.graph if n.op_type == "Linear" and n.inputs[0] is norm.outputs[0]]
    change: list[tuple[Any, Callable[[np.ndarray], np.ndarray]]] = [
        (norm.inputs[1], lambda x: x * by),
        (norm.inputs[2], lambda x: x * by),
        (linear.inputs[1], lambda x: x / by),
    ]
    for value, function in change:
        value.const_value = ir.tensor(function(value.const_value.numpy()).astype(np.float32))
    return copy


def test_an_equalised_model_is_compared_where_it_can_be() -> None:
    """Its changed tensors with its own float values, the logits with the reference."""
    p = prepared(DIGITS)
    quantizer = quantized(quantizer="vanilla")
    norm = next(s.tensor for s in p.sites.values() if (s.role, s.block) == ("norm2", 1))
    reference = scaled(p.model, norm, 64.0)
    found = graphwise(
        p.model, quantizer, p.blocks, [images()[:2]], held_apart=True, sites=p.sites, threads=1,
        reference=Simulator(reference, None, threads=1), own=Simulator(p.model, None, threads=1),
    )  # fmt: skip
    plain = run(DIGITS, quantizer, [images()[:2]])
    for one, two in zip(found.ops, plain.ops, strict=True):
        assert one.snr_db == pytest.approx(two.snr_db, abs=0.1), one.node


def test_no_images() -> None:
    with pytest.raises(ModelError, match="no images"):
        run(DIGITS, quantized(quantizer="vanilla"), [])
