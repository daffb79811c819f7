"""The benchmark on COCO, on made-up scenes: what it measures, and that it survives a kill."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from several_outputs import SIZE, save_network

from ptq_onnx.cli.console import one_line_errors
from ptq_onnx.evaluation.metrics.detection import Boxes, Detection
from ptq_onnx.images.preprocess import Preprocess

pytest.importorskip("faster_coco_eval")

PICTURES = 10
IDS = (1, 3, 7)
"""Category ids, with gaps as COCO's have."""
SIZES = ((30, 20), (17, 40), (12, 12), (24, 24))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("coco")


@pytest.fixture(scope="module")
def scenes(coco: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, and as truth what the float model sees, in COCO's form: where
    a box lies in a picture is computed here."""
    folder = tmp_path_factory.mktemp("coco")
    model = save_network(folder / "m.onnx", ("boxes", "kinds"))
    opened = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    for name in ("val2017", "train2017", "annotations"):
        (folder / name).mkdir()
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for index in range(PICTURES):
        width, height = SIZES[index % len(SIZES)]
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        name = f"{index:012d}.png"
        for place in ("val2017", "train2017"):
            picture.save(folder / place / name)
        images.append({"id": 70 - index, "file_name": name, "width": width, "height": height})
        ratio = SIZE / max(width, height)
        ground = Image.new("RGB", (SIZE, SIZE), (124, 116, 104))  # imagenet's mean
        small = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        ground.paste(picture.resize(small, Image.Resampling.BILINEAR), (0, 0))
        pixels = (np.asarray(ground) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        fed = pixels.transpose(2, 0, 1)[None].astype(np.float32)
        boxes, kinds = opened.run(["boxes", "kinds"], {"x": fed})
        for (cx, cy, w, h), logits in zip(boxes[0] * SIZE, kinds[0], strict=True):
            corner = np.clip(np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]), 0, None)
            corner /= np.array([small[0] / width, small[1] / height] * 2)
            corner = np.minimum(corner, [width, height] * 2)
            entries.append(
                {"id": len(entries) + 1, "image_id": 70 - index, "iscrowd": 0,
                 "category_id": IDS[int(logits[:3].argmax())],
                 "bbox": [*corner[:2].tolist(), *(corner[2:] - corner[:2]).tolist()]}
            )  # fmt: skip
    made = {"images": images, "annotations": entries, "categories": [{"id": i} for i in IDS]}
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(made))
    return folder


def words(scenes: Path, work: Path, *more: str) -> list[str]:
    return [
        "--model", str(scenes / "m.onnx"), "--coco", str(scenes), "--work", str(work),
        "--preprocess", "imagenet", "--threads", "1", "--images", "8", "--quantizer", "deploy",
        "--metric-option", "classes=order", "--metric-option", "form=cxcywh", *more,
    ]  # fmt: skip


def rows(text: str) -> dict[str, list[float]]:
    """Figures by file."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {name: [float(v) for v in values] for name, *values in cells}


def test_float_and_quantized_and_a_run_taken_up(
    coco: Any, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    coco.main(words(scenes, tmp_path / "whole"))
    whole = rows(capsys.readouterr().out)
    assert whole["Full precision"] == [100.0, 100.0, 100.0]
    box_ap, at_50, _ = whole["deploy 8/8/8"]
    assert 30 < box_ap < 100
    assert at_50 >= box_ap

    found, counts = Detection.found, [0]

    def stops(metric: Detection, names: Any, outputs: Any) -> Any:
        counts[0] += 1
        if counts[0] == 5:
            raise KeyboardInterrupt
        return found(metric, names, outputs)

    monkeypatch.setattr(Detection, "found", stops)
    work = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        coco.main(words(scenes, work))
    (lines,) = work.glob("*.jsonl")
    assert lines.read_text().count("\n") == 4
    with lines.open("a") as file:
        file.write('{"image": "0000000')  # a kill in the middle of a line
    capsys.readouterr()
    coco.main(words(scenes, work))
    assert rows(capsys.readouterr().out) == whole
    assert counts[0] == 5 + (PICTURES - 4) + PICTURES
    assert lines.read_text().count("\n") == PICTURES
    coco.main(words(scenes, work))
    assert rows(capsys.readouterr().out) == whole
    assert counts[0] == 5 + (PICTURES - 4) + PICTURES  # nothing was run again


def test_boxes_go_back_to_where_they_were(coco: Any) -> None:
    """An input of 60 × 100 and a picture of 200 × 300: a fifth of it, at 0,0, or centred."""
    preprocess = Preprocess.named("none", (60, 100))
    inner = np.array([[10, 20, 30, 50]], np.float32)
    boxes = Boxes(inner, np.ones(1, np.float32), np.ones(1, np.int64), np.zeros(1, bool))
    for letterbox, centre, wanted in (
        (True, False, [50, 100, 150, 250]),
        (True, True, [0, 100, 0, 250]),
        (False, False, [20, 100, 60, 250]),
    ):
        fitting = coco.Fitting(preprocess, letterbox, centre, (9, 9, 9))
        np.testing.assert_allclose(fitting.back(boxes, (200, 300)).corners, [wanted])
    picture = Image.new("RGB", (200, 300), (90, 60, 30))
    fed = coco.Fitting(preprocess, True, True, (9, 8, 7))(picture)
    assert fed.shape == (3, 60, 100)
    assert fed[:, 30, 0].tolist() == pytest.approx([9, 8, 7], abs=1e-3)
    assert fed[:, 30, 29].tolist() == pytest.approx([9, 8, 7], abs=1e-3)
    assert fed[:, 30, 30].tolist() == pytest.approx([90, 60, 30], abs=1e-3)
    assert fed[:, 59, 69].tolist() == pytest.approx([90, 60, 30], abs=1e-3)
    assert fed[:, 59, 70].tolist() == pytest.approx([9, 8, 7], abs=1e-3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--coco", "nowhere"), "'nowhere/annotations/instances_val2017.json' does not exist"),
        (("--model", "none.onnx"), "--model none.onnx does not exist"),
        (("--metric-option", "boxes=dets"), "the model has no such output, only 'boxes'"),
        (("--metric-option", "box=1"), "has no such option"),
        (("--split", "test2017"), "instances_test2017.json' does not exist"),
        (("--split", "bare"), "'{scenes}/bare/000000000000.png' does not exist"),
    ],
)
def test_bad_input_is_one_line(
    coco: Any, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...], told: str,
) -> None:  # fmt: skip
    bare = scenes / "annotations/instances_bare.json"
    bare.write_bytes((scenes / "annotations/instances_val2017.json").read_bytes())
    with pytest.raises(SystemExit) as end, one_line_errors():
        coco.main(words(scenes, tmp_path / "w", *more))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert told.format(scenes=scenes) in lines[0]
    assert not (tmp_path / "w").exists()
