"""The timm exporter: numbers equal to timm's, preprocessing in the file, every error one line."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults.runs import limited
from fuzz.oracle import judge

from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.evaluate import logits
from ptq_onnx.images.opening import METADATA_KEY, Preprocess, open_images
from ptq_onnx.pipeline import timm_export
from ptq_onnx.pipeline.timm_export import export_timm
from ptq_onnx.pipeline.timm_names import looks_like_timm

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm, with the two operators that torchvision wants and a CPU-only torch may lack."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        yield pytest.importorskip("timm", exc_type=ImportError)
    except RuntimeError as error:
        pytest.skip(f"timm does not import here: {error}")


CAPTURED: list[Any] = []


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of one network (seed 0, images of 32) is captured once for all tests, and written
    as often as torch is asked to."""
    whole = torch.onnx.export

    def once(model: Any, images: Any, path: str, **options: Any) -> Any:
        if not options["dynamo"]:
            return whole(model, images, path, **options)
        if not CAPTURED:
            CAPTURED.append(whole(model, images, None, **options))
        return CAPTURED[0].save(path, external_data=options["external_data"])

    monkeypatch.setattr(torch.onnx, "export", once)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for timm that knows one model and fails as told."""

    def create_model(*args: Any, **options: Any) -> Any:
        raise module.failure

    module = types.SimpleNamespace(
        is_model=lambda name: name == NAME,
        is_model_pretrained=lambda name: True,
        list_models=lambda pretrained=False: [NAME, "vit_small_patch16_224", "resnet18"],
        create_model=create_model,
        failure=OSError("offline"),
    )
    monkeypatch.setattr(timm_export, "_import_timm", lambda: module)
    return module


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, True),
        ("vit_base_patch16_clip_224.openai", True),
        ("timm/deit3_small_patch16_224", True),
        ("swinv2_tiny_window8_256", True),
        ("beitv2_base_patch16_224", True),
        ("eva02_tiny_patch14_336", True),
        ("cait_xxs24_224", True),
        ("vit_small_patch14_dinov2", True),
        ("vit_tiny.onnx", False),
        ("models/vit_tiny_patch16_224", False),
        ("resnet50", False),
        ("", False),
    ],
)
def test_looks_like_timm(name: str, expected: bool) -> None:
    assert looks_like_timm(name) is expected


def test_export(timm: Any, captured_once: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export_timm(NAME, tmp_path / "new/m.onnx", pretrained=False, image_size=32)
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert proto.opset_import[0].version == 18
    preprocess = Preprocess.from_json({p.key: p.value for p in proto.metadata_props}[METADATA_KEY])
    assert preprocess == Preprocess((0.5,) * 3, (0.5,) * 3, (32, 32), crop_pct=0.9)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert sum(node.op_type == "LayerNormalization" for node in proto.graph.node) == 25
    assert sum(node.op_type == "Softmax" for node in proto.graph.node) == 12

    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, exportable=True).eval()
    pixels = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.tensor(pixels)).numpy()
    got = logits(path, open_images(pixels, preprocess), batch_size=3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files")
def test_a_full_disk(timm: Any, captured_once: None, tmp_path: Path) -> None:
    """One line, and neither a part of the file nor a folder that was made for it."""
    torch.manual_seed(0)

    def export() -> None:
        export_timm(NAME, tmp_path / "new/m.onnx", pretrained=False, image_size=32)

    for size in (600, 1 << 20):
        found = judge(limited(size, export), tmp_path)
        assert found.finding == ""
        assert found.code == 2
        assert "File too large" in found.text
        assert [path.name for path in tmp_path.iterdir()] == ["tmp"]  # the oracle's own


def test_real_unknown_name(timm: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no model 'vit_tiny_patch16_244'.*{NAME}"):
        export_timm("vit_tiny_patch16_244", tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="cannot build 'resnet18' at image size 48"):
        export_timm("resnet18", tmp_path / "m.onnx", pretrained=False, image_size=48)
    assert not list(tmp_path.iterdir())


def test_falls_back_to_torchscript(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, calls = torch.onnx.export, []

    def picky(*args: Any, **options: Any) -> Any:
        calls.append(options["dynamo"])
        if options["dynamo"]:
            raise RuntimeError("cannot capture")
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", picky)
    path = export_timm(NAME, tmp_path / "m.onnx", pretrained=False, image_size=32)
    assert calls == [True, False]
    pixels = np.zeros((3, 3, 32, 32), np.float32)
    assert logits(path, open_images(pixels, Preprocess.named("inception", 32))).shape == (3, 1000)


def test_a_failed_export_leaves_nothing(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        Path(args[2]).write_bytes(b"half a file")
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"cannot export .* at opset 18: two lines"):
        export_timm(NAME, tmp_path / "m.onnx", pretrained=False, image_size=32)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_unknown_name(fake: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {NAME}"):
        export_timm("vit_tiny_patch16_24", tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"see timm\.list_models"):
        export_timm("qqqqqq", tmp_path / "m.onnx")


def test_hub_out_of_reach(fake: Any, tmp_path: Path) -> None:
    wrapped = RuntimeError("cannot\nload")
    wrapped.__cause__ = ConnectionError("no route")
    for fake.failure in (OSError("offline"), wrapped):
        with pytest.raises(ConfigError, match=r"downloaded.*--no-pretrained") as error:
            export_timm(NAME, tmp_path / "m.onnx")
        assert "\n" not in str(error.value)
    fake.failure = TypeError("img_size")
    with pytest.raises(ConfigError, match=f"cannot build '{NAME}' at image size 8: img_size"):
        export_timm(NAME, tmp_path / "m.onnx", image_size=8)
    fake.is_model_pretrained = lambda name: False
    with pytest.raises(ConfigError, match=r"no weights for .*--no-pretrained"):
        export_timm(NAME, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("failure", "match"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "'timm' is missing"),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision must be built for"),
        (ImportError("cannot import name 'x'"), "torchvision must be built for"),
    ],
)
def test_timm_does_not_import(
    failure: Exception, match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(name: str) -> None:
        raise failure

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=match) as error:
        export_timm(NAME, tmp_path / "m.onnx")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        ("2.13.0+cpu", None, "Install torchvision==0.28.* in its CPU build"),
        ("2.4.1", None, "Install torchvision==0.19.* in its CPU build"),
        ("2.13.0", "13.0", "pip install 'torchvision==0.28.*' timm"),
        ("3.0.0", "13.0", "pip install 'torchvision' timm"),
    ],
)
def test_the_torch_that_is_here_stays(
    version: str, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    advice = timm_export._advice()
    assert said in advice
    assert "-U" not in advice
    assert " torch " not in advice.replace("torchvision", "")


def test_importing_the_exporter_does_not_import_timm() -> None:
    import subprocess

    code = "import sys, ptq_onnx.pipeline.timm_export; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_model_that_does_not_exist_is_told_without_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\n"
        "from ptq_onnx.errors import ModelError\n"
        "from ptq_onnx.pipeline.model_path import find_model\n"
        "try: find_model('vit_tiny_patch16_224')\n"
        "except ModelError as error: print('torch' in sys.modules, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("False Model vit_tiny_patch16_224 does not exist. To make it")
