"""Inputs as products ship them: bytes, channels last, 0 to 255, normalised inside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_graph import SmallGraph, run, sample

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.source import NoiseSource
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.pipeline.several_inputs import open_source
from ptq_onnx.preparation import model_files as graph
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.preparation.signature import fed
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.timing.timed_model import read_subject

CASE = Path(__file__).resolve().parents[3] / "shared/cases/float255_nhwc.onnx"
SIDE, WIDTH, CLASSES = 8, 16, 5
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
FLOAT, BYTES = 1, 2
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def network(
    path: Path,
    *,
    dtype: int = BYTES,
    last: bool = True,
    spelling: str = "first",
    pads: int = 0,
    scale: float = 1.0,
) -> Path:
    """Pixels, normalised inside, patches, a block of attention, a head.

    ``spelling``: where and how it is normalised (``first``, ``rescaled``, ``behind``, ``none``).
    """
    g = SmallGraph(("b", SIDE, SIDE, 3) if last else ("b", 3, SIDE, SIDE))
    g.inputs[0].type.tensor_type.elem_type = dtype
    x = g("Cast", "x", to=1) if dtype == BYTES else "x"
    across = (1, 3, 1, 1)
    if spelling == "behind" and last:
        x = g("Transpose", x, perm=list(FIRST))
    elif last:
        across = (3,)
    mean, std = MEAN.reshape(across) / scale, STD.reshape(across) / scale
    if spelling == "rescaled":
        x = g("Mul", x, np.float32(1 / 255))
    elif spelling != "none":
        x = g("Div", g("Sub", x, g.const(mean)), g.const(std))
    if last and spelling != "behind":
        x = g("Transpose", x, perm=list(FIRST))
    x = g("Conv", x, 0.3 * sample(WIDTH, 3, 4, 4), sample(WIDTH, seed=1),
          strides=[4, 4], pads=[pads] * 4)  # fmt: skip
    tokens = ((SIDE + 2 * pads - 4) // 4 + 1) ** 2
    x = g("Transpose", g("Reshape", x, np.array([0, WIDTH, tokens])), perm=[0, 2, 1])
    q, k, v = (g("MatMul", x, 0.3 * sample(WIDTH, WIDTH, seed=i)) for i in (2, 3, 4))
    maps = g("Softmax", g("MatMul", q, g("Transpose", k, perm=[0, 2, 1])), axis=-1)
    x = g("Add", x, g("MatMul", g("MatMul", maps, v), 0.3 * sample(WIDTH, WIDTH, seed=5)))
    out = g("MatMul", g("ReduceMean", x, np.array([1]), keepdims=0), sample(WIDTH, CLASSES, seed=6))
    g.output_shape = ("b", CLASSES)
    return g.save(path / "model.onnx", out)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def pixels_of(folder: Path) -> NDArray[Any]:
    """uint8 [N, H, W, C]."""
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])


def sqnr(reference: NDArray[Any], other: NDArray[Any]) -> float:
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise))


KINDS: dict[str, dict[str, Any]] = {
    "bytes last": {},
    "bytes first": {"last": False},
    "bytes rescaled": {"spelling": "rescaled"},
    "floats last": {"dtype": FLOAT},
    "floats last, behind": {"dtype": FLOAT, "spelling": "behind"},
    "floats first": {"dtype": FLOAT, "last": False},
    "padded": {"pads": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantizer", ["deploy", "fqvit"])
def test_the_quantized_file_takes_what_the_float_one_took(
    kind: str, quantizer: str, tmp_path: Path, pictures: Path
) -> None:
    options = KINDS[kind]
    path = network(tmp_path, **options)
    config = QuantizeConfig(
        quantizer=quantizer, rotate=False, images=8, batch=4, threads=1, report=False
    )
    result = quantize(path, calib=pictures, val=pictures, output=tmp_path / "out", config=config)
    files = [path, tmp_path / "out/fused.onnx", tmp_path / "out/quantized.onnx"]
    sessions = [ort.InferenceSession(str(f), providers=["CPUExecutionProvider"]) for f in files]
    inputs = [s.get_inputs()[0] for s in sessions]
    assert len({(i.name, i.type, tuple(i.shape)) for i in inputs}) == 1
    feed = pixels_of(pictures)
    if not options.get("last", True):
        feed = feed.transpose(FIRST)
    if options.get("dtype", BYTES) == FLOAT:
        feed = feed.astype(np.float32)
    whole, fused, quantized = (s.run(None, {"x": feed})[0] for s in sessions)
    np.testing.assert_allclose(fused, whole, rtol=1e-4, atol=1e-4)
    assert sqnr(whole, quantized) > 20
    found = result.report["fidelity"]["sqnr_db"]
    assert found == pytest.approx(sqnr(fused, quantized), abs=0.01)
    assert result.report["preprocess"]["std"] == [1 / 255] * 3
    assert result.report["model"]["inputs"][0]["name"] == "x"
    assert any("by default pictures are fed as they are" in n for n in result.report["notes"])
    for file in files:
        evaluated = evaluate(
            file, open_images(pictures, resolve_preprocess(file, QuantizeConfig())),
            reference=path, threads=1,
        )  # fmt: skip
        assert (evaluated.sqnr_db or 0) > 20
    assert check(files[2], "onnxruntime").errors == ()


def test_a_normalisation_without_padding_goes_into_the_patches(tmp_path: Path) -> None:
    """W·(x - mean)/std is one convolution of pixels; a padded one keeps its border."""
    prepared = prepare(network(tmp_path))
    assert prepared.fusions["Normalisation"] == 1
    kinds = [node.op_type for node in prepared.model.graph]
    assert "Sub" not in kinds
    assert "Div" not in kinds
    assert kinds[0] == "Conv"
    assert prepare(network(tmp_path, pads=2)).fusions["Normalisation"] == 0
    assert prepare(network(tmp_path, pads=2, spelling="rescaled")).fusions["Normalisation"] == 1


def test_the_range_of_pixels_is_known(tmp_path: Path, pictures: Path) -> None:
    """Eight bits hold them exactly, whatever the images show."""
    config = QuantizeConfig(quantizer="fqvit", rotate=False, images=2, threads=1, report=False)
    result = quantize(network(tmp_path), calib=pictures, output=tmp_path / "out", config=config)
    image = next(t for t in result.report["tensors"] if t["role"] == "input")
    assert (np.ravel(image["scale"]).tolist(), np.ravel(image["zero_point"]).tolist()) == ([1], [0])


def test_integers_from_bytes(tmp_path: Path, pictures: Path) -> None:
    config = QuantizeConfig(target="integer", images=8, threads=1, report=False)
    quantize(network(tmp_path), calib=pictures, output=tmp_path / "out", config=config)
    file = tmp_path / "out/quantized.onnx"
    assert check(file, "integer").errors == ()
    feed = pixels_of(pictures)
    found = ort.InferenceSession(str(file)).run(None, {"x": feed})[0]
    assert sqnr(run(tmp_path / "model.onnx", feed)[0], found) > 10


@pytest.mark.parametrize(
    ("options", "std"),
    [
        ({"dtype": FLOAT}, 1 / 255),
        ({"dtype": FLOAT, "scale": 255.0}, 1.0),
        ({"dtype": FLOAT, "spelling": "rescaled"}, 1 / 255),
        ({"dtype": FLOAT, "spelling": "none"}, None),
        ({"dtype": BYTES, "spelling": "none"}, 1 / 255),
    ],
)
def test_what_the_first_ops_say(options: dict[str, Any], std: float | None, tmp_path: Path) -> None:
    """0 to 255 or 0 to 1 by the numbers inside; nothing is guessed without any."""
    path = network(tmp_path, **options)
    found = resolve_preprocess(path, QuantizeConfig())
    if std is None:
        assert found.mean == Preprocess.named("imagenet").mean
    else:
        assert (found.mean, found.std) == ((0.0,) * 3, (std,) * 3)
    assert found.channels_last
    if options["dtype"] == FLOAT:
        named = resolve_preprocess(path, QuantizeConfig(preprocess="inception"))
        assert named.std == (0.5,) * 3


def test_bytes_take_no_normalisation(tmp_path: Path) -> None:
    path = network(tmp_path)
    for options in ({"preprocess": "imagenet"}, {"mean": (0.5, 0.5, 0.5)}):
        with pytest.raises(ConfigError, match="input 'x' is uint8: it takes pixels as they are"):
            resolve_preprocess(path, QuantizeConfig(**options))
    assert resolve_preprocess(path, QuantizeConfig(preprocess="none")).raw


def test_bytes_that_other_ops_read(tmp_path: Path) -> None:
    """A Resize of bytes rounds: it keeps them."""
    g = SmallGraph(("b", 4, 4, 3))
    g.inputs[0].type.tensor_type.elem_type = BYTES
    turned = g("Transpose", "x", perm=list(FIRST))
    grown = g("Resize", turned, "", np.array([1, 1, 2, 2], np.float32), mode="linear")
    out = g("ReduceMean", g("Cast", grown, to=1), np.array([2, 3]), keepdims=0)
    g.output_shape = ("b", 3)
    path = g.save(tmp_path / "model.onnx", out)
    prepared = prepare(path)
    graph.save(prepared.model, tmp_path / "again.onnx")
    feed = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(run(tmp_path / "again.onnx", feed)[0], run(path, feed)[0], rtol=1e-6)


def test_images_are_fed_as_the_file_takes_them() -> None:
    images = np.array([0, 1e-4, 1, 254.9999, 255, 2], np.float32).reshape(1, 3, 2, 1)
    found = fed(images, ["b", 2, 1, 3], np.uint8)
    assert found.tolist() == [[[[0, 1, 255]], [[0, 255, 2]]]]
    assert found.dtype == np.uint8
    first = fed(images, ["b", 3, "h", "w"], np.uint8)
    assert first.tolist() == [[[[0], [0]], [[1], [255]], [[255], [2]]]]
    assert fed(images, [None, 3, 2, 1], np.float16).shape == images.shape
    for wrong in (images / 255, images - 3, images + 3):
        with pytest.raises(ImageError, match="takes pixels as uint8, 0 to 255, got"):
            fed(wrong, ["b", 3, "h", "w"], np.uint8)


def test_arrays_as_the_model_takes_them(tmp_path: Path) -> None:
    floats = resolve_preprocess(network(tmp_path, dtype=FLOAT), QuantizeConfig())
    given = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    for array in (given, given.astype(np.float32), iter(given.astype(np.float32))):
        (batch,) = open_images(array, floats).batches(8)
        np.testing.assert_array_equal(batch, given.transpose(FIRST))
    with pytest.raises(ImageError, match=rf"images \[N, {SIDE}, {SIDE}, 3\], got float32"):
        open_images(given.transpose(FIRST).astype(np.float32), floats)
    first = resolve_preprocess(network(tmp_path, last=False), QuantizeConfig())
    (batch,) = open_images(given.transpose(FIRST), first).batches(8)
    np.testing.assert_array_equal(batch, given.transpose(FIRST))


def test_noise_for_pixels() -> None:
    source = NoiseSource(Preprocess.named("none", 32), 4)
    (batch,) = source.batches(4)
    assert batch.min() >= 0
    assert batch.max() <= 255
    assert 120 < batch.mean() < 135
    np.testing.assert_array_equal(batch, np.rint(batch))


def test_raw_pixels_are_exact(pictures: Path) -> None:
    source = open_images(pictures, Preprocess.named("none", SIDE))
    (batch,) = source.batches(12)
    np.testing.assert_array_equal(batch, pixels_of(pictures).transpose(FIRST))
    again = Preprocess.from_json(Preprocess.named("none", SIDE).to_json())
    assert again.raw


def test_the_benchmark_feeds_bytes(tmp_path: Path) -> None:
    subject = read_subject(network(tmp_path))
    feed = subject.feed(2)["x"]
    assert (feed.dtype, feed.shape) == (np.uint8, (2, SIDE, SIDE, 3))
    assert len(np.unique(feed)) > 100


TEXT = {
    "text": (["ids: 7 b s"], "an input: 'ids' int64 [b, s]; nothing is given for 'ids'"),
    "image and text": (
        ["x: 1 b 3 8 8", "ids: 7 b s"],
        "2 inputs: 'x' float [b, 3, 8, 8], 'ids' int64 [b, s]; nothing is given for 'ids'",
    ),
    "two images": (["x: 1 b 3 8 8", "y: 1 b 3 8 8"], "nothing is given for 'y': --input y=FILE"),
    "signal": (["x: 1 b 80 3000"], "an input: 'x' float [b, 80, 3000]; nothing is given"),
}


@pytest.mark.parametrize("kind", TEXT)
def test_other_inputs_are_named(kind: str, tmp_path: Path) -> None:
    """What the file takes, and how that is given."""
    inputs, words = TEXT[kind]
    g = SmallGraph((1,))
    g.inputs.clear()
    parts = []
    for text in inputs:
        name, _, rest = text.partition(": ")
        dtype, *dims = rest.split()
        shape = [int(d) if d.isdecimal() else d for d in dims]
        g.inputs.append(onnx.helper.make_tensor_value_info(name, int(dtype), shape))
        parts.append(g("ReduceSum", g("Cast", name, to=1), keepdims=0))
    out = g("Identity", parts[0]) if len(parts) == 1 else g("Add", *parts)
    path = g.save(tmp_path / "model.onnx", out)
    prepare(path)
    images = np.zeros((3, 3, 8, 8), np.float32)
    with pytest.raises(ConfigError) as caught:
        open_source(path, images, Preprocess.named("none", 8))
    assert words in str(caught.value)


def test_sizes_below_one_are_dynamic(tmp_path: Path) -> None:
    """Paddle's exporters write -1 for a dynamic batch."""
    g = SmallGraph((-1, 3, 8, 8))
    g.output_shape = (-1, 3)
    out = g("ReduceMean", "x", np.array([2, 3]), keepdims=0)
    path = g.save(tmp_path / "model.onnx", out)
    prepared = prepare(path)
    shape = prepared.model.graph.inputs[0].shape
    assert shape is not None
    assert [d if isinstance(d, int) else d.value for d in shape] == ["batch", 3, 8, 8]
    images = open_images(sample(3, 3, 8, 8), resolve_preprocess(path, QuantizeConfig()))
    assert evaluate(path, images, reference=path, threads=1, batch_size=2).count == 3


@pytest.mark.skipif(not CASE.is_file(), reason="needs ../shared/cases")
def test_the_case() -> None:
    prepared = prepare(CASE)
    assert prepared.model.graph[0].op_type == "Conv"
    assert resolve_preprocess(CASE, QuantizeConfig()).raw
