"""Metrics of tasks: known answers, streamed sums, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.metrics.by_name import METRICS, make_metric
from ptq_onnx.evaluation.metrics.dense import Depth, Segmentation, bilinear
from ptq_onnx.evaluation.metrics.detection import Boxes, Detection, average_precision
from ptq_onnx.evaluation.metrics.features import Features
from ptq_onnx.evaluation.metrics.metric import Metric, Scoring
from ptq_onnx.evaluation.metrics.own import Own
from ptq_onnx.evaluation.metrics.targets import Targets
from ptq_onnx.evaluation.metrics.text import Text, edit_distance
from ptq_onnx.images.preprocess import Preprocess, aligned, from_image, placed

RNG = np.random.default_rng(7)
SIDE = 8
PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (SIDE, SIDE), crop_pct=1.0)


def scored(
    metric: Metric, outputs: dict[str, Any], reference: dict[str, Any] | None = None, step: int = 3
) -> Any:
    """In batches of ``step``."""
    run = Scoring(metric, reference=reference is not None)
    count = len(next(iter(outputs.values())))
    for start in range(0, count, step):
        part = slice(start, start + step)
        names = [str(i) for i in range(count)][part]
        floats = None if reference is None else {n: v[part] for n, v in reference.items()}
        run.add(names, {n: v[part] for n, v in outputs.items()}, floats)
    return run.score()


def targets(path: Path, count: int, preprocess: Preprocess = PLAIN) -> Targets:
    return Targets(path, [str(i) for i in range(count)], preprocess)


def test_features_find_their_own_image_and_keep_their_neighbours(tmp_path: Path) -> None:
    """Against every pair compared one by one; a query moved onto another image is lost."""
    floats = RNG.normal(size=(12, 6)).astype(np.float32)
    queries = floats + 0.3 * RNG.normal(size=floats.shape).astype(np.float32)
    queries[4] = floats[5]
    found = scored(Features({"k": "3"}), {"e": queries}, {"e": floats})
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, floats)]
    best, same = 0, 0
    for i in range(12):
        mine = [float(unit[0][i] @ unit[1][j]) for j in range(12)]
        true = [float(unit[1][i] @ unit[1][j]) for j in range(12)]
        best += int(np.argmax(mine)) == i
        order = [sorted(set(range(12)) - {i}, key=lambda j, v=v: -v[j])[:3] for v in (mine, true)]
        same += len(set(order[0]) & set(order[1]))
    assert best < 12
    assert found.value == pytest.approx(100 * best / 12)
    assert found.figures["same 3 neighbours"] == pytest.approx(100 * same / 36)
    assert (found.float_value, found.targets) == (100.0, "as float")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{i} {i // 6}\n" for i in range(12)))
    apart = np.repeat(np.eye(2, dtype=np.float32), 6, axis=0) + 0.01 * floats[:, :2]
    judged = scored(Features({"k": "3"}, targets(labels, 12)), {"e": apart}, {"e": apart})
    assert judged.figures["3-NN top-1"] == 100.0


def test_features_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.evaluation.metrics.features.LARGEST", 4 * 6 * 8 * 2)
    values = {"e": RNG.normal(size=(12, 6)).astype(np.float32)}
    with pytest.raises(ImageError, match="8 images fill that; measure on fewer"):
        scored(Features({}), values, values, step=4)


def test_the_mean_over_classes_that_occur(tmp_path: Path) -> None:
    """Class 0: 3 right of 3 + 1; class 1: 2 of 2 + 2; class 2 is called once; void counts not."""
    truth = np.array([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    called = np.array([[[0, 0, 0, 0], [1, 1, 1, 2]]])
    truth[0, 1, 2] = 2
    np.save(tmp_path / "t.npy", truth)
    logits = np.moveaxis(np.eye(3)[called], -1, 1).astype(np.float32)
    wide = Preprocess((0.0,) * 3, (1.0,) * 3, (2, 4), crop_pct=1.0)
    found = scored(Segmentation({}, targets(tmp_path / "t.npy", 1, wide)), {"o": logits})
    assert found.value == pytest.approx(100 * (3 / 4 + 2 / 4 + 0) / 3)
    assert found.figures["pixels right"] == pytest.approx(100 * 5 / 7)
    shifted = Segmentation({"shift": "1", "ignore": "2"}, targets(tmp_path / "t.npy", 1, wide))
    assert scored(shifted, {"o": logits}).figures["pixels right"] == pytest.approx(0.0)


def test_masks_are_cut_out_as_the_pictures_are(tmp_path: Path) -> None:
    """A mask that is the picture itself stays so behind resizing and cropping."""
    value = np.zeros((30, 50), np.uint8)
    value[:, 20:35] = 1
    Image.fromarray(value).save(tmp_path / "0.png")
    seen = from_image(Image.fromarray(value * 255).convert("RGB"), PLAIN)[:1] > 0.5
    found = scored(
        Segmentation({"threshold": "0.5"}, targets(tmp_path, 1)),
        {"o": seen[None].astype(np.float32)},
    )
    assert found.value > 80
    assert np.asarray(aligned(Image.fromarray(value), PLAIN)).shape == (SIDE, SIDE)
    assert placed(50, 30, PLAIN) == (13, 8, 2, 0)


def test_logits_grow_to_the_size_of_the_mask() -> None:
    """As torch interpolates between the centres of places."""
    import torch

    x = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(x), (9, 7), mode="bilinear")
    np.testing.assert_allclose(bilinear(x, (9, 7)), wanted.numpy(), atol=1e-5)


def test_depth_and_its_alignment(tmp_path: Path) -> None:
    truth = RNG.uniform(1, 4, size=(3, 6, 6)).astype(np.float32)
    truth[0, 0] = 0
    np.save(tmp_path / "t.npy", truth)
    good = truth > 0
    near = truth * np.where(RNG.uniform(size=truth.shape) < 0.5, 1.1, 1.5).astype(np.float32)
    exact = scored(Depth({}, targets(tmp_path / "t.npy", 3)), {"d": near[:, None]}, step=2)
    assert exact.value == pytest.approx(float(np.mean(np.abs(near - truth)[good] / truth[good])))
    assert exact.figures["δ1"] == pytest.approx(
        100 * float(np.mean((near / np.where(good, truth, 1))[good] < 1.25))
    )
    assert exact.higher is False
    for align, off in (("median", 3 * truth), ("affine", 3 * truth + 2)):
        by = Depth({"align": align}, targets(tmp_path / "t.npy", 3))
        value = scored(by, {"d": np.where(good, off, 9)}).value
        assert value == pytest.approx(0.0, abs=1e-5)
    assert scored(Depth({}), {"d": near}, {"d": near}).float_value == 0.0


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == distance
    assert edit_distance([*map(ord, one)], [*map(ord, other)]) == distance


def test_text_by_ctc_and_by_tokens(tmp_path: Path) -> None:
    """aab- reads ab; a dictionary without its space gets one where the model has one more."""
    (tmp_path / "dict.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "truth.txt").write_text("0\tab\n1\tb a\n", encoding="utf-8")
    steps = np.array([[1, 1, 0, 2, 2], [2, 3, 3, 1, 1]])
    scores = np.eye(4, dtype=np.float32)[steps]
    options = {"dictionary": str(tmp_path / "dict.txt")}
    found = scored(Text(options, targets(tmp_path / "truth.txt", 2)), {"o": scores})
    assert (found.value, found.figures["edits"]) == (100.0, 0.0)
    stored = Text({}, targets(tmp_path / "truth.txt", 2), stored="a\nb")
    assert scored(stored, {"o": scores}).value == 100.0
    padded = np.concatenate([scores, np.eye(4, dtype=np.float32)[[[3, 0], [0, 3]]]], axis=1)
    assert scored(stored, {"o": padded}).value == 100.0  # a space at the end
    other = scores.copy()
    other[1, 4] = np.eye(4)[2]  # b ab
    worse = scored(Text(options), {"o": other}, {"o": scores})
    assert worse.value == 50.0
    assert worse.figures["edits"] == pytest.approx(100 / 5)
    tokens = np.array([[5, 6, 2, 9], [5, 7, 2, 2]])
    same = np.array([[5, 6, 2, 1], [5, 6, 2, 2]])
    assert scored(Text({"decode": "sequence"}), {"o": tokens}, {"o": same}).value == 50.0


def boxes(*rows: tuple[float, ...]) -> Boxes:
    """(left, top, right, bottom, score, class)."""
    found = np.array(rows, np.float32).reshape(-1, 6)
    none = np.zeros(len(found), bool)
    return Boxes(found[:, :4], found[:, 4], found[:, 5].astype(np.int64), none)


@pytest.fixture
def coco() -> None:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        pytest.importorskip("pycocotools", reason="neither faster-coco-eval nor pycocotools")


@pytest.mark.usefixtures("coco")
def test_average_precision_by_hand() -> None:
    """One of two boxes found, at an overlap of 0.9: precision 1 up to recall ½ (51 of COCO's 101
    places) at the overlaps 0.50 to 0.90, which are 9 of 10."""
    truth = [boxes((0, 0, 10, 10, 1, 3)), boxes((0, 0, 10, 10, 1, 3))]
    found = [boxes((0, 0, 10, 9, 0.9, 3)), boxes()]
    result = average_precision(truth, found)
    assert result["mAP@50"] == pytest.approx(100 * 51 / 101)
    assert result["mAP"] == pytest.approx(100 * 51 / 101 * 9 / 10)
    with pytest.raises(ImageError, match="no box to find"):
        average_precision([boxes()], found[:1])


@pytest.mark.usefixtures("coco")
def test_boxes_of_a_detr(tmp_path: Path) -> None:
    """Class logits, the last of them none, and centres and sizes as parts of the input; truth in
    pixels of a picture twice as wide, of which the input is the centre."""
    logits = np.full((1, 2, 4), -9, np.float32)
    logits[0, 0, 2], logits[0, 1, 3] = 9, 9
    rows = np.array([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]], np.float32)
    annotations = {
        "images": [{"id": 4, "file_name": "0.jpg", "width": 32, "height": 16}],
        "annotations": [{"image_id": 4, "category_id": 2, "bbox": [12, 4, 8, 8], "id": 1}],
        "categories": [{"id": 2}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(annotations))
    known = Targets(path, ["0.jpg"], PLAIN)
    metric = Detection({}, known, input_size=(SIDE, SIDE))
    run = Scoring(metric, reference=False)
    run.add(["0.jpg"], {"logits": logits, "pred_boxes": rows}, None)
    assert run.score().figures["mAP"] == pytest.approx(100.0)
    kinds = sorted(text.split("=")[0] for text in run.score().guessed)
    assert kinds == ["activation", "form", "units"]
    again = Detection({}, None, input_size=(SIDE, SIDE))
    own = {"logits": logits, "pred_boxes": rows}
    same = scored(again, own, own, step=1)
    assert same.value == pytest.approx(100.0)


@pytest.mark.usefixtures("coco")
def test_boxes_with_their_scores_behind() -> None:
    """As mmdeploy writes them: dets [batch, N, 5] and labels; rows of nothing tell no unit."""
    labels = np.array([[2, 0]])
    dets = np.array([[[1, 2, 7, 8, 0.9], [0, 0, 0, 0, 0]]], np.float32)
    metric = Detection({"boxes": "dets"}, None, input_size=(SIDE, SIDE))
    assert metric.found(["0"], {"dets": np.zeros_like(dets), "labels": labels})[0].corners.size == 8
    (found,) = metric.found(["1"], {"dets": dets, "labels": labels})
    np.testing.assert_array_equal(found.corners[0], [1, 2, 7, 8])
    assert found.scores.tolist() == pytest.approx([0.9, 0])
    assert found.classes.tolist() == [2, 0]
    assert "units=pixels" in metric.guessed
    with pytest.raises(ConfigError, match=r"boxes=dets: the output is \[1, 2, 3\]; expected"):
        metric.found(["2"], {"dets": dets[..., :3], "labels": labels})
    four = {"logits": np.zeros((1, 2, 5), np.float32), "rows": dets[..., :4]}
    again = Detection({}, None, input_size=(SIDE, SIDE))
    assert again.found(["3"], four)[0].corners.shape == (2, 4)


def test_without_a_library_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("faster_coco_eval", "pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install ptq-onnx\[detection\]"):
        Detection({}).begin()


OWN = """
def spread(outputs, targets):
    return abs(outputs["a"] - targets["a"]).max()
spread.higher_is_better = False
def known(outputs, targets):
    assert len(targets) == len(outputs["a"]) and targets[1] == "two", targets[:]
    return outputs["a"].mean()
def broken(outputs, targets):
    raise KeyError("nothing here")
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_tests.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    a, b = RNG.normal(size=(2, 7, 3)).astype(np.float32)
    found = scored(Own({}, called="mine_of_tests:spread"), {"a": a}, {"a": b})
    assert found.value == pytest.approx(float(np.abs(a - b).max()))
    assert (found.float_value, found.higher, found.metric) == (0.0, False, "mine_of_tests:spread")
    assert found.lost == pytest.approx(found.value)
    (tmp_path / "t.txt").write_text("".join(f"{i}\t{'two' if i == 1 else 'x'}\n" for i in range(7)))
    own = Own({"better": "higher"}, targets(tmp_path / "t.txt", 7), called="mine_of_tests:known")
    assert scored(own, {"a": a}, {"a": b}).float_value == pytest.approx(float(b.mean()))
    for called, text in (
        ("mine_of_tests:broken", "raised KeyError: 'nothing here'"),
        ("mine_of_tests:absent", "has no function 'absent'"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=text):
            scored(Own({}, called=called), {"a": a}, {"a": b})


def test_a_users_module_is_not_imported_unless_named() -> None:
    """Nor a library of boxes."""
    code = (
        "import sys; import ptq_onnx.evaluation.metrics.by_name;"
        " print(sorted({'faster_coco_eval', 'pycocotools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.name)
def test_what_every_metric_refuses(kind: type[Metric]) -> None:
    with pytest.raises(ConfigError, match="has no such option; it takes"):
        kind({"nothing": "1"})
    if kind is not Detection:
        with pytest.raises(ConfigError, match="needs a truth: --targets PATH, or the float model"):
            Scoring(kind({}), reference=False)
        odd = {"o": np.zeros((2, 1), np.float64)}
        with pytest.raises(ConfigError, match="no output is"):
            scored(kind({}), {"o": np.zeros((2, 1), bool)}, odd)
        with pytest.raises(ConfigError, match="the model has no such output, only 'o'"):
            scored(kind({"output": "p"}), odd, odd)


def test_no_metric_without_a_name() -> None:
    assert make_metric(None, (), None, Path("none")) is None  # type: ignore[arg-type]


def test_no_file_of_options_names_code(tmp_path: Path) -> None:
    """Not on the command line, not from Python, and what a run writes names none."""
    from ptq_onnx import QuantizeConfig
    from ptq_onnx.cli.given import settings

    path = tmp_path / "options.yaml"
    path.write_text("metric: os:getcwd\n")
    for read in (lambda: QuantizeConfig.load(path), lambda: settings(str(path), {})):
        with pytest.raises(ConfigError, match="which is code: name it on the command line"):
            read()
    own = QuantizeConfig(metric="os:getcwd", metric_option=("better=lower",))
    path.write_text(own.to_yaml())
    assert QuantizeConfig.load(path) == QuantizeConfig()
    built_in = QuantizeConfig(metric="depth", metric_option=("align=median",))
    path.write_text(built_in.to_yaml())
    assert QuantizeConfig.load(path) == built_in


def test_archives_do_not_unpack_without_end(tmp_path: Path) -> None:
    from ptq_onnx.images.array_files import arrays_in

    flat = np.asfortranarray(RNG.normal(size=(3, 4)).astype(np.float32))
    np.savez_compressed(tmp_path / "a.npz", a=flat, b=np.zeros((500, 500), np.uint8))
    found = arrays_in(tmp_path / "a.npz", "here", 1 << 20)
    np.testing.assert_array_equal(found["a"], flat)
    assert found["b"].shape == (500, 500)
    with pytest.raises(ImageError, match=r"here cannot be read: it unpacks to more than 0 MB"):
        arrays_in(tmp_path / "a.npz", "here", 1 << 10)
