"""Models with more than one input, or without an image: a text encoder, a masked picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from small_graph import SmallGraph
from small_image_model import HEADS, WIDTH, linear, pictures, random

import ptq_onnx
from ptq_onnx.errors import ConfigError, ImageError, PtqError
from ptq_onnx.images.preprocess import load_image
from ptq_onnx.pipeline.several_inputs import open_source
from ptq_onnx.report.schema import report_schema, violations
from ptq_onnx.runtime.packed import pack, unpack

TOKENS, WORDS, COUNT = 8, 50, 24
QUICK: dict[str, Any] = {"threads": 1, "check_preprocess": False, "images": 12}
RNG = np.random.default_rng(5)


def block(g: SmallGraph, x: str, mask: str | None, tokens: int) -> str:
    """One attention with an added mask, and its residual."""
    norm = g("LayerNormalization", x, 1 + random(5, WIDTH), random(6, WIDTH), axis=-1)
    heads = []
    for part in range(3):
        made = linear(g, norm, WIDTH, WIDTH, 10 + 2 * part)
        split = g("Reshape", made, np.array([0, tokens, HEADS, WIDTH // HEADS]))
        heads.append(g("Transpose", split, perm=[0, 2, 3, 1] if part == 1 else [0, 2, 1, 3]))
    scores = g("Mul", g("MatMul", heads[0], heads[1]), np.float32((WIDTH // HEADS) ** -0.5))
    if mask is not None:
        scores = g("Add", scores, mask)
    attended = g("MatMul", g("Softmax", scores, axis=-1), heads[2])
    joined = g("Reshape", g("Transpose", attended, perm=[0, 2, 1, 3]), np.array([0, tokens, WIDTH]))
    x = g("Add", x, linear(g, joined, WIDTH, WIDTH, 20))
    hidden = g("Gelu", linear(g, x, WIDTH, 4 * WIDTH, 22))
    return g("Add", x, linear(g, hidden, 4 * WIDTH, WIDTH, 24))


def shut(g: SmallGraph, mask: str) -> str:
    """0 for 1 and -1e4 for 0, as [batch, 1, 1, tokens]."""
    floats = g("Cast", mask, to=TensorProto.FLOAT)
    far = g("Mul", g("Sub", np.float32(1), floats), np.float32(-1e4))
    return g("Unsqueeze", far, np.array([1, 2]))


def text_model(path: Path, tokens: int | str = "sequence") -> Path:
    """Token ids and their mask in, an embedding out, as CLIP's text encoder."""
    g = SmallGraph(("batch", tokens), dtype=1)
    shape = ["batch", tokens]
    names = ("input_ids", "attention_mask")
    g.inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in names]
    x = g("Gather", random(40, WORDS, WIDTH, scale=1), "input_ids")
    x = g("Add", x, random(41, TOKENS, WIDTH))
    x = block(g, x, shut(g, "attention_mask"), TOKENS)
    return g.save(path, linear(g, g("ReduceMean", x, np.array([1]), keepdims=0), WIDTH, 12, 26))


def masked_model(path: Path) -> Path:
    """A picture of 16 pixels a side as 16 patches, and which of them count."""
    g = SmallGraph(("batch", 3, 16, 16))
    g.inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", 16]))
    weight = random(3, WIDTH, 3, 4, 4, scale=48**-0.5)
    x = g("Conv", "x", weight, random(4, WIDTH), strides=[4, 4])
    x = g("Transpose", g("Reshape", x, np.array([0, WIDTH, 16])), perm=[0, 2, 1])
    x = block(g, x, shut(g, "mask"), 16)
    return g.save(path, linear(g, g("ReduceMean", x, np.array([1]), keepdims=0), WIDTH, 10, 26))


def texts(count: int) -> dict[str, np.ndarray]:
    lengths = RNG.integers(3, TOKENS + 1, count)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    return {"input_ids": RNG.integers(0, WORDS, (count, TOKENS)), "attention_mask": mask}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    text_model(folder / "text.onnx")
    masked_model(folder / "masked.onnx")
    np.savez(folder / "texts.npz", **texts(COUNT))
    np.savez(folder / "others.npz", **texts(10))
    pictures(folder / "pictures", COUNT)
    mask = np.ones((COUNT, 16), np.int64)
    mask[:, 12:] = 0
    np.save(folder / "mask.npy", mask)
    return folder


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def decibels(real: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(real**2) / np.sum((real - found) ** 2)))


def test_packing_is_exact() -> None:
    values = [RNG.normal(size=(3, 4, 5)), np.array(7), np.arange(6)[None] + (1 << 23)]
    batch = np.stack([pack(values), pack(values)])
    found = unpack(batch)
    assert found is not None
    for part, value in zip(found, values, strict=True):
        assert part.shape == (2, *value.shape)
        np.testing.assert_array_equal(part[1], value.astype(np.float32))
    assert unpack(np.zeros((2, 1, 1, 9), np.float32)) is None


def test_a_text_encoder_from_an_archive(place: Path) -> None:
    """Everything runs: attention products in integers, analysis, pages; the file takes the ids and
    the mask that the float model takes, and what the report measures is what it gives."""
    run = ptq_onnx.quantize(
        place / "text.onnx", calib=place / "texts.npz", val=place / "others.npz",
        output=place / "text", metric="features", sensitivity=True, **QUICK,
    )  # fmt: skip
    assert violations(run.report, report_schema()) == []
    assert [i["name"] for i in run.report["model"]["inputs"]] == ["input_ids", "attention_mask"]
    assert run.report["coverage"]["attention"]["integer"] == 2
    made = onnx.load(run.output / "quantized.onnx")
    assert [i.name for i in made.graph.input] == ["input_ids", "attention_mask"]
    feeds = dict(np.load(place / "others.npz"))
    real = outputs(place / "text.onnx", feeds)
    own = decibels(real, outputs(run.output / "quantized.onnx", feeds))
    assert own > 25
    assert run.report["fidelity"]["sqnr_db"] == pytest.approx(own, abs=0.5)
    assert run.report["metric"]["value"] == 100.0
    assert any("fixed to those of the arrays" in note for note in run.report["notes"])
    table = ptq_onnx.compare([run.output], place / "others.npz", threads=1)
    assert table.contenders[1].sqnr_db == pytest.approx(own, abs=0.5)


def test_no_images_but_arrays_by_option(place: Path) -> None:
    given = [f"input_ids={place / 'texts.npz'}", f"attention_mask={place / 'texts.npz'}"]
    run = ptq_onnx.quantize(
        place / "text.onnx", input=given, output=place / "by_option", report=False, **QUICK
    )
    assert run.report["calibration"]["images"] == 12
    one = [given[0], "attention_mask=1"]
    with pytest.raises(ConfigError, match="a number does not say how large it is"):
        ptq_onnx.quantize(place / "text.onnx", input=one, output=place / "no", **QUICK)


@pytest.mark.parametrize("given", ["mask=1", "mask.npy"])
def test_pictures_with_a_mask(place: Path, given: str) -> None:
    """The patch embedding is computed in integers as of any model; auto, evaluate take it too."""
    words = [given if "=" in given else f"mask={place / given}"]
    run = ptq_onnx.quantize(
        place / "masked.onnx", calib=place / "pictures", input=words, preprocess="inception",
        output=place / f"masked{len(given)}", auto=True, min_sqnr=20.0, **QUICK,
    )  # fmt: skip
    assert violations(run.report, report_schema()) == []
    assert run.report["coverage"]["percent"] == 100.0
    assert run.report["parity"]["original"]
    found = ptq_onnx.evaluate(
        run.output / "quantized.onnx", place / "pictures", reference=place / "masked.onnx",
        input=words, threads=1,
    )  # fmt: skip
    assert found.sqnr_db is not None
    assert found.sqnr_db > 25
    mask = np.ones((2, 16), np.int64) if "=" in given else np.load(place / given)[:2]
    names = sorted((place / "pictures").glob("*.png"))[:2]
    shown = ptq_onnx.Preprocess.named("inception", 16)
    x = np.stack([load_image(name, shown) for name in names])
    real = outputs(place / "masked.onnx", {"x": x, "mask": mask})
    assert decibels(real, outputs(run.output / "quantized.onnx", {"x": x, "mask": mask})) > 25


@pytest.mark.usefixtures("always_shared")
def test_workers_and_seeds_take_every_input(place: Path) -> None:
    """The same bytes and figures as of one process; another seed draws other entries, and every
    picture keeps its own mask."""
    words, made = [f"mask={place / 'own.npy'}"], []
    own = np.ones((COUNT, 16), np.int64)
    own[np.arange(COUNT), np.arange(COUNT) % 16] = 0
    np.save(place / "own.npy", own)
    for workers, seed in ((1, 3), (2, 3), (1, 4)):
        output = place / f"drawn{workers}{seed}"
        ptq_onnx.quantize(
            place / "masked.onnx", calib=place / "pictures", input=words, output=output,
            preprocess="inception", report=False, seed=seed, workers=workers, batch=5,
            quantizer="channelwise", method="minmax", **QUICK,
        )  # fmt: skip
        made.append((output / "quantized.onnx").read_bytes())
    assert made[0] == made[1] != made[2]
    found = [
        ptq_onnx.evaluate(
            place / "drawn13/quantized.onnx", place / "pictures", reference=place / "masked.onnx",
            input=words, threads=1, workers=workers, batch_size=5,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert (found[0].count, found[0].left_out) == (COUNT, ())
    shown = ptq_onnx.Preprocess.named("inception", 16)
    source = open_source(place / "masked.onnx", place / "pictures", shown, words).drawn(7, 3)
    for names, batch in source.named_batches(2):
        parts = unpack(batch)
        assert parts is not None
        places = [source.reopened().names.index(name) for name in names]
        np.testing.assert_array_equal(parts[1], own[places])
        for name, picture in zip(names, parts[0], strict=True):
            np.testing.assert_array_equal(picture, load_image(place / "pictures" / name, shown))


def test_what_is_refused_in_one_line(place: Path) -> None:
    masked, text, shots = place / "masked.onnx", place / "text.onnx", place / "pictures"
    np.save(place / "short.npy", np.ones((3, 16), np.int64))
    np.save(place / "odd.npy", np.ones((COUNT, 5), np.int64))
    np.savez(place / "ids.npz", input_ids=texts(4)["input_ids"])
    shown = {"calib": shots}
    short, odd = (f"mask={place / name}.npy" for name in ("short", "odd"))
    far = {"input": "mask=1", "target": "integer"}
    cases: list[tuple[Path, dict[str, Any], str, type[PtqError]]] = [
        (masked, shown, "has 2 inputs: 'x' .* nothing is given for 'mask'", ConfigError),
        (masked, shown | {"input": "maks=1"}, "an input of the model: x, mask", ConfigError),
        (masked, shown | {"input": short}, "3 entries for 24 images", ImageError),
        (masked, shown | {"input": odd}, r"expected an array \[N, …\]", ImageError),
        (masked, shown | far, "one image and nothing else", ConfigError),
        (text, {"calib": place / "ids.npz"}, "nothing is given for 'attention_mask'", ConfigError),
        (text, shown, "nothing is given for 'input_ids'", ConfigError),
    ]
    for model, options, words, kind in cases:
        with pytest.raises(kind, match=words):
            ptq_onnx.quantize(model, output=place / "no", **{**QUICK, **options})
    assert not (place / "no").exists()
    with pytest.raises(PtqError, match="nothing is given for 'mask'"):
        ptq_onnx.evaluate(masked, shots)
    found = ptq_onnx.inspect(masked)
    assert [i.name for i in found.inputs] == ["x", "mask"]
    assert json.dumps(found.refused) == "null"
