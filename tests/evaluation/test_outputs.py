"""Models with several outputs, dense ones, none with classes: each output by itself, everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from several_outputs import SIZE, save_network
from typer.testing import CliRunner

import ptq_onnx
from ptq_onnx.auto.closeness import Recorded
from ptq_onnx.cli.app import app
from ptq_onnx.cli.console import show
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import TARGETS
from ptq_onnx.errors import ImageError, ModelError
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.outputs import Tallies, Tally, classes_of, pairs
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.pipeline.quantize import Result, quantize
from ptq_onnx.report.next_steps import next_steps
from ptq_onnx.report.page import render
from ptq_onnx.report.schema import report_schema, violations
from ptq_onnx.report.summary import cards
from ptq_onnx.targets.timing.runtimes import RUNTIMES

RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(20, 3, SIZE, SIZE)).astype(np.float32)
PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (SIZE, SIZE))
NAMES = ["logits", "boxes", "depth", "index"]
QUICK: dict[str, Any] = {"threads": 1, "pictures": False, "size": (SIZE, SIZE)}


def values(path: Path, pictures: np.ndarray = PICTURES) -> dict[str, np.ndarray]:
    """All outputs in ONNX Runtime, in one run."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": pictures}), strict=True))


def sqnr(fp: np.ndarray, q: np.ndarray) -> float:
    fp, q = fp.astype(np.float64), q.astype(np.float64)
    return float(10 * np.log10((fp**2).sum() / ((fp - q) ** 2).sum()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``all.onnx`` and ``dense.onnx``, and pictures as an array with labels."""
    folder = tmp_path_factory.mktemp("outputs")
    save_network(folder / "all.onnx")
    save_network(folder / "dense.onnx", ("depth",))
    np.save(folder / "val.npy", PICTURES)
    np.save(folder / "calib.npy", RNG.normal(size=(16, 3, SIZE, SIZE)).astype(np.float32))
    truth = values(folder / "all.onnx")["index"]
    (folder / "val.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(truth)))
    return folder


def run(folder: Path, model: str, out: Path, **options: Any) -> Result:
    config = QuantizeConfig(**{**QUICK, **options.pop("config", {})})
    return quantize(
        folder / model, config=config, calib=folder / "calib.npy", output=out, **options
    )


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return run(
        folder,
        "all.onnx",
        folder / "all",
        val=folder / "val.npy",
        labels=folder / "val.txt",
        config={"sensitivity": True},
    )


# Figures


def test_figures_of_outputs_against_numpy() -> None:
    fp = {"a": RNG.normal(size=(8, 3, 5)).astype("f4"), "b": RNG.normal(size=(8, 4)).astype("f4")}
    fp |= {"c": RNG.integers(0, 3, 8), "z": np.zeros((8, 2), np.float32)}
    q = {"a": fp["a"] * 1.1, "b": fp["b"][:, ::-1], "c": fp["c"].copy(), "z": fp["z"]}
    q["c"][:2] += 1
    tallies = Tallies(list(fp))
    for part in (slice(0, 3), slice(3, 8)):
        tallies.add({n: v[part] for n, v in q.items()}, set(), {n: v[part] for n, v in fp.items()})
    a, b, c, z = (tally.figures() for tally in tallies.each.values())
    assert a.sqnr_db == pytest.approx(20, abs=1e-4)
    assert (a.cosine, a.agreement, a.shape) == (pytest.approx(1, abs=1e-9), None, ("batch", 3, 5))
    assert b.sqnr_db == pytest.approx(sqnr(fp["b"], q["b"]))
    assert b.agreement == pytest.approx(100 * (fp["b"].argmax(1) == q["b"].argmax(1)).mean())
    assert (c.equal, c.sqnr_db, c.cosine, c.agreement) == (75, None, None, None)
    assert (z.sqnr_db, z.cosine) == (200, 1)
    assert tallies.worst == pytest.approx(sqnr(fp["b"], q["b"]))
    assert [t.name for t in tallies.classes] == ["b", "z"]


@pytest.mark.parametrize(
    ("fp", "q", "db", "bad"),
    [
        ([1.0, np.nan, 2.0], [1.0, np.nan, 2.2], 10 * np.log10(5 / 0.04), 1),
        ([1.0, -np.inf, 2.0], [1.0, -np.inf, 2.0], 200, 1),
        ([1.0, 2.0, 3.0], [1.0, np.inf, 3.0], -200, 1),
        ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], -200, 0),
        ([3.0, 3.0, 3.0], [0.0, 0.0, 0.0], 0, 0),
    ],
)
def test_odd_values_are_numbers_in_json(fp: Any, q: Any, db: float, bad: int) -> None:
    tallies = Tallies(["y"])
    tallies.add({"y": np.array([q], "f4")}, set(), {"y": np.array([fp], "f4")})
    one = tallies.each["y"].figures()
    assert one.sqnr_db == pytest.approx(db, abs=1e-4)
    assert one.not_finite == bad
    assert one.cosine is not None
    assert math.isfinite(one.cosine)
    json.dumps([one.sqnr_db, one.cosine, one.agreement], allow_nan=False)


def test_sizes_that_follow_the_values_have_no_figures() -> None:
    tally = Tallies(["y"])
    tally.add({"y": np.zeros((2, 7))}, {"y"}, {"y": np.zeros((3, 7))}, {"y"})
    assert tally.each["y"].figures().sqnr_db is None
    with pytest.raises(ImageError, match=r"Output 'y' is \[3, 7\].*not the same network"):
        Tally("y").compare(np.zeros((3, 7)), np.zeros((2, 7)))


@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        ((4, 10), 10),
        ((4, 10, 1, 1), 10),
        ((4, 1), 0),
        ((4, 6, 10), 0),
        ((4, 1, 8, 8), 0),
        ((4,), 0),
    ],
)
def test_what_has_classes(shape: tuple[int, ...], classes: int) -> None:
    assert classes_of(np.zeros(shape, np.float32)) == classes
    assert classes_of(np.zeros(shape, np.int64)) == 0


def test_outputs_are_paired_by_name_else_by_place() -> None:
    assert pairs(["a", "b"], ["b", "a"]) == {"a": "a", "b": "b"}
    assert pairs(["a", "new"], ["a", "old"]) == {"a": "a", "new": "old"}
    assert pairs(["a", "new"], ["a", "old", "more"]) == {"a": "a"}


# Quantize, evaluate, compare


def test_every_output_has_its_figures(result: Result, folder: Path) -> None:
    report = result.report
    fp, q = (values(folder / "all" / f) for f in ("fused.onnx", "quantized.onnx"))
    outputs = report["fidelity"]["outputs"]
    assert [one["name"] for one in outputs] == NAMES
    assert [one["shape"] for one in outputs] == [
        ["batch", 5], ["batch", 6, 4], ["batch", 1, 6, 8], ["batch"],
    ]  # fmt: skip
    for one in outputs[:3]:
        assert one["sqnr_db"] == pytest.approx(sqnr(fp[one["name"]], q[one["name"]]), abs=0.5)
    same = 100 * (fp["logits"].argmax(1) == q["logits"].argmax(1)).mean()
    assert [one["agreement"] for one in outputs] == [pytest.approx(same, abs=5), None, None, None]
    assert outputs[3]["equal"] == pytest.approx(same, abs=5)
    assert report["fidelity"]["sqnr_db"] == min(one["sqnr_db"] for one in outputs[:3])
    assert report["accuracy"]["output"] == "logits"
    assert report["accuracy"]["float"]["top1"] == 100
    assert report["accuracy"]["quantized"]["top1"] == pytest.approx(same, abs=5)
    plain = json.loads((folder / "all/report.json").read_text())
    assert violations(plain, report_schema()) == []


def test_analyses_measure_all_outputs(result: Result) -> None:
    analysis = result.report["analysis"]
    assert [one["name"] for one in analysis["outputs"]] == NAMES[:3]
    assert [one["error"]["agreement"] is None for one in analysis["outputs"]] == [False, True, True]
    assert analysis["logits"] == analysis["outputs"][0]["error"]
    baseline = analysis["sensitivity"]["baseline"]
    # Each output divided by its root mean square: the mean of the ratios
    ratios = [one["error"]["snr"] for one in analysis["outputs"]]
    assert baseline["snr"] == pytest.approx(np.mean(ratios), rel=0.3)


def test_a_module_of_one_output_is_seen(result: Result) -> None:
    """The head of the boxes costs something, though it is behind the first output's end."""
    rows = {
        (s["module"], s["part"]): s["error"]["snr"]
        for s in result.report["analysis"]["sensitivity"]["layerwise"]
    }
    tails = [snr for (name, part), snr in rows.items() if "block" not in name and part == "all"]
    assert len(tails) >= 2
    assert all(snr > 0 for snr in tails)


def test_page_and_console_name_the_outputs(
    result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    page = render(result.report, "", [])
    show(result)
    shown = capsys.readouterr().out
    for name in NAMES:
        assert f"<td><code>{name}</code></td>" in page
        assert name in shown
    assert "SQNR, worst of 4 outputs" in page
    assert "SQNR of the worst output" in shown


def test_a_dense_output_has_no_class(folder: Path, tmp_path: Path, capsys: Any) -> None:
    found = run(folder, "dense.onnx", tmp_path / "out", val=folder / "val.npy")
    fidelity, analysis = found.report["fidelity"], found.report["analysis"]
    assert fidelity["agreement"] is None
    assert [one["name"] for one in fidelity["outputs"]] == ["depth"]
    assert analysis["logits"]["agreement"] is None
    page = render(found.report, "", [])
    show(found)
    shown = capsys.readouterr().out
    for text in (page.partition("<h2>All ops")[0], shown):
        assert "same top class" not in text.lower()
        assert "SQNR of" in text
    assert "dB SQNR on 20 images" in page
    assert "no accuracy to measure" in page


def test_an_embedding_has_no_class_that_leads(folder: Path, tmp_path: Path) -> None:
    save_network(folder / "embedding.onnx", ("embedding", "boxes"))
    found = run(folder, "embedding.onnx", tmp_path / "out", config={"report": False})
    fidelity = found.report["fidelity"]
    assert fidelity["agreement"] is None
    assert [one["agreement"] for one in fidelity["outputs"]] == [None, None]
    assert not any("--labels" in text for _, text in next_steps(found.report, found.files))
    words = ["evaluate", str(tmp_path / "out/quantized.onnx"), "--reference"]
    words += [str(folder / "embedding.onnx"), "--val", str(folder / "val.npy"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["agreement"] is None


def test_labels_without_classes_are_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    paths = {"val": folder / "val.npy", "labels": folder / "val.txt"}
    told: list[str] = []
    with pytest.raises(ModelError, match=r"no output \[batch, classes\], only depth .*--labels"):
        run(folder, "dense.onnx", tmp_path / "out", **paths,
            progress=lambda stage, _: told.append(stage) or (lambda _: None))  # fmt: skip
    assert (told, list(tmp_path.iterdir())) == (["All", "Reading the model"], [])


def test_auto_bounds_the_worst_output(folder: Path, tmp_path: Path) -> None:
    config = {"auto": True, "min_sqnr": 30.0, "quantizer": "vanilla", "report": False}
    found = run(folder, "all.onnx", tmp_path / "out", val=folder / "val.npy", config=config)
    auto = found.report["auto"]
    assert auto["after"]["sqnr_db"] >= 30 > auto["before"]["sqnr_db"]
    assert auto["before"]["output"] in NAMES[:3]
    fp, q = (values(tmp_path / "out" / f) for f in ("fused.onnx", "quantized.onnx"))
    worst = min(sqnr(fp[name], q[name]) for name in NAMES[:3])
    assert auto["after"]["sqnr_db"] == pytest.approx(worst, abs=0.5)


def test_evaluate_and_compare_on_the_command_line(
    result: Result, folder: Path, tmp_path: Path
) -> None:
    file, base = str(folder / "all/quantized.onnx"), str(folder / "all/fused.onnx")
    val = ["--val", str(folder / "val.npy"), "--labels", str(folder / "val.txt")]
    own = result.report["fidelity"]["outputs"]
    done = CliRunner().invoke(app, ["evaluate", file, "--reference", base, *val, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for one, expected in zip(found["outputs"], own, strict=True):
        assert one["name"] == expected["name"]
        assert one["sqnr_db"] == pytest.approx(expected["sqnr_db"], abs=0.5)
    shown = CliRunner().invoke(app, ["evaluate", file, "--reference", base, *val]).stdout
    assert "top-1 " in shown
    assert all(name in shown for name in NAMES)
    words = ["compare", str(folder / "all"), file, *val, "--json", "--output", str(tmp_path / "c")]
    done = CliRunner().invoke(app, [*words, "--analysis-images", "2"])
    assert done.exit_code == 0, done.output
    one = json.loads(done.stdout)["contenders"][2]
    assert [o["name"] for o in one["outputs"]] == NAMES
    page = (tmp_path / "c/compare.html").read_text()
    assert all(f"<tr><td>{name}</td>" in page for name in NAMES)


def test_evaluate_of_a_dense_model_asks_for_the_reference(folder: Path) -> None:
    words = ["evaluate", str(folder / "dense.onnx"), "--val", str(folder / "val.npy")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert "--reference" in str(done.exception)


def test_from_python_folders_are_no_classes_of_a_dense_model(folder: Path) -> None:
    """As on the command line."""
    path, pictures = folder / "dense.onnx", folder / "classes"
    for index, pixels in enumerate(RNG.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)):
        place = pictures / str(index % 2) / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    found = ptq_onnx.evaluate(path, pictures, reference=path, preprocess="inception", threads=1)
    assert (found.count, found.top1, found.agreement) == (4, None, None)
    table = ptq_onnx.compare(
        [path], pictures, reference=path, preprocess="inception", block_images=2, threads=1
    )
    assert [one.top1 for one in table.contenders] == [None, None]
    with pytest.raises(ModelError, match="leave the labels out"):
        ptq_onnx.evaluate(path, pictures, labels=[0] * 4, preprocess="inception", threads=1)


def test_from_python_no_class_leads_among_features(folder: Path) -> None:
    path = save_network(folder / "features.onnx", ("embedding",))
    found = ptq_onnx.evaluate(path, PICTURES, reference=path, preprocess=PLAIN, threads=1)
    assert (found.agreement, found.outputs[0].agreement) == (None, None)


# Batches, names


@pytest.mark.parametrize("batch", [4, 8])
def test_a_fixed_batch_is_filled_up_and_counts_nowhere(folder: Path, batch: int) -> None:
    wanted = ("logits", "boxes")
    paths = [save_network(folder / f"{b}.onnx", wanted, b) for b in ("batch", batch)]
    source = open_images(PICTURES[:10], PLAIN)
    found = evaluate(paths[1], source, reference=paths[0], batch_size=3, threads=1)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 90
    assert [one.shape[0] for one in found.outputs] == ["batch", "batch"]
    network = Network(paths[1], 1)
    assert {len(v) for v in network(PICTURES[:10]).values()} == {10}


def test_a_first_dimension_that_is_no_batch_is_said(folder: Path) -> None:
    path = save_network(folder / "memory.onnx", ("memory", "logits"), 4)
    source = open_images(PICTURES[:6], PLAIN)
    found = evaluate(path, source, reference=path, batch_size=8, threads=1)
    assert found.whole == ("memory",)
    assert any("first dimension of memory is not the batch" in note for note in found.notes)
    assert [one.name for one in found.outputs] == ["memory", "logits"]
    assert found.main == "logits"


def test_of_several_with_classes_the_labels_tell_which_answers(folder: Path) -> None:
    path = save_network(folder / "two.onnx", ("embedding", "logits"))
    truth = values(path)["logits"].argmax(1)
    found = evaluate(path, open_images(PICTURES, PLAIN), truth, threads=1)
    assert (found.main, found.top1) == ("logits", 100)
    assert [one.top1 for one in found.outputs][1] == 100
    recorded = Recorded(
        path, open_images(PICTURES, PLAIN), folder, labels_of=lambda _: truth, threads=1
    )
    assert recorded.main == "logits"


def test_no_error_names_a_hidden_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_onnx.evaluation import evaluate as evaluation

    def broken(self: Network, images: Any) -> Any:
        raise ModelError(f"{self.name} fails.")

    monkeypatch.setattr(evaluation.Network, "__call__", broken)
    with pytest.raises(ModelError) as error:
        run(folder, "all.onnx", tmp_path / "out", config={"report": False})
    assert str(error.value) == "The quantized model fails."
    assert not list(tmp_path.iterdir())


def test_without_val_there_are_figures_and_the_next_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder, "all.onnx", tmp_path / "out", config={"report": False})
    fidelity = found.report["fidelity"]
    assert (fidelity["source"], fidelity["images"]) == ("calibration", 8)
    assert all(one["sqnr_db"] is not None for one in fidelity["outputs"][:3])
    show(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "SQNR of the worst output on 8 images of the calibration" in shown
    out = tmp_path / "out"
    evaluate_ = f"evaluate {out}/quantized.onnx --reference {out}/fused.onnx --val DIR --labels"
    for command in (evaluate_, f"check {out}/quantized.onnx --target onnxruntime", "benchmark"):
        assert f": ptq-onnx {command}" in shown
    assert next_steps(found.report, [p for p in found.files if p.suffix != ".onnx"]) == []


def test_only_what_can_be_timed_is_to_be_timed() -> None:
    files = [Path("o/quantized.onnx"), Path("o/fused.onnx")]
    timed = {
        target: any(
            " benchmark " in text for _, text in next_steps({"config": {"target": target}}, files)
        )
        for target in TARGETS
    }
    assert timed == {name: name in RUNTIMES for name in TARGETS}
    assert timed["tensorrt"]
    assert not timed["qnn"]
    shown = {name: [c[0] for c in cards({"config": {"target": name}})] for name in TARGETS}
    assert {name: "Speed-up" in found for name, found in shown.items()} == timed
