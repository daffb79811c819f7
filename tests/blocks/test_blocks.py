"""Roles of nodes: the embedded model, the real models, and the ways in which exports differ."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_graph import SmallGraph
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import Blocks, Role, find_blocks
from ptq_onnx.blocks.walking import (
    consumers,
    is_constant,
    is_layout,
    is_linear,
    is_product,
    name_of,
    source,
    through_layout,
)
from ptq_onnx.preparation.prepare import Prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
ONCE = {
    "norm1", "qkv", "qk", "qk_scale", "softmax", "av", "proj", "residual1", "norm2", "fc1",
    "gelu", "fc2", "residual2",
}  # fmt: skip
OUTSIDE = {"patch_embed", "embed", "norm", "head"}


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return prepare(ROOT / "models/digits_vit.onnx")


def roles_of(blocks: Blocks) -> Counter[tuple[int | None, str]]:
    """How often each (block, role) occurs, layout ops aside."""
    return Counter((r.block, r.name) for r in blocks.roles.values() if r.name != "layout")


def check_vit(prepared: Prepared, count: int) -> None:
    """``count`` blocks, each role once, and nothing that has no role."""
    blocks = prepared.blocks
    assert blocks.count == count
    assert blocks.unrecognised == ()
    expected = {(index, role): 1 for index in range(count) for role in ONCE}
    expected |= {(None, role): 1 for role in OUTSIDE}
    assert roles_of(blocks) == expected
    assert set(blocks.roles) == {name_of(node) for node in prepared.model.graph}
    kinds = {name_of(node): node for node in prepared.model.graph}
    for name, role in blocks.roles.items():
        node = kinds[name]
        assert (role.name == "layout") is is_layout(node)
        if role.name in ("qkv", "proj", "fc1", "fc2", "head"):
            assert is_linear(node)
        if role.name in ("qk", "av"):
            assert is_product(node)
        if role.name.startswith("norm"):
            assert node.op_type == "LayerNormalization"
        if role.name.startswith("residual"):
            assert node.op_type == "Add"
    # Blocks are numbered as the data flows.
    order = [blocks.roles[name_of(n)].block for n in prepared.model.graph]
    numbered = [b for b in order if b is not None]
    assert numbered == sorted(numbered)


def test_digits(digits: Prepared) -> None:
    check_vit(digits, 6)
    assert len(digits.blocks.nodes("softmax")) == 6
    assert digits.blocks.nodes("head") == ["/head/Gemm"]


@pytest.mark.real
@pytest.mark.parametrize("name", ["vit", "vit-dynamo", "deit"])
def test_real_models(real_models: dict[str, Path], name: str) -> None:
    check_vit(prepare(real_models[name]), 12)


@pytest.mark.real
def test_both_exports_of_one_model_have_the_same_roles(real_models: dict[str, Path]) -> None:
    """Flat names or scoped ones: the layout ops of each block included."""
    found = [
        Counter((r.block, r.name) for r in prepare(real_models[name]).blocks.roles.values())
        for name in ("vit", "vit-dynamo")
    ]
    assert found[0] == found[1]


BASE = {
    "norm1", "qk", "softmax", "av", "proj", "residual1", "norm2", "fc1", "gelu", "fc2",
    "residual2",
}  # fmt: skip
VARIANTS: dict[str, tuple[Choices, Counter[str]]] = {
    "packed": (Choices(), Counter(BASE | {"qkv", "qk_scale"})),
    "apart": (Choices(packed=False), Counter(BASE | {"q", "k", "v", "qk_scale"})),
    "unscaled": (Choices(scale="none"), Counter(BASE | {"qkv"})),
    "mask": (Choices(mask=True), Counter(BASE | {"qkv", "qk_scale", "mask"})),
    "layer scale": (
        Choices(layer_scale=True),
        Counter(BASE | {"qkv", "qk_scale"}) + Counter({"layer_scale": 2}),
    ),
    "relu": (Choices(activation="Relu"), Counter(BASE | {"qkv", "qk_scale"})),
    "no norms": (Choices(norms=False), Counter(BASE - {"norm1", "norm2"} | {"qkv", "qk_scale"})),
    "no mlp": (
        Choices(mlp=False),
        Counter({"norm1", "qkv", "qk", "qk_scale", "softmax", "av", "proj", "residual1"}),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    choices, expected = VARIANTS[variant]
    blocks = find_blocks(transformer(choices, blocks=2))
    assert blocks.count == 2
    found = roles_of(blocks)
    for index in range(2):
        assert Counter({n: c for (b, n), c in found.items() if b == index}) == expected
    outside = {n: c for (b, n), c in found.items() if b is None}
    assert outside == {"norm": 1, "head": 1}
    assert blocks.unrecognised == ()


def test_a_scale_before_the_product_is_found_through() -> None:
    """1/√d on q: whether fusion moves it or not, q's linear and the block are found."""
    for packed in (True, False):
        blocks = find_blocks(transformer(Choices(scale="before", packed=packed)))
        names = Counter(r.name for r in blocks.roles.values() if r.block == 0)
        assert blocks.count == 1
        assert {n: names[n] for n in ("qk", "av", "proj", "fc2", "norm1")} == dict.fromkeys(
            ("qk", "av", "proj", "fc2", "norm1"), 1
        )
        assert names["qkv" if packed else "q"] == 1


def test_a_graph_without_a_block() -> None:
    """A softmax alone is no attention."""
    g = SmallGraph(("batch", 4, 8))
    out = g("Softmax", g("Mul", "x", 2.0), axis=-1)
    blocks = find_blocks(g.model(g("MatMul", out, np.ones((8, 3)))))
    assert blocks.count == 0
    assert not any(r.block is not None for r in blocks.roles.values())
    assert len(blocks.unrecognised) == 3


def test_what_has_no_role_is_told() -> None:
    model = transformer(Choices(activation="Sin"))
    blocks = find_blocks(model)
    kinds = {name_of(node): node.op_type for node in model.graph}
    assert "Sin" in {kinds[name] for name in blocks.unrecognised}
    assert blocks.count == 1


def test_labels() -> None:
    assert Role(3, "fc2").label == "blocks.3.fc2"
    assert Role(None, "head").label == "head"


def test_walking_through_layout_ops() -> None:
    """q, k and v of a packed linear are reached once each; shapes carry nothing."""
    model = transformer(Choices())
    packed = next(n for n in model.graph if is_linear(n))
    readers = [(n.op_type, i) for n, i in through_layout(packed.outputs[0])]
    assert sorted(readers) == [("MatMul", 0), ("MatMul", 1), ("MatMul", 1)]
    product = next(n for n in model.graph if is_product(n))
    assert source(product.inputs[0]) is packed
    assert source(model.graph.inputs[0]) is None
    assert [n.op_type for n, _ in consumers(packed.outputs[0])] == ["Split"]
    assert is_constant(None)
    assert is_constant(packed.inputs[1])
    assert not is_constant(packed.inputs[0])


def test_a_shape_does_not_carry_the_data() -> None:
    """x gives its shape to a reshape of something else: that one's readers are not x's."""
    g = SmallGraph(("batch", 4, 8))
    flat = g("Relu", np.ones((2, 32)))
    g("Sigmoid", g("Reshape", flat, g("Shape", "x")))
    g("Tanh", g("Transpose", "x", perm=[0, 2, 1]))
    model = g.model(f"sigmoid{len(g.nodes) - 3}", f"tanh{len(g.nodes) - 1}")
    assert [n.op_type for n, _ in through_layout(model.graph.inputs[0])] == ["Tanh"]
