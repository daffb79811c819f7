"""Each product gets codes of its own, whatever else reads its tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import SmallGraph, run, sample
from small_transformer import HEADS, TOKENS, WIDTH

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.equalization.reads import integer_readers
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.model_files import to_standard
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.checking.check import check

EACH = WIDTH // HEADS
BATCHES = [sample(4, TOKENS, WIDTH, seed=s) * 2 for s in range(3)]


def linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int) -> str:
    product = g("MatMul", x, sample(rows, columns, seed=seed) * 0.4)
    return g("Add", product, sample(columns, seed=seed + 50) * 0.3)


def norm(g: SmallGraph, x: str, width: int = WIDTH) -> str:
    return g("LayerNormalization", x, np.full(width, 1.5), np.full(width, 0.1), axis=-1)


def packed(g: SmallGraph, x: str) -> list[str]:
    """q, k and v [batch, heads, tokens, width] out of one linear, cut behind a Transpose."""
    made = linear(g, x, WIDTH, 3 * WIDTH, 1)
    split = g("Reshape", made, np.array([0, TOKENS, 3, HEADS, EACH]))
    turned = g("Transpose", split, perm=[2, 0, 3, 1, 4])
    return [g("Gather", turned, np.array(i), axis=0) for i in range(3)]


def attend(
    g: SmallGraph, q: str, k: str, v: str, bias: str = "", beside: str = "", tokens: int = TOKENS
) -> str:
    logits = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
    logits = g("Mul", logits, 0.5)
    if bias:
        logits = g("Add", logits, bias)
    result = g("MatMul", g("Softmax", logits, axis=-1), v)
    if beside:
        result = g("Add", result, beside)
    joined = g("Transpose", result, perm=[0, 2, 1, 3])
    return linear(g, g("Reshape", joined, np.array([0, tokens, WIDTH])), WIDTH, WIDTH, 3)


def mlp(g: SmallGraph, x: str) -> str:
    return linear(g, g("Gelu", linear(g, x, WIDTH, 4 * WIDTH, 5)), 4 * WIDTH, WIDTH, 6)


def finish(g: SmallGraph, x: str, *outputs: str) -> ir.Model:
    x = g("Add", x, mlp(g, norm(g, x)))
    token = g("Gather", norm(g, x), np.array(0), axis=1)
    model = g.model(linear(g, token, WIDTH, 4, 9), *outputs)
    fuse(model)
    return model


def query_and_key_norms() -> ir.Model:
    """The packed tensor has products among its readers, and norms."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    q, k, v = packed(g, norm(g, "x"))
    return finish(g, g("Add", "x", attend(g, norm(g, q, EACH), norm(g, k, EACH), v)))


def relative_positions() -> ir.Model:
    """q feeds an Einsum too, whose result is added to the logits."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    q, k, v = packed(g, norm(g, "x"))
    table = sample(TOKENS, EACH, seed=20) * 0.3
    bias = g("Einsum", q, table, equation="bhnd,md->bhnm")
    return finish(g, g("Add", "x", attend(g, q, k, v, bias=bias)))


def values_beside() -> ir.Model:
    """Something of v is added to A·V (a convolution, in CSWin)."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    q, k, v = packed(g, norm(g, "x"))
    beside = g("Mul", g("Tanh", v), 0.5)
    return finish(g, g("Add", "x", attend(g, q, k, v, beside=beside)))


def norms_behind() -> ir.Model:
    """Linears read the stream itself, as in SwinV2."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    x = g("Tanh", "x")
    x = g("Add", x, norm(g, attend(g, *packed(g, x))))
    x = g("Add", x, norm(g, mlp(g, x)))
    token = g("Gather", norm(g, x), np.array(0), axis=1)
    model = g.model(linear(g, token, WIDTH, 4, 9))
    fuse(model)
    return model


def features_out() -> ir.Model:
    """What a linear reads is an output of the model."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    read = norm(g, "x")
    return finish(g, g("Add", "x", attend(g, *packed(g, read))), read)


def joined_to_others() -> ir.Model:
    """A linear reads a tensor by itself, another one beside what the first makes of it."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    read = norm(g, "x")
    made = g("Gelu", linear(g, read, WIDTH, WIDTH, 7))
    both = linear(g, g("Concat", read, made, axis=-1), 2 * WIDTH, WIDTH, 8)
    return finish(g, g("Add", "x", attend(g, *packed(g, norm(g, both)))))


def class_attention() -> ir.Model:
    """q is of the class token alone, k and v of all tokens (CaiT), which the stream behind has."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    read = norm(g, "x")
    token = g("Unsqueeze", g("Gather", read, np.array(0), axis=1), np.array([1]))
    q = heads(g, linear(g, token, WIDTH, WIDTH, 10), 1)
    k, v = (heads(g, linear(g, read, WIDTH, WIDTH, seed), TOKENS) for seed in (11, 12))
    return finish(g, g("Add", "x", attend(g, q, k, v, tokens=1)))


def coarse_queries() -> ir.Model:
    """q is of every second token of the stream itself, k and v of all (LeViT, between stages)."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    x = g("Tanh", "x")
    few = g("Slice", x, np.array([0]), np.array([TOKENS]), np.array([1]), np.array([2]))
    count = -(-TOKENS // 2)
    q = heads(g, linear(g, few, WIDTH, WIDTH, 10), count)
    k, v = (heads(g, linear(g, x, WIDTH, WIDTH, seed), TOKENS) for seed in (11, 12))
    return finish(g, attend(g, q, k, v, tokens=count))


def reshaped_beside() -> ir.Model:
    """k and v read all of what q reads, with an axis more: one set of codes serves them."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    read = norm(g, "x")
    wide = g("Reshape", read, np.array([0, TOKENS, 1, WIDTH]))
    q = heads(g, linear(g, read, WIDTH, WIDTH, 10), TOKENS)
    k, v = (heads(g, linear(g, wide, WIDTH, WIDTH, seed), TOKENS) for seed in (11, 12))
    return finish(g, g("Add", "x", attend(g, q, k, v)))


def heads(g: SmallGraph, made: str, tokens: int) -> str:
    """[batch, heads, tokens, width] of what a linear makes."""
    split = g("Reshape", made, np.array([0, tokens, HEADS, EACH]))
    return g("Transpose", split, perm=[0, 2, 1, 3])


def mixed_heads() -> ir.Model:
    """The heads of the map are mixed by a linear before A·V (talking heads)."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    q, k, v = packed(g, norm(g, "x"))
    shares = g("Softmax", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    turned = g("Transpose", shares, perm=[0, 2, 3, 1])
    mixed = g("Transpose", linear(g, turned, HEADS, HEADS, 13), perm=[0, 3, 1, 2])
    joined = g("Transpose", g("MatMul", mixed, v), perm=[0, 2, 1, 3])
    made = linear(g, g("Reshape", joined, np.array([0, TOKENS, WIDTH])), WIDTH, WIDTH, 3)
    return finish(g, g("Add", "x", made))


KINDS: dict[str, Callable[[], ir.Model]] = {
    f.__name__: f
    for f in (
        query_and_key_norms,
        relative_positions,
        values_beside,
        norms_behind,
        features_out,
        joined_to_others,
        class_attention,
        coarse_queries,
        reshaped_beside,
    )
}


def quantized(model: ir.Model, **options: object) -> SiteQuantizer:
    config = QuantizeConfig(threads=1, **options)  # type: ignore[arg-type]
    model.graph.opset_imports[""] = config.opset
    blocks = find_blocks(model)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    plan = equalise(plan, BATCHES) if config.equalizes else in_form(plan)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(BATCHES[0][:1]), BATCHES)
    return quantizer


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = float(((expected - found).astype(np.float64) ** 2).sum())
    return float(10 * np.log10(float((expected.astype(np.float64) ** 2).sum()) / max(noise, 1e-30)))


@pytest.mark.parametrize(
    ("target", "equalize"),
    [("onnxruntime", True), ("onnxruntime", False), ("tensorrt", True), ("openvino", True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_in_integers(kind: str, target: str, equalize: bool) -> None:
    model = KINDS[kind]()
    expected = run(model, BATCHES[0])
    quantizer = quantized(model, target=target, equalize=equalize)
    file = to_standard(lower(quantizer.model, quantizer.specs))
    found = check(file, target)
    assert not found.errors
    assert (found.quantized_products, found.products) == (2, 2)
    assert found.quantized_linears == found.linears >= 5
    assert "Identity" not in found.ops
    floats = {"MatMul", "Gemm", "FusedMatMul"} & set(found.facts.get("optimised", {}))
    assert not floats
    assert decibels(expected[0], run(file, BATCHES[0])[0]) >= 22


@pytest.mark.parametrize("kind", KINDS)
def test_simulation_is_the_file(kind: str) -> None:
    quantizer = quantized(KINDS[kind](), quantizer="deploy")
    file = to_standard(lower(quantizer.model, quantizer.specs))
    simulated = Simulator(quantizer.model, quantizer, threads=1).run(BATCHES[1])
    logits = str(file.graph.outputs[0].name)
    assert decibels(run(file, BATCHES[1])[0], simulated[logits]) >= 33


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "openvino"])
def test_a_map_whose_heads_are_mixed_has_no_codes_that_nothing_reads(target: str) -> None:
    """Where rows have scales of their own, the linear that mixes them would read floats."""
    quantizer = quantized(mixed_heads(), target=target)
    file = to_standard(lower(quantizer.model, quantizer.specs))
    found = check(file, target)
    assert not found.errors
    assert "stray-pair" not in {v.rule for v in found.violations}
    assert (found.quantized_products, found.products) == (2, 2)
    rows = target != "tensorrt"
    assert found.linears - found.quantized_linears == rows
    reasons = {quantizer.plan.sites[t].role: why for t, why in quantizer.floats.items()}
    assert ("heads are mixed" in reasons.get("softmax", "")) == rows
    assert decibels(run(mixed_heads(), BATCHES[0])[0], run(file, BATCHES[0])[0]) >= 22


@pytest.mark.parametrize("quantizer", ["vanilla", "channelwise", "fqvit"])
def test_what_is_read_whole_and_in_part_has_codes_once(quantizer: str) -> None:
    """A part of codes is not coded again."""
    model = class_attention()
    sites = find_sites(model, find_blocks(model)).values()
    (read,) = [s for s in sites if s.role == "norm1"]
    assert len(read.consumers) == 3
    found = quantized(model, quantizer=quantizer)
    file = to_standard(lower(found.model, found.specs))
    node = next(n for n in file.graph if n.op_type == "Gather")
    way = [n.op_type for n in (*made_of(node), *read_by(node))]
    assert way.count("QuantizeLinear") == way.count("DequantizeLinear") == 1


def made_of(node: ir.Node) -> list[ir.Node]:
    """What a node's first input is made by, back to a norm."""
    found = [node]
    while found[-1].op_type != "LayerNormalization" and found[-1].inputs[0] is not None:
        maker = found[-1].inputs[0].producer()
        if maker is None:
            break
        found.append(maker)
    return found[1:]


def read_by(node: ir.Node) -> list[ir.Node]:
    """What reads a node's output by itself, on to a product."""
    found = [node]
    while found[-1].op_type != "MatMul" and len(found[-1].outputs[0].uses()) == 1:
        found.append(next(iter(found[-1].outputs[0].uses())).node)
    return found[1:]


def test_other_readers_keep_floats() -> None:
    """The Einsum and the output read what was not rounded."""
    quantizer = quantized(relative_positions(), quantizer="deploy")
    file = to_standard(lower(quantizer.model, quantizer.specs))
    (einsum,) = [n for n in file.graph if n.op_type == "Einsum"]
    maker = einsum.inputs[0].producer()
    assert maker is not None
    assert maker.op_type != "DequantizeLinear"
    model = features_out()
    expected = run(model, BATCHES[0])[1]
    quantizer = quantized(model, quantizer="deploy", equalize=False)
    file = to_standard(lower(quantizer.model, quantizer.specs))
    np.testing.assert_allclose(run(file, BATCHES[0])[1], expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied_without_need() -> None:
    """A model whose products have tensors to themselves keeps its tensors' names."""
    from small_transformer import Choices, transformer

    plan = quantized(transformer(Choices(), blocks=2), quantizer="deploy").plan
    assert not [n for n in plan.model.graph if n.op_type == "Identity"]


@pytest.mark.parametrize("quantizer", ["vanilla", "channelwise", "fqvit"])
def test_parts_of_a_packed_tensor(quantizer: str) -> None:
    """v is quantized where A·V reads it, q and k before their norms and behind them."""
    model = query_and_key_norms()
    sites = find_sites(model, find_blocks(model)).values()
    shape = ("batch", HEADS, TOKENS, EACH)
    (value,) = [s for s in sites if s.role == "v"]
    assert (value.shape, value.channel_axes) == (shape, (1, 3))
    parts = [s for s in sites if s.role == "qkv"]
    assert [(s.shape, s.channel_axes) for s in parts] == [(shape, (3,))] * 2
    assert len({s.consumers for s in parts}) == 2
    found = quantized(model, quantizer=quantizer)
    file = to_standard(lower(found.model, found.specs))
    assert check(file, "onnxruntime").conforms
    assert decibels(run(query_and_key_norms(), BATCHES[0])[0], run(file, BATCHES[0])[0]) >= 15


def test_a_copy_that_is_an_output_is_no_reader_s_own() -> None:
    """A feature under two names: neither output is rounded, the product has a copy besides."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    read = norm(g, "x")
    model = finish(g, g("Add", "x", attend(g, *packed(g, read))), read)
    node = ir.node("Identity", [model.graph.outputs[-1]], name="again")
    node.outputs[0].name, node.outputs[0].type = "again", model.graph.outputs[-1].type
    node.outputs[0].shape = model.graph.outputs[-1].shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    x = BATCHES[0]
    expected = run(model, x)
    quantizer = quantized(model, quantizer="deploy", equalize=False)
    file = to_standard(lower(quantizer.model, quantizer.specs))
    assert [v.name for v in file.graph.outputs] == [v.name for v in model.graph.outputs]
    for before, after in zip(expected[1:], run(file, x)[1:], strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_convolution_reads_codes_by_its_data_alone() -> None:
    """In TensorRT and OpenVINO; its weight and bias, and all of it elsewhere, are no reads of
    activations. A linear the same, and a product of two by both."""
    g = SmallGraph(("batch", 4, 6, 6))
    patches = g("Conv", "x", sample(8, 4, 2, 2), sample(8), strides=[2, 2])
    tokens = g("Transpose", g("Reshape", patches, np.array([0, 8, 9])), perm=[0, 2, 1])
    scores = g("MatMul", tokens, g("Transpose", tokens, perm=[0, 2, 1]))
    model = g.model(linear(g, g("MatMul", g("Softmax", scores, axis=-1), tokens), 8, 3, 1))
    fuse(model)
    nodes = {node.op_type: node for node in model.graph}
    for target, convolutions in (("tensorrt", True), ("openvino", True), ("onnxruntime", False)):
        takes = integer_readers(
            QuantizeConfig(target=target, quantizer="deploy"), find_blocks(model)
        )
        assert [takes(nodes["Conv"], k) for k in range(3)] == [convolutions, False, False]
        assert [takes(nodes["Linear"], k) for k in range(3)] == [True, False, False]
        assert [takes(nodes["MatMul"], k) for k in range(2)] == [True, True]
        assert not takes(nodes["Softmax"], 0)
