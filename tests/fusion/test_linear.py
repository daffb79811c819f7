"""Linear from MatMul, MatMul + Add and Gemm; the bias of a Conv."""

import numpy as np
import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import clean
from ptq_onnx.preparation.model_files import to_standard

K, N = 6, 4
W, B = sample(K, N, seed=1), sample(N, seed=2)
X = sample(2, 5, K)
SHAPE = ("batch", 5, K)


@pytest.mark.parametrize("bias_first", [False, True])
def test_matmul_add(bias_first: bool) -> None:
    g = SmallGraph(SHAPE)
    product = g("MatMul", "x", g.const(W, "weight"))
    bias = g.const(B, "bias")
    y = g("Add", bias, product) if bias_first else g("Add", product, bias)
    model = g.model(y)
    assert fuse(model)["Linear"] == 1
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == ("ptq_onnx", "Linear", f"/{y}")
    assert [v.name for v in node.inputs] == ["x", "weight", "bias"]
    assert node.outputs[0].name == y
    assert_same(model, g.proto(y), X)
    before = text(model)
    assert not any(fuse(model).values())
    assert text(model) == before


def test_standard_form_and_its_names() -> None:
    g = SmallGraph(SHAPE)
    y = g("Add", g("MatMul", "x", W), B)
    g("Relu", y)
    g.nodes[-1].output[0] = f"{y}_matmul"
    model = g.model(y, f"{y}_matmul")
    fuse(model)
    before = text(model)
    standard = to_standard(model)
    assert text(model) == before
    assert ops(standard) == ["Add", "MatMul", "Relu"]
    assert next(iter(standard.graph)).outputs[0].name == f"{y}_matmul_1"
    assert "ptq_onnx" not in standard.graph.opset_imports
    for name, value in model.graph.initializers.items():
        assert standard.graph.initializers[name].const_value is value.const_value


def test_matmul_without_bias() -> None:
    g = SmallGraph(SHAPE)
    y = g("MatMul", "x", W)
    model = g.model(y)
    assert fuse(model)["Linear"] == 1
    assert len(next(iter(model.graph)).inputs) == 2
    assert ops(to_standard(model)) == ["MatMul"]
    assert_same(model, g.proto(y), X)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm(trans_b: int, bias: bool) -> None:
    g = SmallGraph(("batch", K))
    weight = g.const(W.T if trans_b else W, "weight")
    y = g("Gemm", "x", weight, *([B] if bias else []), transB=trans_b)
    model = g.model(y)
    assert fuse(model)["Linear"] == 1
    (node,) = model.graph
    assert (node.name, len(node.inputs)) == (f"/{y}", 2 + bias)
    assert list(node.inputs[1].shape) == [K, N]
    assert ("weight" in model.graph.initializers) == (not trans_b)
    assert_same(model, g.proto(y), X[:, 0])


def test_shared_weights_stay_shared() -> None:
    g = SmallGraph(("batch", K))
    weight, wt = g.const(W, "weight"), g.const(W.T, "wt")
    outputs = [
        g("Add", g("MatMul", "x", weight), B),
        g("MatMul", "x", weight),
        g("Gemm", "x", wt, B, transB=1),
        g("Gemm", "x", wt, transB=1),
    ]
    model = g.model(*outputs)
    assert fuse(model)["Linear"] == 4
    a, b, c, d = model.graph
    assert a.inputs[1] is b.inputs[1]
    assert c.inputs[1] is d.inputs[1]
    assert_same(model, g.proto(*outputs), X[:, 0])


@pytest.mark.parametrize(
    "attributes", [{"alpha": 0.5}, {"beta": 0.5}, {"transA": 1}], ids=lambda a: next(iter(a))
)
def test_other_gemms_are_left_alone(attributes: dict[str, float]) -> None:
    g = SmallGraph((K, K))
    model = g.model(g("Gemm", "x", W, B, **attributes))
    before = text(model)
    assert fuse(model)["Linear"] == 0
    assert text(model) == before


@pytest.mark.parametrize("bias", [np.ones((1, N)), np.ones((5, N)), np.ones(1)], ids=np.shape)
def test_what_is_no_bias_stays_an_add(bias: np.ndarray) -> None:
    g = SmallGraph(SHAPE)
    y = g("Add", g("MatMul", "x", W), bias)
    model = g.model(y)
    assert fuse(model)["Linear"] == 1
    assert ops(model) == ["Add", "Linear"]
    assert_same(model, g.proto(y), X)


def test_product_read_twice_keeps_its_add() -> None:
    g = SmallGraph(SHAPE)
    product = g("MatMul", "x", W)
    y = g("Add", product, B)
    model = g.model(y, product)
    assert fuse(model)["Linear"] == 1
    assert ops(model) == ["Add", "Linear"]
    assert_same(model, g.proto(y, product), X)


@pytest.mark.parametrize("case", ["two activations", "constant first", "batched weight"])
def test_other_products_are_left_alone(case: str) -> None:
    g = SmallGraph(("batch", K, K))
    y = {
        "two activations": lambda: g("MatMul", "x", g("Relu", "x")),
        "constant first": lambda: g("MatMul", sample(K, K), "x"),
        "batched weight": lambda: g("MatMul", "x", sample(1, K, N)),
    }[case]()
    model = g.model(y)
    before = text(model)
    assert fuse(model)["Linear"] == 0
    assert text(model) == before


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1)])
def test_conv_bias(shape: tuple[int, ...]) -> None:
    g = SmallGraph(("batch", 3, 8, 8))
    y = g("Add", g("Conv", "x", sample(3, 3, 4, 4), strides=[4, 4]), sample(*shape, seed=3))
    model = g.model(y)
    counts = fuse(model)
    assert (counts["ConvBias"], counts["PatchEmbed"]) == (1, 1)
    (node,) = model.graph
    assert (node.op_type, len(node.inputs), node.name) == ("Conv", 3, f"/{y}")
    assert_same(model, g.proto(y), sample(2, 3, 8, 8))
    assert fuse(model)["ConvBias"] == 0


@pytest.mark.parametrize("shape", [(3, 1), (1, 3, 2, 2)])
def test_what_is_no_conv_bias_stays(shape: tuple[int, ...]) -> None:
    g = SmallGraph(("batch", 3, 12, 8))
    conv = g("Conv", "x", sample(3, 3, 4, 4), strides=[4, 8] if shape == (3, 1) else [6, 4])
    model = g.model(g("Add", conv, np.ones(shape)))
    before = text(model)
    counts = fuse(model)
    assert (counts["ConvBias"], counts["PatchEmbed"]) == (0, 0)
    assert text(model) == before


def dense(width: int, *, twice: bool = False, swapped: bool = False) -> tuple[SmallGraph, str]:
    """Keras' Dense on [batch, 5, 8]: rows, a product, the shape put back, the bias."""
    g = SmallGraph(("batch", 5, 8))
    y = g("MatMul", g("Reshape", "x", np.array([-1, 8])), sample(8, width, seed=1))
    back = g("Reshape", y, np.array([-1, width, 5] if swapped else [-1, 5, width]))
    out = g("Add", back, sample(5 if swapped else width, seed=2))
    return g, g("Add", out, g("ReduceSum", y, np.array([0, 1]), keepdims=0)) if twice else out


def test_a_product_of_rows_is_a_linear() -> None:
    g, out = dense(6)
    model = g.model(out)
    clean(model)
    assert fuse(model)["Linear"] == 1
    assert ops(model) == ["Linear"]
    assert_same(model, g.proto(out), sample(2, 5, 8))


@pytest.mark.parametrize("options", [{"twice": True}, {"swapped": True}])
def test_rows_that_do_not_come_back_stay(options: dict[str, bool]) -> None:
    g, out = dense(6, **options)
    model = g.model(out)
    clean(model)
    fuse(model)
    assert "Reshape" in ops(model)
    assert_same(model, g.proto(out), sample(2, 5, 8))
