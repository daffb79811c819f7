"""A quantization in two halves, its file measured in parts: the same bytes as in one go."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_image_model import image_model, pictures

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation import parts as evaluation_parts
from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.parts import parts_of
from ptq_onnx.files.output_paths import Output
from ptq_onnx.images.opening import Images, Preprocess, open_images
from ptq_onnx.pipeline.apart import Opened, Unfinished, finish, measure_part, quantize_apart
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.pipeline.reading import preparing
from ptq_onnx.pipeline.request import Request, Shared


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and 21 labelled images in parts of eight."""
    monkeypatch.setattr(evaluation_parts, "FEWEST", 8)
    monkeypatch.setattr(evaluation_parts, "SECONDS", 0.0)
    image_model(tmp_path / "m.onnx")
    pictures(tmp_path / "calib", 4)
    names = sorted(p.name for p in pictures(tmp_path / "val", 21).iterdir())
    lines = [f"{name} {number % 5}\n" for number, name in enumerate(names)]
    (tmp_path / "val.txt").write_text("".join(lines))
    return tmp_path


def request(base: Path, *, report: bool = False) -> Request:
    how = {"sensitivity": False, "pictures": False, "check_preprocess": False}
    config = QuantizeConfig(threads=1, images=4, report=report, **how)
    return Request(
        model=base / "m.onnx",
        config=config,
        place=Output.at(base / "out"),
        calib=str(base / "calib"),
        val=str(base / "val"),
        labels=str(base / "val.txt"),
        shared=Shared(base / "floats", base / "prepared"),
    )


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def whole(asked: Request) -> dict[str, bytes]:
    """What one process writes."""
    quantize(
        asked.model, config=asked.config, output=asked.place.folder, calib=asked.calib,
        val=asked.val, labels=asked.labels,
    )  # fmt: skip
    return content(asked.place.folder)


def first_half(asked: Request, base: Path) -> Unfinished:
    found = quantize_apart(asked, base / "between")
    assert isinstance(found, Unfinished)
    return found


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each run of a model."""
    runs: list[int] = []
    plain = Network.__call__

    def call(self: Network, images: np.ndarray) -> dict[str, np.ndarray]:
        runs.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(Network, "__call__", call)
    return runs


@pytest.mark.parametrize("report", [False, True])
def test_the_same_bytes_in_any_order(base: Path, ran: list[int], report: bool) -> None:
    asked = request(base, report=report)
    wanted = whole(asked)
    assert b'"top1"' in wanted["report.json"]
    ran.clear()
    preparing(asked).keep(base / "prepared")
    found = first_half(asked, base)
    assert ran == []
    assert found.parts == ((0, 8), (8, 16), (16, 21))
    for opened in (Opened(), Opened()):  # the last part first; what is there is not run again
        for part in found.parts[::-1]:
            for quantized in (True, False):
                assert measure_part(found, part, opened, quantized=quantized)
    assert sorted(ran) == [5, 5, 8, 8, 8, 8]
    ran.clear()
    finish(found, whole=True)
    assert ran == []
    assert content(base / "out") == wanted
    assert not found.folder.exists()


def test_an_image_that_cannot_be_read(base: Path, ran: list[int]) -> None:
    """Its part is not whole; the figures are those of one process, which leaves it out."""
    asked = request(base)
    names = sorted((base / "val").iterdir())
    names[9].write_bytes(b"no picture")
    wanted = whole(asked)
    found = first_half(asked, base)
    kept = [measure_part(found, p, Opened(), quantized=q) for p in found.parts for q in (0, 1)]
    assert kept == [True, True, False, False, True, True]
    finish(found, whole=False)
    assert content(base / "out") == wanted


def test_killed_while_the_files_move(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another try finds in place of the new files may be those of an earlier run."""
    asked = request(base)
    whole(replace(asked, config=replace(asked.config, quantizer="channelwise")))
    old = content(base / "out")
    found = first_half(asked, base)
    for part in found.parts:
        for quantized in (True, False):
            measure_part(found, part, Opened(), quantized=quantized)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ptq_onnx.pipeline.apart.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(found, whole=True)
    assert content(found.folder / "files")["quantized.onnx"] == old["quantized.onnx"]
    wanted = content(base / "out")
    finish(found, whole=True)
    assert content(base / "out") == wanted
    assert wanted["quantized.onnx"] != old["quantized.onnx"]


def test_few_images_are_measured_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_parts, "FEWEST", 64)
    asked = request(base)
    wanted = whole(asked)
    assert not isinstance(quantize_apart(asked, base / "between"), Unfinished)
    assert content(base / "out") == wanted
    assert not (base / "between").exists()


def test_outputs_that_are_gone_are_an_error(base: Path) -> None:
    found = first_half(request(base), base)
    for part in found.parts:
        for quantized in (True, False):
            measure_part(found, part, Opened(), quantized=quantized)
    (found.own.part(8).path).unlink()
    with pytest.raises(Exception, match="that were kept are not there any more"):
        finish(found, whole=True)


@pytest.mark.parametrize(
    ("images", "size", "wanted"),
    [
        (50_000, 22_900_000, (432, 116)),  # ViT-Ti: ten seconds of a core
        (50_000, 346_000_000, (64, 782)),  # ViT-B
        (450, 400_000, (450, 1)),
        (5_000, 0, (2048, 3)),
        (0, 1, (0, 0)),
    ],
)
def test_edges_follow_from_images_and_model(
    images: int, size: int, wanted: tuple[int, int]
) -> None:
    parts = parts_of(images, size, 8)
    assert len(parts) == wanted[1]
    assert all(a[1] == b[0] and a[1] % 8 == 0 for a, b in pairwise(parts))
    if parts:
        assert (parts[0][0], parts[-1][1]) == (0, images)
        assert parts[0][1] == wanted[0]


def test_parts_of_sources(base: Path) -> None:
    how = Preprocess((0.5,) * 3, (0.5,) * 3, (16, 16))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.save(base / "a.npy", pixels)
    np.savez_compressed(base / "a.npz", pixels)
    given: tuple[Images, ...] = (base / "a.npy", pixels, base / "val")
    for images in given:
        source = open_images(images, how)
        part = source.part(3, 5)
        assert part is not None
        assert part.names == source.names[3:5]
        whole_of = np.concatenate(list(source.batches(4)))
        np.testing.assert_array_equal(next(part.batches(4)), whole_of[3:5])
    assert open_images(base / "a.npz", how).part(3, 5) is None
