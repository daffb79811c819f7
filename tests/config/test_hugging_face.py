"""``preprocessor_config.json``: what the processors of transformers do, to a grey level or two."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ptq_onnx import QuantizeConfig, open_images, resolve_preprocess
from ptq_onnx.config.hugging_face import FILE, from_processor, read_processor
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.preprocess import Preprocess, from_image
from ptq_onnx.pipeline.preprocess_input import taken

MODEL = Path(__file__).resolve().parents[2] / "models" / "digits_vit.onnx"
HALF, THIRDS = [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]
VIT: dict[str, Any] = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF,
    "image_processor_type": "ViTImageProcessor", "image_std": HALF, "resample": 2,
    "rescale_factor": 1 / 255, "size": {"height": 224, "width": 224},
}  # fmt: skip
CLIP: dict[str, Any] = {
    **VIT, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3,
    "size": {"shortest_edge": 256}, "image_processor_type": "BitImageProcessor",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (VIT, Preprocess(HALF, HALF, (224, 224), 1.0, "bilinear", squash=True)),
        (CLIP, Preprocess(HALF, HALF, (224, 224), 0.875, "bicubic")),
        ({**VIT, "size": 384}, Preprocess(HALF, HALF, (384, 384), 1.0, "bilinear", squash=True)),
        ({**VIT, "resample": 1, "image_mean": THIRDS},
         Preprocess(THIRDS, HALF, (224, 224), 1.0, "lanczos", squash=True)),
        ({**VIT, "do_normalize": False},
         Preprocess([0] * 3, [1] * 3, (224, 224), 1.0, "bilinear", squash=True)),
        ({**CLIP, "size": {"height": 256, "width": 256}},
         Preprocess(HALF, HALF, (224, 224), 0.875, "bicubic", squash=True)),
        ({**CLIP, "size": {"shortest_edge": 224}},
         Preprocess(HALF, HALF, (224, 224), 1.0, "bicubic")),
        ({**VIT, "size": {"shortest_edge": 224}, "crop_pct": 0.9,
          "image_processor_type": "ConvNextImageProcessor"},
         Preprocess(HALF, HALF, (224, 224), 0.9, "bilinear")),
    ],
)  # fmt: skip
def test_settings(settings: dict[str, Any], expected: Preprocess, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(settings))
    found = read_processor(tmp_path)
    assert found == expected == read_processor(tmp_path / FILE)
    assert Preprocess.from_json(found.to_json()) == found


def test_pixels_that_are_not_rescaled() -> None:
    """(x − 127.5) / 63 of x in 0 to 255."""
    settings = {**VIT, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.0] * 3}
    found = from_processor(settings, "here")
    picture = Image.new("RGB", (224, 224), (255, 0, 100))
    pixels = from_image(picture, found)[:, 0, 0]
    np.testing.assert_allclose(pixels, [(x - 127.5) / 63 for x in (255, 0, 100)], rtol=1e-5)


@pytest.mark.parametrize("edge", range(224, 520, 3))
def test_every_shortest_edge_is_met(edge: int) -> None:
    found = from_processor({**CLIP, "size": {"shortest_edge": edge}}, "here")
    assert int(found.size[0] / found.crop_pct) == edge


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ("{}", "neither image_mean nor size"),
        (json.dumps({**VIT, "image_mean": None}), "image_mean and image_std are missing"),
        (json.dumps({**VIT, "resample": 9}), "resample 9 is none of 0 \\(nearest\\)"),
        (json.dumps({**VIT, "do_pad": True}), "do_pad is not known here"),
        (json.dumps({**VIT, "resample": [3]}), r"resample a list is none of 0"),
        (json.dumps({**VIT, "rescale_factor": "x"}), "expected numbers"),
        (json.dumps({**VIT, "rescale_factor": 0}), "expected numbers that are not zero"),
        (json.dumps({**VIT, "size": {"height": None, "width": 8}}), "expected numbers"),
        (json.dumps({**CLIP, "size": {"shortest_edge": 0}}), "expected numbers that are not zero"),
        (json.dumps({**VIT, "size": {"longest_edge": 1024}}), "size .* is not known here"),
    ],
)
def test_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_processor(tmp_path)
    assert "\n" not in str(error.value)
    assert FILE in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json cannot be read: No such"):
        read_processor(tmp_path)
    with pytest.raises(
        ConfigError, match=r"a folder with a preprocessor_config\.json, or such a file"
    ):
        QuantizeConfig(preprocess=str(tmp_path / "nix"))


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    """By --preprocess, else beside a model without metadata, also one folder up from ``onnx/``."""
    import onnx

    proto = onnx.load(MODEL)
    stored = resolve_preprocess(MODEL, QuantizeConfig())
    (tmp_path / "onnx").mkdir()
    path = tmp_path / "onnx" / "model.onnx"
    onnx.save(proto, path)
    settings = {**VIT, "image_mean": THIRDS, "size": {"height": 32, "width": 32}}
    (tmp_path / FILE).write_text(json.dumps(settings))
    own = QuantizeConfig(preprocess=str(tmp_path))
    assert resolve_preprocess(path, QuantizeConfig()) == stored  # its metadata comes first
    assert resolve_preprocess(path, own).mean == tuple(THIRDS)
    assert QuantizeConfig.from_mapping({"preprocess": str(tmp_path)}, "here") == own
    del proto.metadata_props[:]
    onnx.save(proto, path)
    found = resolve_preprocess(path, QuantizeConfig())
    assert (found.mean, found.squash, found.size) == (tuple(THIRDS), True, (32, 32))
    assert resolve_preprocess(path, QuantizeConfig(preprocess="inception")).mean == (0.5,) * 3
    settings_given = taken(Preprocess.named("imagenet", 32), QuantizeConfig())[1]
    assert resolve_preprocess(path, QuantizeConfig(), settings_given).mean[0] == 0.485


@pytest.fixture
def processors() -> Iterator[Any]:
    """transformers, with the two operators that torchvision wants and a CPU-only torch may lack."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        yield importlib.import_module("transformers")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers does not import here: {error}")


@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "Bit"])
def test_as_transformers_does(name: str, processors: Any, tmp_path: Path) -> None:
    try:
        processor = getattr(processors, f"{name}ImageProcessor")()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no {name} here: {error}")
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((331, 248), Image.Resampling.BICUBIC)
    want = processor(images=picture, return_tensors="np")["pixel_values"][0]
    (tmp_path / FILE).write_text(processor.to_json_string())
    for given in (read_processor(tmp_path), taken(processor, QuantizeConfig())[1].values):
        assert given is not None
        got = next(open_images([picture], given).batches(1))[0]
        grey = 1 / 255 / min(given.std)
        assert np.abs(got - want).max() < 2.5 * grey
        assert np.abs(got - want).mean() < 0.01 * grey
