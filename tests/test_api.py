"""The package from Python: every kind of model and of images gives the same numbers."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image

import ptq_onnx
from ptq_onnx import PtqError, QuantizeConfig, Result
from ptq_onnx.config import options
from ptq_onnx.images.preprocess import Preprocess, load_image

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "img" / "digits"
FILES = sorted((DIGITS / "calib").iterdir())[:6]
QUICK: dict[str, Any] = {"images": 6, "report": False, "threads": 1}


@pytest.fixture(scope="module")
def preprocess() -> Preprocess:
    return ptq_onnx.resolve_preprocess(MODEL, QuantizeConfig())


@pytest.fixture(scope="module")
def arrays(preprocess: Preprocess) -> np.ndarray:
    """The images as model inputs [6, C, H, W]."""
    return np.stack([load_image(path, preprocess) for path in FILES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calib")
    for file in FILES:
        (path / file.name).write_bytes(file.read_bytes())
    return path


def scales(result: Result) -> dict[str, Any]:
    return {t["tensor"]: (t["scale"], t["zero_point"]) for t in result.report["tensors"]}


class Reader:
    """As onnxruntime's CalibrationDataReader: a dict of inputs, then None."""

    def __init__(self, arrays: np.ndarray, **more: Any) -> None:
        self.items = iter([{"input": array[None], **more} for array in arrays])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def sources(folder: Path, arrays: np.ndarray, preprocess: Preprocess) -> dict[str, Any]:
    """The same six images in every form that is taken."""
    labels = torch.arange(6)
    data = torch.utils.data.TensorDataset(torch.tensor(arrays), labels)
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in FILES])
    return {
        "folder": folder,
        "folder as text": str(folder),
        "paths": FILES,
        "paths as text": [str(path) for path in FILES],
        "pictures": [Image.open(path) for path in FILES],
        "pixels": pixels,
        "generator of pictures": (Image.open(path) for path in FILES),
        "array": arrays,
        "list of arrays": list(arrays),
        "tensor": torch.tensor(arrays),
        "DataLoader of (x, y)": torch.utils.data.DataLoader(data, batch_size=4),
        "DataLoader of x": torch.utils.data.DataLoader(torch.tensor(arrays), batch_size=2),
        "CalibrationDataReader": Reader(arrays),
        "dicts": [{"input": a[None]} for a in arrays],
        "dicts of a trainer": [{"pixel_values": a, "labels": 3} for a in torch.tensor(arrays)],
        "generator": (array for array in arrays),
        "open_images": ptq_onnx.open_images(folder, preprocess),
    }


def pictures(kind: str) -> bool:
    """Known to be of 8 bits: ``deploy`` then quantizes the image in units of its pixels."""
    return kind in {
        "folder", "folder as text", "paths", "paths as text", "pictures", "pixels",
        "generator of pictures", "open_images",
    }  # fmt: skip


def test_equal_scales(
    folder: Path, arrays: np.ndarray, preprocess: Preprocess, short: Path, tmp_path: Path
) -> None:
    """Those below have equal arrays; some of them to the end."""
    kinds = sources(folder, arrays, preprocess)
    found = {
        kind: scales(
            ptq_onnx.quantize(
                short, calib=kinds[kind], output=tmp_path / "o", quantizer=quantizer, **QUICK
            )
        )
        for kind, quantizer in (
            ("folder", "vanilla"), ("DataLoader of (x, y)", "vanilla"),
            ("CalibrationDataReader", "vanilla"),
            ("paths", "deploy"), ("generator of pictures", "deploy"), ("pictures", "deploy"),
        )
    }  # fmt: skip
    assert len(found["folder"]) >= 20
    assert found["DataLoader of (x, y)"] == found["CalibrationDataReader"] == found["folder"]
    assert found["pictures"] == found["generator of pictures"] == found["paths"]


def test_every_kind_of_images_gives_equal_arrays(
    folder: Path, arrays: np.ndarray, preprocess: Preprocess
) -> None:
    for kind, images in sources(folder, arrays, preprocess).items():
        source = ptq_onnx.open_images(images, preprocess, name="input")
        assert source.pictures == pictures(kind), kind
        assert len(source) == 6
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4))), arrays)


def test_every_kind_of_model_gives_the_same_file(folder: Path, short: Path, tmp_path: Path) -> None:
    proto = onnx.load(short)
    models = {"path": short, "text": str(short), "ModelProto": proto, "ir": ir.load(short)}
    found = {
        kind: ptq_onnx.quantize(model, calib=folder, output=tmp_path / f"{kind}.onnx", **QUICK)
        for kind, model in models.items()
    }
    for kind, result in found.items():
        assert result.model == tmp_path / f"{kind}.onnx"
        assert scales(result) == scales(found["path"]), kind
    assert found["ModelProto"].report["model"]["path"] == "model.onnx"


def test_options_as_keywords(folder: Path, short: Path, tmp_path: Path) -> None:
    result = ptq_onnx.quantize(
        short, calib=folder, output=tmp_path / "o", quantizer="fqvit", rotate=False, bits=(8, 8, 4),
        keep_float="head", attention_blocks=[0], size=32, **QUICK,
    )  # fmt: skip
    config = QuantizeConfig.load(tmp_path / "o/config.yaml")
    assert config == QuantizeConfig(
        quantizer="fqvit", rotate=False, bits="8/8/4", keep_float=("head",), attention_blocks=(0,),
        size=(32, 32), **QUICK,
    )  # fmt: skip
    assert result.report["config"]["bits"] == "8/8/4"
    assert options.configured(config, {"bits": "6/6/6"}).bits == "6/6/6"  # keywords win
    assert options.configured(config, {}) is not None


def test_the_keywords_are_the_fields_of_the_config() -> None:
    keys = set(typing.get_type_hints(options.Options))
    assert keys | {"preprocess"} == {f.name for f in fields(QuantizeConfig)}
    for function in (ptq_onnx.quantize, ptq_onnx.analyse):
        hints = typing.get_type_hints(function)
        assert hints["return"] is Result


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantiser": "fqvit"}, "no option 'quantiser': did you mean quantizer"),
        ({"bits": (8, 8)}, "expected three, as in (8, 8, 4)"),
        ({"bits": (8, 8, 99)}, "attention must be a whole number from 2 to 16"),
        ({"quantizer": "best"}, "vanilla, channelwise, fqvit, ptq4vit, deploy"),
        ({"keep_float": 5}, "--keep-float 5: must be a list, each text"),
        ({"images": "many"}, "--images must be at least 1"),
        ({"config": {"bits": "8/8/8"}}, "expected a QuantizeConfig, or options as keywords"),
        ({"calib": 3}, "a list of paths or of PIL images"),
        ({"calib": "nowhere"}, "'nowhere' does not exist"),
        ({"calib": []}, "yields no images"),
        ({"calib": [{"a": np.zeros(3), "b": 1}]}, "expected the model's input 'input'"),
        ({"calib": ["no.png", 3]}, "holds paths and other things"),
        ({"preprocess": 3}, "a function from a picture to an array"),
        ({"preprocess": "mnist"}, "There is no preprocess 'mnist'"),
        ({"preprocess": lambda picture: 3}, "expected floats [3, 32, 32] back"),
        ({"labels": [1, 2]}, "labels without val"),
        ({"val": DIGITS / "calib", "labels": [1, 2]}, "expected 128 whole numbers"),
    ],
)
def test_wrong_types_are_told(
    given: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PtqError) as error:
        ptq_onnx.quantize(MODEL, **{"calib": folder, "output": tmp_path / "o", **QUICK, **given})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (3, "builtins.int is not a model: a model is the path of an .onnx file"),
        (torch.nn.Linear(2, 2), "is a PyTorch module: export it to ONNX first"),
        (b"", "builtins.bytes is not a model"),
        ("nix.onnx", "nix.onnx does not exist"),
        (onnx.ModelProto(), "The model "),
    ],
)
def test_what_is_no_model(model: Any, said: str, tmp_path: Path) -> None:
    for function in (ptq_onnx.quantize, ptq_onnx.inspect, ptq_onnx.roles, ptq_onnx.check):
        with pytest.raises(PtqError) as error:
            function(model)
        assert said in str(error.value)
        assert "/tmp" not in str(error.value)


def test_weights_left_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.load(MODEL), path, save_as_external_data=True, location="m.bin")
    proto = onnx.load(path, load_external_data=False)
    with pytest.raises(PtqError, match="keeps weights in another file"):
        ptq_onnx.inspect(proto)
    assert ptq_onnx.inspect(onnx.load(path)).blocks == 6


class TestPreprocessingFunction:
    @staticmethod
    def function(preprocess: Preprocess) -> Any:
        def transform(picture: Image.Image) -> np.ndarray:
            assert isinstance(picture, Image.Image)
            pixels = np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
            mean, std = (np.reshape(v, (3, 1, 1)) for v in (preprocess.mean, preprocess.std))
            return (pixels - mean) / std

        return transform

    def test_scales(self, folder: Path, arrays: np.ndarray, preprocess: Preprocess) -> None:
        transform = self.function(preprocess)
        for images in (folder, FILES, [Image.open(f) for f in FILES], map(Image.open, FILES)):
            source = ptq_onnx.open_images(images, preprocess, transform=transform)
            found = np.concatenate(list(source.batches(4)))
            np.testing.assert_allclose(found, arrays, atol=1e-6)
            assert not source.pictures

    def test_whole(self, folder: Path, preprocess: Preprocess, short: Path, tmp_path: Path) -> None:
        """A tensor from the function, and a note that the file does not know it."""

        def transform(picture: Image.Image) -> torch.Tensor:
            return torch.tensor(self.function(preprocess)(picture))

        result = ptq_onnx.quantize(
            short, calib=folder, preprocess=transform, output=tmp_path / "o", images=4, threads=1
        )
        assert any("your own preprocessing function" in note for note in result.report["notes"])
        assert result.report["analysis"]["held_apart"]
        stored = {p.key for p in onnx.load(result.model).metadata_props}
        assert not {key for key in stored if "preprocess" in key}
        found = ptq_onnx.evaluate(result.model, folder, reference=short, preprocess=transform)
        assert found.count == 6
        assert found.sqnr_db is not None
        assert found.sqnr_db > 15

    def test_arrays_in_a_file(self, tmp_path: Path, arrays: np.ndarray) -> None:
        np.save(tmp_path / "a.npy", arrays)
        with pytest.raises(PtqError, match="holds arrays, and preprocess is a function"):
            ptq_onnx.quantize(MODEL, calib=tmp_path / "a.npy", preprocess=lambda p: p)


def test_labels_that_a_loader_yields(
    arrays: np.ndarray, folder: Path, preprocess: Preprocess, short: Path, tmp_path: Path
) -> None:
    logits = ptq_onnx.evaluation.evaluate.logits(short, ptq_onnx.open_images(arrays, preprocess))
    truth = logits.argmax(axis=1)
    truth[0] = (truth[0] + 1) % 10
    pairs = torch.utils.data.TensorDataset(torch.tensor(arrays), torch.tensor(truth))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    assert ptq_onnx.evaluate(short, loader).top1 == pytest.approx(500 / 6)
    assert ptq_onnx.evaluate(short, arrays, list(truth)).top1 == pytest.approx(500 / 6)
    result = ptq_onnx.quantize(
        short,
        calib=folder,
        val=loader,
        output=tmp_path / "o",
        quantizer="fqvit",
        rotate=False,
        **QUICK,
    )
    assert result.report["accuracy"]["float"]["top1"] == pytest.approx(500 / 6)
    soft = [(array[None], np.zeros((1, 10), np.float32)) for array in arrays]
    assert ptq_onnx.open_images(soft, preprocess).labels is None
    endless: Iterator[Any] = iter([(arrays[:4], truth[:4]), (arrays[4:], truth[4:])])
    assert ptq_onnx.open_images(endless, preprocess, limit=5).labels.tolist() == list(truth[:5])


def test_two_arrays_are_two_images(arrays: np.ndarray, preprocess: Preprocess) -> None:
    """A list of two is no pair of images and labels."""
    assert len(ptq_onnx.open_images([arrays[0], arrays[1]], preprocess)) == 2
    assert len(ptq_onnx.open_images(iter([arrays[:2], arrays[2:]]), preprocess)) == 6


def test_how_a_result_looks(folder: Path, short: Path, tmp_path: Path) -> None:
    result = ptq_onnx.quantize(
        short, calib=folder, val=folder, output=tmp_path / "<b>.onnx", images=4,
        pictures=False, threads=1,
    )  # fmt: skip
    text = repr(result)
    assert "\n" not in text
    assert len(text) < 250
    sizes = f"{short.stat().st_size / 1e6:.2f} → 0."
    assert text.startswith(f"Result({tmp_path}/<b>.onnx: size {sizes}")
    for word in (" MB, SQNR ", " dB, same class ", " %", "note"):
        assert word in text
    page = result._repr_html_()
    assert "<b>" not in page
    assert f"href='{tmp_path.as_posix()}/&lt;b&gt;/report.html'" in page
    for word in ("same top class", "SQNR", sizes, "<li>"):
        assert word in page
    bare = Result({"sizes": {"float": 2e6, "quantized": 1e6}}, tmp_path, ())
    assert repr(bare) == f"Result({tmp_path}: size 2.00 → 1.00 MB)"
    assert "Nothing was measured" in bare._repr_html_()


def test_analyse(folder: Path, short: Path, tmp_path: Path) -> None:
    result = ptq_onnx.analyse(
        short, calib=folder, output=tmp_path / "o", images=4, quantizer="vanilla",
        sensitivity=False, pictures=False, threads=1,
    )  # fmt: skip
    assert result.analysis is not None
    assert result.model is None
    assert {p.name for p in result.files} == {"config.yaml", "report.html", "report.json"}
    with pytest.raises(PtqError, match="no model is written here"):
        ptq_onnx.analyse(MODEL, calib=folder, output="x.onnx")


def test_the_other_commands(folder: Path, short: Path, tmp_path: Path) -> None:
    proto, small = onnx.load(MODEL), onnx.load(short)
    result = ptq_onnx.quantize(small, calib=folder, output=tmp_path / "q.onnx", **QUICK)
    assert result.model is not None
    assert ptq_onnx.check(result.model).errors == ()
    assert ptq_onnx.check(onnx.load(result.model), "onnxruntime").errors == ()
    assert ptq_onnx.inspect(proto).blocks == 6
    found = ptq_onnx.roles(proto)
    assert found["fc2"].blocks == (0, 1, 2, 3, 4, 5)
    assert len(found["fc2"].nodes) == 6
    assert found["head"].blocks == ()
    assert {"qkv", "q", "softmax", "patch_embed"} <= set(found)
    table = ptq_onnx.compare(
        [result.model, result.output], folder, labels=[0] * 6, block_images=2, threads=1
    )
    assert table.contenders[0].name == "float"
    assert table.contenders[1].sqnr_db == pytest.approx(table.contenders[2].sqnr_db)
    assert table.contenders[0].top1 is not None
    timed = ptq_onnx.benchmark([small, result.model], batches=[1], seconds=0, threads=1)
    assert [t.quantized for t in timed.timings] == [False, True]


def test_a_role_that_is_not_there_fails_before_any_work(tmp_path: Path) -> None:
    """In a process of its own: no images are opened, PPQ is not loaded."""
    code = (
        "import sys, ptq_onnx\n"
        "from ptq_onnx.images import opening as images\n"
        "def no_images(*_, **__): raise SystemExit('images were opened')\n"
        "images.FolderSource.__init__ = no_images\n"
        "for name in ('keep_float', 'more_bits', 'per_channel'):\n"
        f"    try: ptq_onnx.quantize({str(MODEL)!r}, calib={str(DIGITS / 'calib')!r},"
        " **{name: 'fc3'})\n"
        "    except ptq_onnx.PtqError as error: print(error)\n"
        "print(sorted({'ppq', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    *said, loaded = done.stdout.splitlines()
    for line, option in zip(said, ("--keep-float", "--more-bits", "--per-channel"), strict=True):
        assert line.startswith(f"{option} fc3: the model has no role 'fc3' (did you mean fc2?)")
        assert "patch_embed" in line
    assert loaded == "[]"
    assert list(tmp_path.iterdir()) == []


def test_a_packed_role_is_its_parts_where_a_form_takes_it_apart(
    folder: Path, short: Path, tmp_path: Path
) -> None:
    """``inspect`` tells qkv; deploy makes three linears of it."""
    kept = [
        ptq_onnx.quantize(
            short, calib=folder, output=tmp_path / str(index), keep_float=names, **QUICK
        )
        for index, names in enumerate((["qkv@0"], ["q@0", "k@0", "v@0"]))
    ]
    floats = [
        {f["tensor"] for f in result.report["floats"] if "by request" in f["reason"]}
        for result in kept
    ]
    assert floats[0] == floats[1]
    assert len(floats[0]) >= 3
    with pytest.raises(PtqError, match="there is no block 1"):
        ptq_onnx.quantize(short, calib=folder, keep_float="qkv@1")
