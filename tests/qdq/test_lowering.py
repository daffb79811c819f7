"""What lowering writes, and that it computes the numbers of the specs."""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from prepared_models import DIGITS, decibels, images, prepared, quantized, subject
from small_graph import SmallGraph, run, sample, text
from small_transformer import Choices, transformer

from ptq_onnx.blocks.channels import cancels, is_power_of_two, rows_of
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import consumers, is_constant, is_layout, is_linear
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.evaluation.network import session
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.log2 import Log2, log2_codes, log2_values
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import PerChannel, PerTensor, PowersOfTwo
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.preparation.model_files import serialize, to_standard
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.qdq.weights import reads_codes
from ptq_onnx.quantizers.base import SiteQuantizer

Array = NDArray[np.float32]
OPTIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"quantizer": "vanilla"},
    "channelwise": {"quantizer": "channelwise"},
    "channelwise all": {"quantizer": "channelwise", "per_channel": ("all",)},
    "fqvit": {},
    "fqvit log2": {"lis": True},
    "fqvit 8/8/4": {"bits": "8/8/4"},
    "fqvit 4/4/4": {"bits": "4/4/4"},
    "fqvit uniform": {"lis": False, "ptf": False},
    "deploy": {"quantizer": "deploy"},
    "partly float": {"keep_float": ("head", "fc2@1,2", "softmax@0", "norm1@3", "q@2")},
}


@cache
def quantizer_of(name: str) -> SiteQuantizer:
    return quantized(**OPTIONS[name])


@cache
def lowered(name: str) -> tuple[dict[str, TensorSpec], ir.Model]:
    """The specs of the embedded model and its standard form with Q/DQ."""
    quantizer = quantizer_of(name)
    return quantizer.specs, to_standard(lower(quantizer.model, quantizer.specs))


def constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_one_pair_for_every_spec(name: str) -> None:
    """Q and DQ per uniform activation, DQ per weight, a table per log2 map, a sum per map
    whose rows do not sum to one: no more, no less."""
    specs, model = lowered(name)
    sites = quantizer_of(name).plan.sites
    weights = [s for s in specs.values() if sites[s.tensor].is_parameter]
    log2 = [s for s in specs.values() if s.rule.code == Log2()]
    ops = Counter(node.op_type for node in model.graph)
    activations = len(specs) - len(weights) - len(log2)
    assert ops["QuantizeLinear"] == activations
    assert ops["DequantizeLinear"] == activations + len(weights)
    assert ops["Round"] == ops["Log"] == ops["Floor"] == len(log2)
    assert ops["ReduceSum"] == sum((RowSums() in s.rule.around) for s in specs.values())
    assert ops["Clip"] == len(log2) + sum(
        s.rule.bits < 8 for s in specs.values() if s not in log2 and s not in weights
    )
    assert {n.domain for n in model.graph} == {""}


@pytest.mark.parametrize("name", OPTIONS)
def test_activations_have_scalar_scales(name: str) -> None:
    """No Q/DQ per axis around Add and MatMul, which ONNX Runtime's optimizer breaks."""
    model = lowered(name)[1]
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert constant(node.inputs[1]).shape == ()
            assert constant(node.inputs[2]).dtype == np.uint8
            (behind,) = [n for n, _ in consumers(node.outputs[0])]
            assert behind.op_type == "DequantizeLinear"
            assert list(behind.inputs[1:]) == list(node.inputs[1:])


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_are_int8(name: str) -> None:
    """Codes in the file are those of the spec, and the float weight is gone."""
    specs, model = lowered(name)
    initializers = model.graph.initializers
    found = subject(quantizer_of(name))
    original = found.model.graph.initializers
    for tensor, site in found.sites.items():
        if not site.is_parameter:
            continue
        if tensor not in specs:
            continue
        spec = specs[tensor]
        assert tensor not in initializers
        codes = constant(initializers[f"{tensor}_quantized"])
        assert codes.dtype == np.int8
        weight = constant(original[tensor]).astype(np.float32)
        np.testing.assert_array_equal(codes, quantize(weight, spec))
        low, high = spec.rule.limits
        assert low <= codes.min()
        assert codes.max() <= high
        scale = constant(initializers[f"{tensor}_scale"])
        assert scale.ndim == (0 if spec.axis is None else 1)
        if spec.axis is not None:
            assert scale.shape == (weight.shape[spec.axis],)
    floats = [v for v in initializers.values() if v.const_value is not None]
    kept = {str(v.name) for v in floats if v.const_value.dtype == ir.DataType.FLOAT}  # type: ignore[union-attr]
    big = {n for n in kept if constant(initializers[n]).size >= 64 * 64}
    if name == "deploy":
        assert big == {"pos_embed"}
    else:
        assert bool(big) is (name == "partly float")


@pytest.mark.parametrize("name", ["fqvit", "fqvit 8/8/4"])
def test_factors_move_out_of_the_way(name: str) -> None:
    """LayerNorm's factor goes into γ and β and into the rows behind: no Mul on either side."""
    specs, model = lowered(name)
    made = {str(v.name): node for node in model.graph for v in node.outputs}
    original = prepared(DIGITS)
    nodes = {n.name: n for n in original.model.graph}
    moved = 0
    for site in original.sites.values():
        if site.role not in ("norm1", "norm2"):
            continue
        spec = specs[site.tensor]
        norm = made[site.tensor]
        assert norm.op_type == "LayerNormalization"
        (q,) = [n for n, _ in consumers(norm.outputs[0])]
        assert q.op_type == "QuantizeLinear"
        (dq,) = [n for n, _ in consumers(q.outputs[0])]
        assert {n.op_type for n, _ in consumers(dq.outputs[0])} == {"MatMul"}
        factor = np.float32(1) if spec.factor is None else spec.factor
        for index in (1, 2):
            before = constant(nodes[str(site.producer)].inputs[index])
            np.testing.assert_array_equal(constant(norm.inputs[index]) * factor, before)
        moved += spec.factor is not None and bool(np.any(spec.factor != 1))
    assert moved == 12
    names = {str(n.inputs[0].name) for n in model.graph if n.op_type == "Mul" and n.inputs[0]}
    for site in original.sites.values():
        if site.role in ("q", "k", "v", "av"):
            assert not any(n.startswith(site.tensor + "_dequantized") for n in names), site
            assert site.tensor not in names


def test_vanilla_needs_no_multiplication() -> None:
    ops = Counter(node.op_type for node in lowered("vanilla")[1].graph)
    plain = Counter(node.op_type for node in to_standard(prepared(DIGITS).model).graph)
    assert ops - Counter({"QuantizeLinear": 999, "DequantizeLinear": 999}) == plain


@pytest.mark.parametrize("name", OPTIONS)
def test_lowering_is_repeatable_and_leaves_the_model(name: str) -> None:
    model, specs = quantizer_of(name).model, lowered(name)[0]
    before = text(model)
    first, second = serialize(lower(model, specs)), serialize(lower(model, specs))
    assert first == second
    assert text(model) == before


def test_no_specs_change_nothing() -> None:
    model = prepared(DIGITS).model
    assert serialize(lower(model, {})) == serialize(model)


def test_inputs_and_outputs_keep_their_names() -> None:
    """The logits are quantized, and are still the logits."""
    for name in OPTIONS:
        model = lowered(name)[1]
        assert [v.name for v in model.graph.inputs] == ["input"]
        assert [v.name for v in model.graph.outputs] == ["logits"]
        names = [v.name for node in model.graph for v in node.outputs]
        assert len(names) == len(set(names))


def test_stored_zero_points() -> None:
    """Signed codes are stored 128 higher."""
    for rule, zero, stored in (
        (Rule(), 0, 128),
        (Rule(bits=4), 0, 128),
        (Rule(signed=False), 7, 7),
        (Rule(), -5, 123),
    ):
        found = rule.code.stored(np.array(zero, np.int32), rule.stored, rule.signed)
        assert found == stored
        assert found.dtype == np.uint8


def test_powers_of_two() -> None:
    assert is_power_of_two(np.float32([1, 2, 0.125, 2.0**30]))
    assert not is_power_of_two(np.float32([1, 3]))
    assert not is_power_of_two(np.float32([1, 1 + 1e-6]))
    assert cancels(np.float32([2, 4]), np.float32([0.5, 0.25]))
    assert not cancels(np.float32([2, 4]), np.float32([0.5, 0.5]))


def test_rows_of_a_factor_behind_layout_ops() -> None:
    """[heads, 1, depth] on v is [heads · depth] where proj reads it; mixed channels are none."""
    g = SmallGraph(("batch", 2, 5, 4))
    turned = g("Transpose", "x", perm=[0, 2, 1, 3])
    joined = g("Reshape", turned, np.array([0, 5, 8]))
    values = {str(v.name): v for n in g.model(joined).graph for v in (*n.inputs, *n.outputs) if v}
    factor = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
    np.testing.assert_array_equal(rows_of(values["x"], values[joined], factor), np.arange(8))
    assert rows_of(values["x"], values[turned], factor) is None
    tokens = np.arange(5, dtype=np.float32).reshape(1, 5, 1)
    assert rows_of(values["x"], values[joined], tokens) is None


# --- what it computes ---------------------------------------------------------------------------

CODES = [
    (Rule(8), 0), (Rule(4), 0), (Rule(8, False, False), 0), (Rule(8, False, False), 200),
    (Rule(4, False, False), 5), (Rule(2, False, False), 1), (Rule(6, True, True), 0),
]  # fmt: skip
FACTORS = {
    "none": None,
    "ptf": np.exp2(np.arange(8, dtype=np.float32) - 3),
    "ratio": np.linspace(0.1, 1, 8, dtype=np.float32),
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("rule", "zero"), CODES)
def test_one_tensor_is_quantized_to_the_last_bit(rule: Rule, zero: int, factor: str) -> None:
    """Bounds, ties and all: the file's numbers are those of quantizers/uniform.py."""
    g = SmallGraph(("batch", 8))
    made = g("Relu", "x")
    model = g.model(g("Identity", made))
    array = FACTORS[factor]
    spec = TensorSpec(made, rule, np.array(0.125, np.float32), np.array(zero), factor=array)
    grid = np.linspace(-40, 40, 5121, dtype=np.float32)
    x = np.repeat(grid[:, None], 8, axis=1) * (1 if array is None else array)
    found = run(lower(model, {made: spec}), x)[0]
    value = np.maximum(x, 0)
    scaled = value if array is None else value * (1 / array)
    plain = replace(spec, factor=None)
    expected = dequantize(quantize(scaled, plain), plain) * (1 if array is None else array)
    np.testing.assert_array_equal(found, expected)
    if factor != "ratio":
        np.testing.assert_array_equal(found, dequantize(quantize(value, spec), spec))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_log2_codes_in_the_file(bits: int, optimized: bool) -> None:
    """All t below 2^16, ties and zero: Round, Log and Floor in float32 give the exact codes."""
    g = SmallGraph(("batch", 8))
    made = g("Relu", "x")
    model = g.model(g("Identity", made))
    spec = TensorSpec(
        made, Rule(bits, False, False, code=Log2()), np.array(1, np.float32), np.array(0)
    )
    t = np.arange(1, 1 << 16, dtype=np.float64)
    a = np.concatenate([1 / t, 1 / (t[:20000] + 0.5), np.exp2(-np.arange(140.0)), np.zeros(8)])
    a = np.resize(a, (-(-len(a) // 8) * 8,)).reshape(-1, 8).astype(np.float32)
    data = serialize(lower(model, {made: spec}))
    opened = session(data, 1, optimize=optimized, cpu=True)
    found = opened.run(None, {"x": a})[0]
    np.testing.assert_array_equal(found, log2_values(log2_codes(a, bits), bits))


def reference(model: ir.Model, specs: dict[str, TensorSpec], x: Array) -> Array:
    """Float kernels node by node, each tensor of ``specs`` replaced by its rounded self.

    Knows nothing of moved factors, lowered nodes or Q/DQ.
    """
    copy = model.clone()
    for tensor, spec in specs.items():
        value = copy.graph.initializers.get(tensor)
        if value is not None:
            weight = constant(value).astype(np.float32)
            value.const_value = ir.tensor(dequantize(quantize(weight, spec), spec), name=tensor)

    def rounded(name: str, value: Array) -> Array:
        spec = specs.get(name)
        if spec is None:
            return value
        if spec.rule.code == Log2():
            return log2_values(log2_codes(value, spec.rule.bits), spec.rule.bits)
        return dequantize(quantize(value, spec), spec)

    kernels = NodeKernels(copy, {}, 1)
    tensors: dict[str, Any] = {}
    for value in copy.graph.inputs:
        tensors[str(value.name)] = rounded(str(value.name), x)
    for node in copy.graph:
        assert node.name is not None
        read = {name: tensors[name] for name in kernels.inputs(node.name)}
        outputs = list(kernels.run(node.name, frozenset(), read))
        first = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        attention = specs.get(first)
        if attention is not None and (RowSums() in attention.rule.around):
            outputs[0] = outputs[0] / tensors[first].sum(axis=-1, keepdims=True)
        for made, value in zip(node.outputs, outputs, strict=True):
            tensors[str(made.name)] = rounded(str(made.name), value)
    return np.asarray(tensors[str(copy.graph.outputs[0].name)])


def factor_of(site: Site, kind: str, seed: int = 0) -> Array | None:
    """Random powers of two, or ratios, for the channels of a site."""
    if kind == "none" or not site.channel_axes:
        return None
    shape = [
        int(size) if axis in site.channel_axes else 1
        for axis, size in enumerate(site.shape)
        if axis > 0
    ]
    while len(shape) > 1 and shape[0] == 1:
        del shape[0]
    rng = np.random.default_rng(seed)
    if kind == "ptf":
        return np.exp2(rng.integers(0, 4, shape)).astype(np.float32)
    return rng.uniform(0.2, 1, shape).astype(np.float32)


def activation_spec(site: Site, factor: Array | None, bits: int = 8) -> TensorSpec:
    """An asymmetric spec over ±8, enough for all tensors of the small transformer."""
    rule = Rule(bits, False, False, PowersOfTwo() if factor is not None else PerTensor())
    step = 16 / 255 if factor is None else 16 / 255 / float(factor.min())
    return TensorSpec(site.tensor, rule, np.array(step, np.float32), np.array(119), factor=factor)


def weight_spec(site: Site, weight: Array, rows: Array | None = None) -> TensorSpec:
    """int8 per output channel; ``rows`` is the factor of what the weight multiplies."""
    factor = None if rows is None else (1 / rows.reshape(-1, 1)).astype(np.float32)
    scaled = weight if factor is None else weight / factor
    scale = (np.abs(scaled).max(axis=0) / 127).astype(np.float32)
    zero = np.zeros(len(scale), np.int32)
    return TensorSpec(site.tensor, Rule(grain=PerChannel()), scale, zero, 1, factor)


Small = tuple[ir.Model, dict[str, Site]]


@cache
def small(packed: bool, layer_scale: bool = False) -> Small:
    model = transformer(Choices(packed=packed, layer_scale=layer_scale))
    sites = find_sites(model, find_blocks(model))
    return model, {s.role: s for s in sites.values()}


def compare(
    model: ir.Model, specs: list[TensorSpec], least: float = 90, optimize: bool = True
) -> ir.Model:
    """The lowered graph computes the reference; both differ from the float model.

    Without ``optimize`` where an int8 weight meets a float input: ONNX Runtime's optimizer makes
    that MatMulNBits, which rounds the input too.
    """
    by_name = {s.tensor: s for s in specs}
    x = sample(4, 6, 8, seed=9)
    result = lower(model, by_name)
    found, expected = run(result, x)[0], reference(model, by_name, x)
    assert decibels(found, expected) >= least
    optimized = session(serialize(result), 1, optimize=optimize, cpu=True).run(None, {"x": x})[0]
    assert decibels(optimized, expected) >= least
    assert decibels(found, run(model, x)[0]) < least - 10
    return result


ACTIVATIONS = (
    "input", "norm1", "q", "k", "v", "qk", "av", "proj", "residual1", "norm2", "fc1", "gelu",
    "fc2", "residual2", "norm",
)  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["none", "ptf", "ratio"])
@pytest.mark.parametrize("role", ACTIVATIONS)
def test_each_activation_alone(role: str, kind: str, packed: bool) -> None:
    """Wherever its factor goes, the numbers are those of the rounded tensor."""
    model, sites = small(packed)
    compare(model, [activation_spec(sites[role], factor_of(sites[role], kind))])


def weights_of(model: ir.Model, site: Site) -> Array:
    return constant(model.graph.initializers[site.tensor]).astype(np.float32)


@pytest.mark.parametrize("kind", ["ptf", "ratio"])
@pytest.mark.parametrize(
    ("role", "weight"), [("norm1", "qkv"), ("norm2", "fc1"), ("gelu", "fc2"), ("norm", "head")]
)
def test_a_factor_moves_into_the_rows_behind(role: str, weight: str, kind: str) -> None:
    """The weight quantized with the factor: no Mul behind the DQ, and the right numbers."""
    model, sites = small(True)
    factor = factor_of(sites[role], kind)
    assert factor is not None
    behind = sites[f"{weight}.weight"]
    specs = [
        activation_spec(sites[role], factor),
        weight_spec(behind, weights_of(model, behind), factor.ravel()),
    ]
    result = compare(model, specs)
    linear = next(
        n
        for n in result.graph
        if is_linear(n) and str(n.inputs[1].name).startswith(behind.tensor)  # type: ignore[union-attr]
    )
    read = linear.inputs[0]
    assert read is not None
    node = read.producer()
    assert node is not None
    assert node.op_type == "DequantizeLinear"


@pytest.mark.parametrize("packed", [True, False])
def test_factors_of_q_and_k_cancel(packed: bool) -> None:
    """Opposite ones vanish; others must not."""
    model, sites = small(packed)
    factor = factor_of(sites["q"], "ptf")
    assert factor is not None
    inverse = np.swapaxes(1 / factor, -1, -2)
    muls = Counter(n.op_type for n in model.graph)["Mul"]
    pair = [activation_spec(sites["q"], factor), activation_spec(sites["k"], inverse)]
    assert Counter(n.op_type for n in compare(model, pair).graph)["Mul"] == muls
    other = factor_of(sites["k"], "ptf", seed=3)
    compare(model, [pair[0], activation_spec(sites["k"], other)])
    weight = sites["qkv.weight" if packed else "q.weight"]
    compare(model, [*pair, weight_spec(weight, weights_of(model, weight))], optimize=False)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("log2", [True, False])
def test_a_factor_passes_through_the_attention(log2: bool, packed: bool) -> None:
    """v → A·V → rows of proj, the row sums of log2 codes divided out on the way."""
    model, sites = small(packed)
    factor = factor_of(sites["v"], "ptf")
    assert factor is not None
    proj = sites["proj.weight"]
    specs = [
        activation_spec(sites["v"], factor),
        activation_spec(sites["av"], factor),
        weight_spec(proj, weights_of(model, proj), factor.ravel()),
    ]
    if log2:
        rule = Rule(4, False, False, code=Log2(), around=(RowSums(),))
        one, zero = np.array(1, np.float32), np.array(0, np.int32)
        specs.append(TensorSpec(sites["softmax"].tensor, rule, one, zero, clip=(0, 1)))
    muls = Counter(n.op_type for n in model.graph)["Mul"]
    # The logarithm of each map multiplies twice.
    ops = Counter(n.op_type for n in compare(model, specs).graph)
    assert ops["Mul"] == muls + (2 if log2 else 0)
    other = factor_of(sites["av"], "ptf", seed=4)
    compare(model, [specs[0], activation_spec(sites["av"], other), *specs[3:]])
    compare(model, [*specs[:1], *specs[3:]])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_log2_attention(bits: int, renormalize: bool) -> None:
    model, sites = small(True)
    rule = Rule(bits, False, False, code=Log2(), around=(RowSums(),) if renormalize else ())
    one, zero = np.array(1, np.float32), np.array(0, np.int32)
    compare(model, [TensorSpec(sites["softmax"].tensor, rule, one, zero, clip=(0, 1))])


@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_all_weights_with_factors_nobody_takes(packed: bool, layer_scale: bool) -> None:
    """A row factor without its activation is multiplied back."""
    model, sites = small(packed, layer_scale)
    specs = []
    for site in (s for s in sites.values() if s.is_parameter):
        weight = weights_of(model, site)
        rows = np.exp2(np.random.default_rng(5).integers(0, 4, len(weight))).astype(np.float32)
        specs.append(weight_spec(site, weight, rows))
    compare(model, specs)


def test_a_tensor_read_twice_is_rounded_once_for_both() -> None:
    """A norm whose factor one reader absorbs and the other must not see."""
    g = SmallGraph(("batch", 6, 8))
    norm = g("LayerNormalization", "x", np.full(8, 1.5), np.full(8, 0.1), axis=-1)
    product = g("Add", g("MatMul", norm, sample(8, 8, seed=1)), sample(8, seed=2))
    model = g.model(g("Add", product, norm))
    fuse(model)
    sites = {s.tensor: s for s in find_sites(model, find_blocks(model)).values()}
    factor = factor_of(sites[norm], "ptf")
    assert factor is not None
    weight = next(s for s in sites.values() if s.is_parameter)
    compare(
        model,
        [
            activation_spec(sites[norm], factor),
            weight_spec(weight, weights_of(model, weight), factor),
        ],
    )


def test_columns_that_others_read_are_not_scaled() -> None:
    """One linear, read as heads by a quantized tensor and as it is by another op."""
    g = SmallGraph(("batch", 6, 8))
    linear = g("Add", g("MatMul", "x", sample(8, 8, seed=1)), sample(8, seed=2))
    heads = g("Transpose", g("Reshape", linear, np.array([0, 6, 2, 4])), perm=[0, 2, 1, 3])
    back = g("Reshape", g("Transpose", g("Relu", heads), perm=[0, 2, 1, 3]), np.array([0, 6, 8]))
    model = g.model(g("Add", back, g("Tanh", linear)))
    fuse(model)
    site = Site(heads, "other", None, (1, 3), ("batch", 2, 6, 4), None, ())
    compare(model, [activation_spec(site, factor_of(site, "ptf"))])


@pytest.mark.parametrize("role", ["fc1", "q", "v"])
def test_columns_of_a_weight_with_one_scale(role: str) -> None:
    """The factor of a linear's output cannot go into one scale for all columns."""
    model, sites = small(True)
    weight = sites["fc1.weight" if role == "fc1" else "qkv.weight"]
    value = weights_of(model, weight)
    scale, zero = np.array(np.abs(value).max() / 127, np.float32), np.array(0, np.int32)
    specs = [
        activation_spec(sites[role], factor_of(sites[role], "ptf")),
        activation_spec(sites["norm2" if role == "fc1" else "norm1"], None),
        TensorSpec(weight.tensor, Rule(), scale, zero),
    ]
    compare(model, specs)


def test_a_weight_takes_only_the_factor_that_it_was_made_for() -> None:
    model, sites = small(True)
    factor, other = (factor_of(sites["norm2"], "ptf", seed) for seed in (0, 1))
    assert other is not None
    weight = sites["fc1.weight"]
    compare(
        model,
        [
            activation_spec(sites["norm2"], factor),
            weight_spec(weight, weights_of(model, weight), other),
        ],
    )


@pytest.mark.parametrize("kind", ["ptf", "ratio"])
def test_only_exact_factors_move_into_the_norm(kind: str) -> None:
    model, sites = small(True)
    factor = factor_of(sites["norm1"], kind)
    assert factor is not None
    result = lower(model, {sites["norm1"].tensor: activation_spec(sites["norm1"], factor)})
    before, after = (
        constant(next(n for n in m.graph if n.op_type == "LayerNormalization").inputs[1])
        for m in (model, result)
    )
    np.testing.assert_array_equal(after, before / factor if kind == "ptf" else before)


def test_convolutions_and_positions() -> None:
    """Conv weights per output channel, added constants with a factor."""
    g = SmallGraph(("batch", 3, 8, 8))
    conv = g("Conv", "x", sample(6, 3, 4, 4, seed=1), sample(6, seed=2), strides=[4, 4])
    flat = g("Transpose", g("Reshape", conv, np.array([0, 6, 4])), perm=[0, 2, 1])
    model = g.model(g("Add", flat, sample(1, 4, 6, seed=3)))
    values = [str(v.name) for v in model.graph.initializers.values()]
    shapes = {constant(model.graph.initializers[n]).shape: n for n in values}
    scale = np.full(6, 0.03, np.float32)
    factor = np.exp2(np.arange(6, dtype=np.float32) - 2)
    specs = {
        shapes[6, 3, 4, 4]: TensorSpec(
            shapes[6, 3, 4, 4], Rule(grain=PerChannel()), scale, np.zeros(6, np.int32), 0
        ),
        shapes[1, 4, 6]: TensorSpec(
            shapes[1, 4, 6],
            Rule(grain=PowersOfTwo()),
            np.array(0.02, np.float32),
            np.array(0, np.int32),
            factor=factor,
        ),
    }
    x = sample(2, 3, 8, 8)
    result = lower(model, specs)
    assert decibels(run(result, x)[0], reference(model, specs, x)) > 100
    assert decibels(run(result, x)[0], run(model, x)[0]) < 60
    assert Counter(n.op_type for n in result.graph)["DequantizeLinear"] == 2


# --- on the embedded model ------------------------------------------------------------------


def tensors_of(model: ir.Model, names: list[str], x: Array) -> dict[str, Array]:
    """Tensors of a standard model by name, without ONNX Runtime's fusions."""
    copy = model.clone()
    made = {str(v.name): v for node in copy.graph for v in node.outputs}
    present = [n for n in names if n in made and not made[n].is_graph_output()]
    copy.graph.outputs.extend(made[n] for n in present)
    opened = session(serialize(copy), 1, optimize=False, cpu=True)
    outputs = [o.name for o in opened.get_outputs()]
    return dict(zip(outputs, opened.run(None, {"input": x}), strict=True))


@pytest.mark.parametrize("name", ["vanilla", "channelwise all", "fqvit", "fqvit 4/4/4"])
def test_codes_in_the_file_fit_their_bits(name: str) -> None:
    """Integer codes of every Q on real images are within the limits of the spec."""
    specs, model = lowered(name)
    quantizers = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    codes = tensors_of(model, [str(n.outputs[0].name) for n in quantizers], images()[:4])
    seen = 0
    for node in quantizers:
        scale = str(node.inputs[1].name)  # type: ignore[union-attr]
        spec = specs[scale.removesuffix("_scale").removesuffix("_renormalized")]
        low, high = (e + (128 if spec.rule.signed else 0) for e in spec.rule.limits)
        found = codes[str(node.outputs[0].name)]
        assert found.dtype == np.uint8
        assert low <= found.min()
        assert found.max() <= high
        seen += 1
    assert seen == len(quantizers) > 60


def test_layout_and_constants_are_not_touched() -> None:
    """No Q/DQ on shapes and integers: all readers of a Q/DQ pair are of the original graph."""
    original = Counter(n.op_type for n in to_standard(prepared(DIGITS).model).graph if is_layout(n))
    found = Counter(n.op_type for n in lowered("vanilla")[1].graph if is_layout(n))
    assert found == original
    for node in lowered("vanilla")[1].graph:
        if node.op_type == "QuantizeLinear":
            assert not is_constant(node.inputs[0])


def test_float_products_are_not_made_block_quantized() -> None:
    """ONNX Runtime turns DequantizeLinear(weight) → MatMul of a float input into MatMulNBits,
    which rounds that input to 8 bits; a Mul in between keeps the product in float."""
    _, model = lowered("channelwise all")
    behind_mul = 0
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        made = node.inputs[1].producer()  # type: ignore[union-attr]
        if made is not None and made.op_type == "DequantizeLinear":
            assert reads_codes(node.inputs[0])
        behind_mul += made is not None and made.name == f"{made.outputs[0].name}_node"
    # q k v, proj, fc1, fc2 of 6 blocks and the head; q and k of QKᵀ are rescaled by a Mul too.
    assert behind_mul >= 25
