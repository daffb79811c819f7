"""Factors for massive tokens: which are found, that nothing changes in float, and whole runs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import digits_runs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from digits_runs import IMAGES
from onnx import numpy_helper
from short_digits import short_digits

import ptq_onnx
from ptq_onnx.blocks.role_map import TOKEN_FACTOR
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.walking import is_row_factors
from ptq_onnx.equalization.token_factors import find_token_factors, fit, set_token_factors
from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.formula import new_constant
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.model_sessions import open_plain
from ptq_onnx.preparation.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/digits_vit.onnx"
WIDTH, HIDDEN, TOKENS = 64, 256, 65
BLOCKS, BLOCK = 4, 0
PLACES = (3, 12)
SHOWN, UNIT, MADE = 9, 17, 20
"""The channel that marks the tokens, what sees it behind fc1, and what that makes massive."""
ON_CODES = {"quantizer": "fqvit", "ptf": False, "lis": False, "split_hidden": True}
"""One scale for each tensor, the stream's too."""


def changed(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of the embedded model, in which the first MLP makes two tokens massive: their
    place shows in a channel of the position embedding, which a hidden channel sees."""
    path = tmp_path_factory.mktemp("massive") / "massive.onnx"
    model = onnx.load(short_digits(path, BLOCKS))
    arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    linears = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in arrays]
    up = [n.input[1] for n in linears if arrays[n.input[1]].shape == (WIDTH, HIDDEN)][BLOCK]
    down = [n.input[1] for n in linears if arrays[n.input[1]].shape == (HIDDEN, WIDTH)][BLOCK]
    position, bias = arrays["pos_embed"], arrays[f"blocks.{BLOCK}.mlp.0.bias"]
    position[0, list(PLACES), SHOWN] += 12
    first, second = arrays[up], arrays[down]
    first[:, UNIT], first[SHOWN, UNIT], bias[UNIT] = 0, 6, -30
    second[UNIT] = 0
    second[UNIT, MADE] = 14
    changed(model, "pos_embed", position)
    changed(model, up, first)
    changed(model, down, second)
    changed(model, f"blocks.{BLOCK}.mlp.0.bias", bias)
    onnx.save(model, path)
    return path


quantized = partial(digits_runs.quantized, images=16)
sqnr = partial(digits_runs.sqnr, count=48)


def images(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 1, (8, 3, 32, 32)).astype(np.float32) for _ in range(count)]


def outputs(model: ir.Model, batches: list[np.ndarray]) -> np.ndarray:
    session = open_plain(graphs.to_standard(model.clone()))
    feed = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {feed: batch})[0] for batch in batches])


def test_massive_tokens_get_factors_and_nothing_changes_in_float(massive: Path) -> None:
    prepared = prepare(massive)
    (found,) = find_token_factors(prepared.model, images(4))
    assert found.tokens == PLACES
    assert found.start == f"/blocks.{BLOCK}/Add_1_output_0"
    assert min(found.exponents) >= 3
    assert found.after < 2 < 8 < found.before
    assert found.tensors == 2 * (BLOCKS - BLOCK - 1) + 1
    before = outputs(prepared.model, images(1))
    added = set_token_factors(prepared.model, [found])
    assert len(added) == 2 + 2 * (BLOCKS - BLOCK - 1)
    muls = [n for n in prepared.model.graph if n.name in added]
    assert len(muls) == len(added)
    assert all(map(is_row_factors, muls))
    wanted = np.ones((1, TOKENS, 1))
    wanted[0, list(PLACES), 0] = 2.0 ** -np.array(found.exponents)
    for mul in muls:
        array = mul.inputs[1].const_value
        assert array is not None
        assert np.array_equal(array.numpy(), wanted)
    roles = find_blocks(prepared.model).roles
    assert {roles[name].name for name in added} == {TOKEN_FACTOR}
    assert {roles[name].block for name in added} == set(range(BLOCK, BLOCKS))
    np.testing.assert_allclose(outputs(prepared.model, images(1)), before, atol=2e-5)


def test_the_rows_of_the_stream_are_alike_then(massive: Path) -> None:
    """Of the tensor that the last norm reads, in the file itself: 2⁻ᵏ times what it was there."""
    prepared = prepare(massive)
    (found,) = find_token_factors(prepared.model, images(4))
    last = [n for n in prepared.model.graph if n.op_type == "LayerNormalization"][-1].inputs[0]
    assert last is not None
    prepared.model.graph.outputs[0] = last
    before = outputs(prepared.model, images(1))
    prepared = prepare(massive)
    set_token_factors(prepared.model, [found])
    values = {v.name: v for n in prepared.model.graph for v in n.outputs}
    prepared.model.graph.outputs[0] = values[last.name]
    after = outputs(prepared.model, images(1))
    np.testing.assert_allclose(after, before * found.row_factors(TOKENS), atol=2e-4)


def test_usual_models_have_none(tmp_path: Path) -> None:
    prepared = prepare(MODEL)
    assert find_token_factors(prepared.model, images(4)) == ()


@pytest.mark.parametrize("reader", ["ReduceMean", "output", "Concat"])
def test_what_sees_the_size_of_rows_refuses_them(massive: Path, reader: str) -> None:
    """The mean over tokens in front of the norm, the stream itself as an output, other tokens."""
    prepared = prepare(massive)
    graph = prepared.model.graph
    last = [n for n in graph if n.op_type == "LayerNormalization"][-1].inputs[0]
    assert last is not None
    if reader == "output":
        graph.outputs.append(last)
    else:
        inputs = [last, last] if reader == "Concat" else [last]
        attributes = {"axis": 1} if reader == "Concat" else {"keepdims": 0}
        node = ir.node(reader, inputs, attributes)
        node.outputs[0].name, node.outputs[0].type = "seen", last.type
        node.outputs[0].shape = ir.Shape([1])
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    assert find_token_factors(prepared.model, images(2)) == ()


@pytest.fixture(scope="module")
def on_codes(massive: Path) -> tuple[Path, dict[str, Any]]:
    folder = massive.parent / "on_codes"
    return folder, quantized(massive, folder, **ON_CODES)


def test_one_scale_serves_all_tokens(
    massive: Path,
    on_codes: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, report = on_codes
    (tokens,) = report["tokens"]
    assert tuple(tokens["tokens"]) == PLACES
    assert report["parity"]["rewritten"] < 1e-3
    assert any(note.startswith("Tokens: 2 tokens (3, 12)") for note in report["notes"])
    (turned,) = report["rotation"]["turned"]
    assert turned["tensors"] == 2 * BLOCKS + 1
    monkeypatch.setattr("ptq_onnx.pipeline.rewriting.massive_tokens", lambda *_: ())
    other = quantized(massive, tmp_path / "without", **ON_CODES)
    assert other["tokens"] == []
    gain = sqnr(massive, folder / "quantized.onnx")
    gain -= sqnr(massive, tmp_path / "without/quantized.onnx")
    assert gain > 3


def test_rows_that_keep_their_size_keep_their_codes(
    on_codes: tuple[Path, dict[str, Any]],
) -> None:
    _, report = on_codes
    specs = {t["tensor"]: t for t in report["tensors"]}
    pairs = [(n, n.removesuffix("_tokens")) for n in specs if n.endswith("_tokens")]
    pairs = [(made, read) for made, read in pairs if read in specs]
    assert pairs
    for made, read in pairs:
        assert specs[made]["scale"] == specs[read]["scale"]
        assert specs[made]["zero_point"] == specs[read]["zero_point"]


def test_branches_are_rounded_once(on_codes: tuple[Path, dict[str, Any]]) -> None:
    """What is only added is not rounded by itself, with factors of rows or without."""
    _, report = on_codes
    specs = {t["tensor"] for t in report["tensors"]}
    assert not any("proj" in name and "Add" in name for name in specs)


def test_integers_have_them_too(massive: Path, tmp_path: Path) -> None:
    report = quantized(massive, tmp_path / "a", quantizer="fqvit", target="integer")
    assert tuple(report["tokens"][0]["tokens"]) == PLACES
    quantized(massive, tmp_path / "b", quantizer="fqvit")
    whole = sqnr(massive, tmp_path / "a/quantized.onnx")
    assert whole == pytest.approx(sqnr(massive, tmp_path / "b/quantized.onnx"), abs=1.0)


def test_an_earlier_run_s_factors_are_set_again(
    massive: Path, on_codes: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = on_codes
    again: dict[str, Any] = {**ON_CODES, "scales": folder / "report.json", "report": False}
    again |= {"calib": IMAGES / "calib", "images": 16, "threads": 1}
    ptq_onnx.quantize(massive, output=tmp_path / "b", **again)
    name = "quantized.onnx"
    assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    for change in (
        {"tokens": [3]},
        {"tokens": [3, TOKENS]},
        {"exponents": [0, 1]},
        {"exponents": [1, 7]},
        {"start": "other"},
    ):
        other = json.loads((folder / "report.json").read_text())
        other["tokens"][0] |= change
        (tmp_path / "other.json").write_text(json.dumps(other))
        again["scales"] = tmp_path / "other.json"
        with pytest.raises(ConfigError, match="its massive tokens are not those of this model"):
            ptq_onnx.quantize(massive, output=tmp_path / "c", **again)


def test_fit_asks_for_each_start_once(massive: Path) -> None:
    prepared = prepare(massive)
    found = find_token_factors(prepared.model, images(2))
    assert fit(prepared.model, found)
    assert not fit(prepared.model, [*found, *found])


@pytest.mark.parametrize(
    ("array", "are"),
    [
        (np.array([1, 0.5, 2**-6]).reshape(1, 3, 1), True),
        (np.array([1, 0.3, 1]).reshape(1, 3, 1), False),
        (np.array([0.5, 0.25, 0.5]).reshape(1, 3, 1), False),
        (np.array([2, 1, 1]).reshape(1, 3, 1), False),
        (np.array([1, 0, 1]).reshape(1, 3, 1), False),
        (np.array([1, -1, 1]).reshape(1, 3, 1), False),
        (np.array([1, 0.5, 1]).reshape(3, 1, 1), False),
        (np.array([1, 0.5, 1]), False),
        (np.ones((1, 1, 1)), False),
    ],
)
def test_factors_of_rows_are_powers_of_two_up_to_one(array: np.ndarray, are: bool) -> None:
    """Not a mask of tokens, a LayerScale, or the factor of a convolution's channels."""
    x = ir.Value(name="x", shape=ir.Shape([1, 3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21})
    factors = new_constant(graph, "a", array.astype(np.float32))
    assert is_row_factors(ir.node("Mul", [x, factors])) is are
    assert not is_row_factors(ir.node("Div", [x, factors]))
