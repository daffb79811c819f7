"""Loading, cleaning, saving: what is read, what is refused, what is written."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from small_graph import SmallGraph, assert_same, ops, run, sample, text

from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import infer_shapes
from ptq_onnx.preparation.model_files import clean, load, save, serialize, to_standard
from ptq_onnx.preparation.model_sessions import open_plain
from ptq_onnx.preparation.streamed import field_head

SHAPE = ("batch", 3, 8, 8)
X = sample(2, 3, 8, 8)


def patches(g: SmallGraph, bias: bool = True) -> str:
    """Conv, flatten by computed shape, transpose, linear: the start of a ViT."""
    inputs = ["x", g.const(sample(6, 3, 4, 4, seed=1), "w"), g.const(sample(6, seed=2), "b")]
    conv = g("Conv", *inputs[: 2 + bias], strides=[4, 4])
    batch = g("Gather", g("Shape", conv), np.array(0))
    size = g("Concat", g("Unsqueeze", batch, np.array([0])), np.array([6, -1]), axis=0)
    return g("Transpose", g("Reshape", conv, size), perm=[0, 2, 1])


def saved(path: Path, g: SmallGraph, *outputs: str) -> Path:
    return g.save(path / "model.onnx", *outputs)


def refused(path: Path, *words: str) -> None:
    """Loading fails with one line that holds the words."""
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, str(path)):
        assert word in message


# Files that are no model ----------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "does not exist")
    refused(tmp_path, "not a file")


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is a text file\n" * 9, b"\x00\xff\x13" * 999]
)
def test_content_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, "not" if content else "empty")


def test_random_bytes(tmp_path: Path) -> None:
    for seed in range(20):
        path = tmp_path / "model.onnx"
        path.write_bytes(np.random.default_rng(seed).bytes(400))
        refused(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    g = SmallGraph(SHAPE)
    path = saved(tmp_path, g, patches(g))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


def test_model_without_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.ModelProto(ir_version=10)
    path.write_bytes(model.SerializeToString())
    refused(path, "no graph")


# External data --------------------------------------------------------------------------


def with_external_data(tmp_path: Path) -> Path:
    g = SmallGraph(SHAPE)
    path = tmp_path / "model.onnx"
    onnx.save(
        g.proto(patches(g)), path, save_as_external_data=True, location="w.data", size_threshold=0
    )
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    model = load(path)
    (tmp_path / "w.data").unlink()
    np.testing.assert_array_equal(
        model.graph.initializers["w"].const_value.numpy(), sample(6, 3, 4, 4, seed=1)
    )


def test_external_data_missing_or_cut_off(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    data = tmp_path / "w.data"
    data.write_bytes(data.read_bytes()[:100])
    refused(path, "w.data", "cannot be read")
    data.unlink()
    refused(path, "w.data", "missing")


@pytest.mark.parametrize("kind", ["absolute", "parent", "symlink", "empty"])
def test_external_data_outside_the_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = with_external_data(folder)
    secret = tmp_path / "w.data"
    (folder / "w.data").rename(secret)
    location = {"absolute": str(secret), "parent": "../w.data", "symlink": "w.data", "empty": ""}
    if kind == "symlink":
        (folder / "w.data").symlink_to(secret)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location[kind]
    path.write_bytes(model.SerializeToString())
    refused(path, "outside")


# Graphs that cannot be quantized --------------------------------------------------------


def test_invalid_graph(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    g.output_shape = SHAPE
    refused(saved(tmp_path, g, g("Relu", "nowhere")), "not valid ONNX", "nowhere")


def test_weight_with_too_few_bytes(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    proto = g.proto(patches(g))
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    weight.raw_data = weight.raw_data[:-8]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, "w")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3), 1), (("batch", 3, 8), 1), (("batch", 3, 8, 8), 7)]
)
def test_input_that_is_no_image(tmp_path: Path, shape: tuple[int, ...], dtype: int) -> None:
    """It is taken, as arrays are given for it; what is no tensor of numbers is not."""
    g = SmallGraph(shape)
    g.inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    load(saved(tmp_path, g, g("Cast", "x", to=1)))
    g.inputs = [helper.make_tensor_value_info("x", 8, shape)]
    refused(saved(tmp_path, g, g("Cast", "x", to=1)), "'x'", "no tensor [batch, …] of numbers")


def test_two_image_inputs(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    g.inputs.append(helper.make_tensor_value_info("depth", 1, SHAPE))
    model = load(saved(tmp_path, g, g("Add", "x", "depth")))
    assert [v.name for v in model.graph.inputs] == ["x", "depth"]


def test_no_input(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    g.inputs = []
    refused(saved(tmp_path, g, g("Relu", sample(1, 3, 8, 8))), "it has no input")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
@pytest.mark.parametrize("as_node", [False, True])
def test_weights_that_are_not_finite(
    tmp_path: Path, value: float, word: str, as_node: bool
) -> None:
    g = SmallGraph(SHAPE)
    array = np.ones(8, np.float32)
    array[3] = value
    if as_node:
        name = g("Constant", value=numpy_helper.from_array(array))
    else:
        name = g.const(array, "gamma")
    refused(saved(tmp_path, g, g("Softmax", g("Add", "x", name))), word, f"'{name}'")


def test_minus_infinity(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[:, 5:] = -np.inf
    g = SmallGraph(SHAPE)
    load(saved(tmp_path, g, g("Softmax", g("Add", "x", g("Unsqueeze", mask, np.array([0]))))))
    g = SmallGraph(SHAPE)
    keep = g.const(np.isfinite(mask))
    load(saved(tmp_path, g, g("Softmax", g("Where", keep, "x", np.array(-np.inf)))))
    g = SmallGraph(SHAPE)
    refused(saved(tmp_path, g, g("Add", "x", mask)), "infinity")


def test_control_flow(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    out = helper.make_tensor_value_info("y", 1, None)
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "b", [], [out])
    fixed = g("If", np.array(True), then_branch=branch, else_branch=branch)
    path = saved(tmp_path, g, fixed)
    model = load(path)
    clean(model)
    assert [node.op_type for node in model.graph] == ["Relu"]
    x = sample(2, *SHAPE[1:])
    np.testing.assert_array_equal(run(model, x)[0], np.maximum(x, 0))


def test_a_branch_by_the_shape_is_decided(tmp_path: Path) -> None:
    """TorchScript's squeeze: an If on whether a dimension is one."""
    g = SmallGraph(SHAPE)
    outputs = [helper.make_tensor_value_info(n, 1, None) for n in ("a", "b")]
    yes = helper.make_graph([helper.make_node("Relu", ["x"], ["a"])], "a", [], outputs[:1])
    no = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "b", [], outputs[1:])
    dim = g("Gather", g("Shape", "x"), np.array(1), axis=0)
    y = g("If", g("Equal", dim, np.array(1)), then_branch=yes, else_branch=no)
    model = load(saved(tmp_path, g, y))
    clean(model)
    assert [node.op_type for node in model.graph] == ["Neg"]


def test_a_branch_by_the_data_is_refused(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    out = helper.make_tensor_value_info("y", 1, None)
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "b", [], [out])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "b", [], [out])
    condition = g("Greater", g("ReduceMax", "x", keepdims=0), 0.5)
    y = g("If", condition, then_branch=branch, else_branch=other)
    model = load(saved(tmp_path, g, y))
    with pytest.raises(ModelError, match=f"'/{y}': If is control flow"):
        clean(model)


def test_custom_domain(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    g.output_shape = SHAPE
    refused(saved(tmp_path, g, g("Wavelet", "x", domain="my.ops")), "Wavelet", "my.ops")


def test_runtime_domain(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE, opset=17)
    g.output_shape = SHAPE
    y = g("Relu", g("Gelu", "x", domain="com.microsoft"))
    model, reference = load(saved(tmp_path, g, y)), g.proto(y)
    clean(model)
    assert ops(model) == ["Gelu", "Relu"]
    assert shapes_are_known(model)
    assert_same(model, reference, X)
    g = SmallGraph(SHAPE)
    g.output_shape = SHAPE
    refused(saved(tmp_path, g, g("Wavelet", "x", domain="com.microsoft")), "ONNX Runtime")


# Clean ----------------------------------------------------------------------------------


def shapes_are_known(model: ir.Model) -> bool:
    values = [v for node in model.graph for v in node.outputs]
    return all(
        v.dtype is not None and v.shape is not None and not v.shape.has_unknown_dim()
        for v in (*values, *model.graph.initializers.values())
    )


@pytest.mark.parametrize("batch", ["batch", "n", 2])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_clean_folds_shape_arithmetic(batch: str | int, opset: int) -> None:
    g = SmallGraph((batch, 3, 8, 8), opset)
    y = g("Add", np.float32(1) * np.ones(6), g("Identity", g("Dropout", patches(g))))
    g.const(np.ones(4), "unused")
    model = g.model(y)
    report = clean(model)
    assert ops(model) == ["Add", "Conv", "Reshape", "Transpose"]
    assert (report.nodes_before, report.nodes_after) == (len(g.nodes), 4)
    assert (report.opset_before, report.opset, report.notes) == (opset, 21, ())
    assert set(model.graph.initializers) >= {"w", "b"}
    assert "unused" not in model.graph.initializers
    assert model.graph.outputs[0].name == y
    add = next(n for n in model.graph if n.op_type == "Add")
    assert [v.is_initializer() for v in add.inputs] == [False, True]
    assert shapes_are_known(model)
    first = model.graph.outputs[0].shape[0]
    assert first == batch or first.value == batch
    assert_same(model, g.proto(y), X)
    before = text(model)
    clean(model)
    assert text(model) == before


def test_a_tensor_that_is_two_outputs_keeps_both_names() -> None:
    """As of a last hidden state, which is one of all hidden states too."""
    g = SmallGraph((2, 3, 8, 8))
    first = g("Relu", patches(g))
    names = first, g("Identity", first), g("Relu", g("Neg", first))
    proto = g.proto(*names)
    model = g.model(*names)
    clean(model)
    assert [v.name for v in model.graph.outputs] == list(names)
    assert len({*model.graph.outputs}) == len(names)
    assert ops(model).count("Identity") == 1
    assert_same(model, proto, X)


@pytest.mark.parametrize("opset", [9, 24])
def test_older_and_newer_opsets(opset: int) -> None:
    g = SmallGraph(SHAPE, opset)
    y = g("Add", g("MatMul", "x", sample(8, 4)), sample(4))
    model = g.model(y)
    assert clean(model).opset == 21
    assert model.ir_version == 10
    assert_same(model, g.proto(y), X)


def test_an_op_newer_than_the_opset_keeps_it(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE, 24)
    y = g("Relu", g("Swish", "x"))
    model = g.model(y)
    report = clean(model)
    assert (report.opset, len(report.notes)) == (24, 1)
    assert shapes_are_known(model)
    save(model, tmp_path / "model.onnx")
    assert_same(model, g.proto(y), X)


def test_unnamed_batch_gets_a_name() -> None:
    g = SmallGraph((None, 3, 8, 8))  # type: ignore[arg-type]
    model = g.model(patches(g))
    clean(model)
    assert shapes_are_known(model)
    assert model.graph.outputs[0].shape[0].value == "batch"


def test_names_and_metadata_survive_the_conversion() -> None:
    g = SmallGraph(SHAPE, opset=13)
    y = patches(g)
    model = g.model(y)
    for node in model.graph:
        node.metadata_props["namespace"] = f"of {node.name}"
    model.graph.initializers["w"].metadata_props["kind"] = "weight"
    weight = model.graph.initializers["w"].const_value.numpy()
    clean(model)
    conv = next(n for n in model.graph if n.op_type == "Conv")
    assert conv.name == "/conv0"
    assert conv.metadata_props["namespace"] == "of /conv0"
    assert model.graph.initializers["w"].metadata_props["kind"] == "weight"
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.DOUBLE, "double"),
        (TensorProto.BFLOAT16, "bfloat16"),
    ],
)
def test_other_floats_become_float32(tmp_path: Path, dtype: int, name: str) -> None:
    g = SmallGraph(SHAPE, 17, dtype)
    hidden = g("Cast", g("Cast", patches(g), to=1), to=dtype)
    y = g("Mul", hidden, g("Constant", value=helper.make_tensor("t", dtype, [1], [0.5])))
    path = saved(tmp_path, g, y)
    model = load(path)
    report = clean(model)
    assert report.notes == (f"converted {name} to float32",)
    assert {v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    assert "Cast" not in ops(model)
    (found,) = run(model, X)
    reference = SmallGraph(SHAPE, 17)
    (expected,) = run(reference.proto(reference("Mul", patches(reference), 0.5)), X)
    tolerance = {"float16": 1e-2, "double": 1e-5, "bfloat16": 1e-1}[name]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_a_double_beyond_float32_stays_finite() -> None:
    g = SmallGraph(SHAPE, 17, TensorProto.DOUBLE)
    mask = np.where(np.arange(8) > 5, np.finfo(np.float64).min, 0.0)
    model = g.model(g("Softmax", g("Add", "x", mask)))
    clean(model)
    (y,) = run(model, X)
    assert np.isfinite(y).all()
    assert not y[..., 6:].any()


def test_slices_become_a_split() -> None:
    g = SmallGraph(("batch", 3, 8, 6))
    relu = g("Relu", "x")
    parts = [
        g("Slice", relu, *(np.array([v]) for v in bounds))
        for bounds in ((0, 2, 3), (2, 4, 3), (4, 2**63 - 1, -1))
    ]
    y = g("Add", g("Add", parts[0], parts[1]), parts[2])
    model = g.model(y)
    clean(model)
    assert ops(model) == ["Add", "Add", "Relu", "Split"]
    assert_same(model, g.proto(y), sample(2, 3, 8, 6))


@pytest.mark.parametrize("bounds", [((0, 2), (3, 6)), ((0, 3), (2, 6)), ((0, 2), (2, 5))], ids=str)
def test_slices_with_gaps_stay(bounds: tuple[tuple[int, int], ...]) -> None:
    g = SmallGraph(("batch", 3, 8, 6))
    relu = g("Relu", "x")
    parts = [g("Slice", relu, *(np.array([v]) for v in (*b, 3))) for b in bounds]
    model = g.model(*parts)
    clean(model)
    assert ops(model) == ["Relu", "Slice", "Slice"]
    assert_same(model, g.proto(*parts), sample(2, 3, 8, 6))


def test_transpose_detour() -> None:
    g = SmallGraph(SHAPE)
    flat = g("Reshape", g("Relu", "x"), np.array([-1, 8, 8]))
    swapped = g("Transpose", flat, perm=[0, 2, 1])
    y = g("Reshape", swapped, np.array([-1, 3, 8, 8]))
    model = g.model(y)
    clean(model)
    assert ops(model) == ["Relu", "Transpose"]
    assert_same(model, g.proto(y), X)
    g = SmallGraph(SHAPE)
    flat = g("Reshape", g("Relu", "x"), np.array([-1, 24, 8]))
    y = g("Reshape", g("Transpose", flat, perm=[0, 2, 1]), np.array([-1, 3, 8, 8]))
    model = g.model(y)
    clean(model)
    assert ops(model) == ["Relu", "Reshape", "Reshape", "Transpose"]
    assert_same(model, g.proto(y), X)


def test_clean_of_local_functions(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 21)],
    )
    g = SmallGraph(SHAPE)
    g.output_shape = SHAPE
    proto = g.proto(g("Twice", "x", domain="local"))
    proto.functions.append(function)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    model = load(path)
    clean(model)
    assert ops(model) == ["Add"]
    assert not model.functions


# Save -----------------------------------------------------------------------------------


def linear_model() -> tuple[SmallGraph, str, ir.Model]:
    g = SmallGraph(SHAPE)
    y = g("Add", g("MatMul", patches(g), g.const(sample(6, 4), "weight")), sample(4))
    model = g.model(y)
    clean(model)
    fuse(model)
    return g, y, model


def test_save_writes_standard_onnx(tmp_path: Path) -> None:
    g, y, model = linear_model()
    before = text(model)
    path = tmp_path / "out.onnx"
    save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert text(model) == before
    onnx.checker.check_model(str(path), full_check=True)
    assert {n.domain for n in onnx.load(path).graph.node} == {""}
    np.testing.assert_allclose(run(path, X)[0], run(g.proto(y), X)[0], rtol=1e-4, atol=1e-5)
    save(load(path), path)
    assert len(list(tmp_path.iterdir())) == 1


def test_save_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.preparation.sizes.EXTERNAL_LIMIT", 100)
    g, y, model = linear_model()
    path = tmp_path / "out.onnx"
    save(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    np.testing.assert_allclose(run(path, X)[0], run(g.proto(y), X)[0], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("ptq_onnx.preparation.sizes.EXTERNAL_LIMIT", 10**9)
    np.testing.assert_allclose(run(load(path), X)[0], run(path, X)[0])
    monkeypatch.setattr("ptq_onnx.preparation.sizes.EXTERNAL_LIMIT", 100)
    with pytest.raises(ModelError, match="GB of weights"):
        serialize(model)


def test_a_large_model_is_written_weight_by_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same protobuf as in one piece, but for the order of its fields."""
    monkeypatch.setattr("ptq_onnx.preparation.cleaning.SMALL", 4)
    monkeypatch.setattr("ptq_onnx.preparation.streamed.SMALL", 4)
    _, _, model = linear_model()
    save(model, tmp_path / "whole.onnx")
    monkeypatch.setattr("ptq_onnx.preparation.sizes.SHARED_LIMIT", 0)
    save(model, tmp_path / "streamed.onnx")
    whole, streamed = (onnx.load(tmp_path / f"{n}.onnx") for n in ("whole", "streamed"))
    onnx.checker.check_model(str(tmp_path / "streamed.onnx"), full_check=True)
    for proto in (whole, streamed):
        proto.graph.initializer.sort(key=lambda tensor: tensor.name)
        proto.graph.value_info.sort(key=lambda info: info.name)
    assert streamed == whole
    assert sum(np.prod(t.dims) > 4 for t in whole.graph.initializer) >= 2
    expected = run(tmp_path / "whole.onnx", X)[0]
    for path in sorted(tmp_path.iterdir()):  # read without the proto, too
        np.testing.assert_array_equal(run(load(path), X)[0], expected)
    session = open_plain(load(tmp_path / "whole.onnx"), threads=1)
    found = session.run(None, {session.get_inputs()[0].name: X})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_large_weight_that_nothing_reads_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime drops such a weight, and would then refuse to be handed it."""
    for place in ("ptq_onnx.preparation.cleaning.SMALL", "ptq_onnx.preparation.streamed.SMALL"):
        monkeypatch.setattr(place, 4)
    _, _, model = linear_model()
    expected = open_plain(model, threads=1).run(None, {"x": X})[0]
    dead = ir.Value(name="dead", const_value=ir.tensor(np.ones(9, np.float32), name="dead"))
    model.graph.register_initializer(dead)
    monkeypatch.setattr("ptq_onnx.preparation.sizes.SHARED_LIMIT", 0)
    session = open_plain(model, threads=1)
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], expected)
    save(model, tmp_path / "out.onnx")
    assert "dead" not in load(tmp_path / "out.onnx").graph.initializers


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, 2**31 - 1])
def test_heads_of_fields_are_those_of_protobuf(length: int) -> None:
    head = field_head(7, length)
    assert head[0] == 7 << 3 | 2
    assert sum((byte & 127) << 7 * i for i, byte in enumerate(head[1:])) == length
    assert [byte >> 7 for byte in head[1:]] == [1] * (len(head) - 2) + [0]


def test_a_loaded_model_holds_no_protobuf(tmp_path: Path) -> None:
    """A weight is one array, not copied at each look, and the file's bytes are gone."""
    _, _, model = linear_model()
    save(model, tmp_path / "out.onnx")
    for value in load(tmp_path / "out.onnx").graph.initializers.values():
        assert isinstance(value.const_value, ir.Tensor)
        assert np.shares_memory(value.const_value.numpy(), value.const_value.numpy())


def broken(model: ir.Model) -> None:
    """An op that onnx does not know."""
    next(n for n in model.graph if n.op_type == "Transpose").op_type = "Transmogrify"


def test_nothing_is_written_on_failure(tmp_path: Path) -> None:
    _, _, model = linear_model()
    broken(model)
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ModelError, match="Transmogrify") as caught:
        save(model, path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert path.read_bytes() == b"old"


def test_failure_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model = linear_model()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelError, match="No space left"):
        save(model, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("where", "word"), [("none/out.onnx", "does not exist"), (".", "folder")])
def test_bad_destinations(tmp_path: Path, where: str, word: str) -> None:
    _, _, model = linear_model()
    with pytest.raises(ModelError, match=word):
        save(model, tmp_path / where)
    assert not list(tmp_path.iterdir())


def test_clone_shares_weights() -> None:
    _, _, model = linear_model()
    standard = to_standard(model)
    for name, value in model.graph.initializers.items():
        assert standard.graph.initializers[name].const_value is value.const_value


# The sample models ----------------------------------------------------------------------

HISTOGRAM = {
    "Linear": 49,
    "Transpose": 37,
    "Squeeze": 36,
    "Reshape": 25,
    "Add": 25,
    "LayerNormalization": 25,
    "MatMul": 24,
    "Split": 12,
    "Mul": 12,
    "Softmax": 12,
    "Gelu": 12,
    "Concat": 2,
    "Conv": 1,
    "Shape": 1,
    "Expand": 1,
    "Gather": 1,
}


def images(folder: Path, count: int) -> np.ndarray:
    """Centre crops of 224, scaled to −1…1."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    arrays = []
    for file in files[:count]:
        image = Image.open(file).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        crop = image.crop((left, top, left + 224, top + 224))
        arrays.append(np.asarray(crop, np.float32).transpose(2, 0, 1) / 127.5 - 1)
    return np.stack(arrays)


@pytest.mark.real
@pytest.mark.parametrize("name", ["vit", "vit-dynamo", "deit"])
def test_sample_models(
    name: str, real_models: dict[str, Path], shared: Path, tmp_path: Path
) -> None:
    model = load(real_models[name])
    report = clean(model)
    counts = fuse(model)
    assert (report.opset, report.nodes_after < report.nodes_before) == (21, True)
    assert (counts["Linear"], counts["AttentionScale"], counts["PatchEmbed"]) == (49, 12, 1)
    assert dict(Counter(n.op_type for n in model.graph)) == HISTOGRAM
    assert shapes_are_known(model)

    before = text(model)
    assert sum(fuse(model).values()) == 1  # the patch embedding, which is only counted
    assert text(model) == before

    path = tmp_path / "model.onnx"
    save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    x = images(shared / "imagenet/calib", 2)
    found, expected = run(path, x)[0], run(real_models[name], x)[0]
    assert np.abs(found - expected).max() <= 1e-3
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"input": x})[0] - expected).max() <= 1e-3


def test_guesses_at_sizes_are_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """ONNX Runtime warns where it cannot tell whether half of one axis is within another."""
    g = SmallGraph(("batch", "h", "w", 4))
    height = g("Gather", g("Shape", "x"), np.array([1]), axis=0)
    half = g("Div", height, np.array([2]))
    model = g.model(g("Slice", "x", np.array([0]), half, np.array([2])))
    infer_shapes(model)
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["batch", "h", "w", "4"]
    assert caplog.records == []
