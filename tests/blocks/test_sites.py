"""Quantization sites: every tensor once, where it is quantized, with its channels."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.spec import Site
from ptq_onnx.preparation.prepare import Prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
ROLES = (
    "norm1", "q", "k", "v", "qk", "softmax", "av", "proj", "residual1", "norm2", "fc1", "gelu",
    "fc2", "residual2",
)  # fmt: skip
WEIGHTS = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
OUTSIDE = ("input", "patch_embed", "embed", "norm", "head")
OUTSIDE_WEIGHTS = ("patch_embed.weight", "pos_embed", "head.weight")


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return prepare(ROOT / "models/digits_vit.onnx")


def check_vit(prepared: Prepared, blocks: int, heads: int, width: int, tokens: int) -> None:
    """Each role once per block; parameters too; all tensors exist, with the right channels."""
    sites = list(prepared.sites.values())
    for roles, outside, parameters in (
        (ROLES, OUTSIDE, False),
        (WEIGHTS, OUTSIDE_WEIGHTS, True),
    ):
        found = Counter((s.block, s.role) for s in sites if s.is_parameter is parameters)
        expected = {(index, role): 1 for index in range(blocks) for role in roles}
        assert found == expected | {(None, role): 1 for role in outside}

    graph = prepared.model.graph
    made = {v.name: v for node in graph for v in node.outputs}
    made |= {v.name: v for v in graph.inputs}
    nodes = {node.name for node in graph}
    assert set(prepared.sites) == {s.tensor for s in sites}
    for site in sites:
        value = graph.initializers[site.tensor] if site.is_parameter else made[site.tensor]
        assert value.shape is not None
        assert tuple(str(d) for d in value.shape) == tuple(str(d) for d in site.shape)
        assert set(site.consumers) <= nodes
        assert site.producer is None or site.producer in nodes
        assert all(isinstance(site.shape[a], int) for a in site.channel_axes)
    by_role = {s.role: s for s in sites if s.block in (0, None)}
    depth = width // heads
    expected_shapes: dict[str, tuple[tuple[int | str, ...], tuple[int, ...]]] = {
        "norm1": ((tokens, width), (2,)),
        "q": ((heads, tokens, depth), (1, 3)),
        "k": ((heads, depth, tokens), (1, 2)),
        "v": ((heads, tokens, depth), (1, 3)),
        "qk": ((heads, tokens, tokens), (1,)),
        "softmax": ((heads, tokens, tokens), (1,)),
        "av": ((heads, tokens, depth), (1, 3)),
        "gelu": ((tokens, 4 * width), (2,)),
        "patch_embed": ((tokens, width), (2,)),
        "norm": ((width,), (1,)),
    }
    for role, (shape, axes) in expected_shapes.items():
        assert (by_role[role].shape[1:], by_role[role].channel_axes) == (shape, axes), role
    assert by_role["qkv.weight"].shape == (width, 3 * width)
    assert {by_role[r].channel_axes for r in WEIGHTS} == {(1,)}
    assert by_role["patch_embed.weight"].channel_axes == (0,)


def test_digits(digits: Prepared) -> None:
    check_vit(digits, 6, heads=4, width=64, tokens=65)


@pytest.mark.real
@pytest.mark.parametrize("name", ["vit", "vit-dynamo", "deit"])
def test_real_models(real_models: dict[str, Path], name: str) -> None:
    check_vit(prepare(real_models[name]), 12, heads=3, width=192, tokens=197)


def sites_of(choices: Choices) -> tuple[ir.Model, list[Site]]:
    model = transformer(choices)
    return model, list(find_sites(model, find_blocks(model)).values())


@pytest.mark.parametrize(
    ("choices", "more", "fewer"),
    [
        (Choices(), {"qkv.weight"}, set()),
        (Choices(packed=False), {"q.weight", "k.weight", "v.weight"}, set()),
        (Choices(scale="none"), {"qkv.weight"}, set()),
        (Choices(mask=True), {"qkv.weight"}, set()),
        (Choices(norms=False), {"qkv.weight"}, {"norm1", "norm2"}),
    ],
)
def test_variants(choices: Choices, more: set[str], fewer: set[str]) -> None:
    expected = Counter(set(ROLES) | set(WEIGHTS) - {"qkv.weight"} | more) - Counter(fewer)
    found = Counter(s.role for s in sites_of(choices)[1] if s.block == 0)
    assert found == expected


def test_the_scaled_product_is_the_site() -> None:
    """QKᵀ counts once: behind its scale where there is one, at the product where not."""
    model, sites = sites_of(Choices())
    qk = next(s for s in sites if s.role == "qk")
    kinds = {node.name: node.op_type for node in model.graph}
    assert qk.producer is not None
    assert kinds[qk.producer] == "Mul"
    model, sites = sites_of(Choices(scale="none"))
    qk = next(s for s in sites if s.role == "qk")
    assert {n.name: n.op_type for n in model.graph}[str(qk.producer)] == "MatMul"


def test_a_concatenated_tensor_is_quantized_behind_the_concat(digits: Prepared) -> None:
    """Class token and patches share one range; the position embedding is a parameter."""
    site = next(s for s in digits.sites.values() if s.role == "patch_embed")
    made = {v.name: node for node in digits.model.graph for v in node.outputs}
    assert made[site.tensor].op_type == "Concat"
    assert site.producer == "/patch_embed/Conv"
    assert [digits.blocks.roles[n].name for n in site.consumers] == ["embed"]


def test_consumers_are_compute_ops(digits: Prepared) -> None:
    """A residual is read by the next norm and the next residual, the head by nobody."""
    roles = digits.blocks.roles
    for site in digits.sites.values():
        names = {roles[n].name for n in site.consumers}
        assert "layout" not in names
        if site.role == "residual1":
            assert names == {"norm2", "residual2"}
        if site.role == "residual2" and site.block != 5:
            assert names == {"norm1", "residual1"}
        if site.role == "head":
            assert not names
        if site.role == "norm1":
            assert names == {"qkv"}
        if site.role == "softmax":
            assert names == {"av"}


def test_integers_and_constants_are_no_sites() -> None:
    g = SmallGraph(("batch", 4, 8))
    product = g("Add", g("MatMul", "x", np.ones((8, 8))), np.ones(8))
    g("Cast", product, to=7)
    kept = g("Relu", product)
    model = g.model(kept)
    fuse(model)
    sites = find_sites(model, find_blocks(model))
    assert {s.tensor for s in sites.values() if not s.is_parameter} == {"x", product, kept}
    assert sites["x"].role == "input"
    assert sites["x"].channel_axes == (2,)
    assert [s.shape for s in sites.values() if s.is_parameter] == [(8, 8)]


def test_a_dead_output_is_no_site() -> None:
    g = SmallGraph(("batch", 4, 8))
    g("Sigmoid", "x")
    kept = g("Relu", "x")
    model = g.model(kept)
    assert set(find_sites(model, find_blocks(model))) == {"x", kept}
