"""``--auto`` on the embedded model: the file keeps the bound, and config.yaml repeats it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_onnx.auto.candidates import merged
from ptq_onnx.cli.console import decisions
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.config import stages as names
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import Selector
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.evaluate import logits
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import Result, quantize
from ptq_onnx.report.page import render
from ptq_onnx.report.schema import report_schema, violations

ROOT = Path(__file__).resolve().parents[2]
MODEL, DIGITS = ROOT / "models/digits_vit.onnx", ROOT / "img/digits"
QUICK: dict[str, Any] = {"images": 16, "analysis_images": 4, "report": False, "threads": 1}


@dataclass(frozen=True)
class Val:
    """Every fifth validation image, as an array, with its labels as a file."""

    images: Path
    labels: Path
    truth: np.ndarray


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Val:
    folder = tmp_path_factory.mktemp("val")
    source = open_images(DIGITS / "val", resolve_preprocess(MODEL, QuantizeConfig()))
    truth = labels_for(source, DIGITS / "val.txt")[::5]
    np.save(folder / "val.npy", np.concatenate(list(source.batches(50)))[::5])
    lines = "".join(f"{number} {label}\n" for number, label in enumerate(truth))
    (folder / "val.txt").write_text(lines)
    return Val(folder / "val.npy", folder / "val.txt", truth)


@dataclass(frozen=True)
class Run:
    result: Result
    stages: Counter[str]

    @property
    def auto(self) -> dict[str, Any]:
        return dict(self.result.report["auto"])


def run(output: Path, val: Val | None, *, labelled: bool = True, **options: Any) -> Run:
    stages: Counter[str] = Counter()

    def progress(name: str, total: int) -> Callable[[int], None]:
        stages[name] += 1
        return lambda _: None

    result = quantize(
        MODEL,
        config=QuantizeConfig(**{**QUICK, **options}),
        calib=DIGITS / "calib",
        val=None if val is None else val.images,
        labels=None if val is None or not labelled else val.labels,
        output=output,
        progress=progress,
    )
    return Run(result, stages)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, val: Val) -> Run:
    """Weights of 3 bits lose too much; --max-drop 0.5 by itself."""
    output = tmp_path_factory.mktemp("labelled")
    return run(output, val, quantizer="deploy", bits="3/8/8", auto=True)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without --val: the SQNR on calibration images held out."""
    output = tmp_path_factory.mktemp("unlabelled")
    return run(output, None, quantizer="vanilla", bits="8/8/8", auto=True, min_sqnr=24)


def sqnr(file: Path, reference: Path, images: Path) -> float:
    source = open_images(images, resolve_preprocess(MODEL, QuantizeConfig()))
    f, q = (logits(path, source, threads=1).astype(np.float64) for path in (reference, file))
    return float(10 * np.log10(np.sum(f**2) / np.sum((f - q) ** 2)))


def drop(run: Run, val: Val) -> float:
    """Points of top-1 that the written file loses in ONNX Runtime."""
    source = open_images(val.images, resolve_preprocess(MODEL, QuantizeConfig()))
    folder = run.result.output
    right = [
        int((logits(folder / name, source, threads=1).argmax(axis=1) == val.truth).sum())
        for name in ("fused.onnx", "quantized.onnx")
    ]
    return 100 * (right[0] - right[1]) / len(val.truth)


def test_the_file_keeps_the_bound(labelled: Run, val: Val) -> None:
    auto = labelled.auto
    assert (auto["bound"], auto["limit"], auto["images"]) == ("max_drop", 0.5, len(val.truth))
    assert auto["met"]
    assert auto["minimal"]
    assert auto["before"]["drop"] > 0.5
    assert auto["after"]["drop"] == drop(labelled, val) <= 0.5
    accuracy = labelled.result.report["accuracy"]
    assert accuracy["float"]["top1"] == auto["float_top1"]
    lost = accuracy["float"]["top1"] - accuracy["quantized"]["top1"]
    assert lost == pytest.approx(auto["after"]["drop"])


def test_each_decision_is_needed(labelled: Run, unlabelled: Run) -> None:
    for auto in (labelled.auto, unlabelled.auto):
        assert auto["decisions"]
        for number, one in enumerate(auto["decisions"], start=1):
            assert one["step"] == number
            assert one["tensors"] > 0
            if auto["bound"] == "max_drop":
                assert one["without"]["drop"] > auto["limit"]
            else:
                assert one["without"]["sqnr_db"] < auto["limit"] <= auto["after"]["sqnr_db"]
    assert any("finer than 90 images" in note for note in labelled.result.report["notes"])


def test_undoing_a_decision_gives_what_the_report_says(unlabelled: Run, tmp_path: Path) -> None:
    """One decision left out by hand: the SQNR that stands beside it."""
    auto = unlabelled.auto
    one = auto["decisions"][0]
    floats = [
        str(Selector(d["role"], None if d["block"] is None else (d["block"],)))
        for d in auto["decisions"][1:]
    ]
    again = run(tmp_path / "again", None, quantizer="vanilla", keep_float=tuple(floats))
    images = open_images(
        DIGITS / "calib", resolve_preprocess(MODEL, QuantizeConfig()), limit=QUICK["images"]
    ).others(QUICK["analysis_images"])
    np.save(tmp_path / "apart.npy", np.concatenate(list(images.batches(8))))
    folder = again.result.output
    found = sqnr(folder / "quantized.onnx", folder / "fused.onnx", tmp_path / "apart.npy")
    assert found == pytest.approx(one["without"]["sqnr_db"], abs=1e-6)


def test_config_yaml_repeats_the_run(labelled: Run, val: Val, tmp_path: Path) -> None:
    config = QuantizeConfig.load(labelled.result.output / "config.yaml")
    assert (config.auto, config.max_drop, config.min_sqnr) == (False, None, None)
    assert list(config.keep_float) == list(labelled.auto["keep_float"])
    assert list(config.more_bits) == list(labelled.auto["more_bits"])
    assert config.keep_float or config.more_bits
    quantize(MODEL, config=config, calib=DIGITS / "calib", output=tmp_path / "again")
    files = [folder / "quantized.onnx" for folder in (labelled.result.output, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_is_calibrated_twice(labelled: Run, unlabelled: Run) -> None:
    # What equalisation has measured serves the quantizer too
    passes = [names.EQUALISING, names.CALIBRATING]
    assert [labelled.stages[name] for name in passes] == [1, 0]
    assert [unlabelled.stages[name] for name in passes] == [0, 1]
    assert unlabelled.stages[names.HISTOGRAMS] == 1
    assert labelled.auto["trials"] > 1
    for stages in (labelled.stages, unlabelled.stages):
        assert stages[names.EXPECTING] == stages[names.RUNNING_FLOAT] == 1
        assert stages[names.ENOUGH] == 1


def test_report_and_console_state_the_decisions(
    labelled: Run, unlabelled: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in (labelled, unlabelled):
        report = one.result.report
        text = "report.auto"
        assert violations(_plain(one.auto), report_schema()["properties"]["auto"], text) == []
        page = render(report, "", [])
        capsys.readouterr()
        stdout().print(decisions(one.auto))
        shown = capsys.readouterr().out
        for decision in one.auto["decisions"]:
            assert decision["module"] in page
            assert decision["module"] in shown
        assert "What --auto decided" in page
    assert "What --auto decided" not in render({**report, "auto": None}, "", [])


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def test_nothing_to_decide(tmp_path: Path, val: Val) -> None:
    found = run(tmp_path / "a", val, labelled=False, quantizer="deploy", auto=True, min_sqnr=5)
    auto = found.auto
    assert (auto["decisions"], auto["trials"], auto["met"], auto["cost"]) == ([], 1, True, 0)
    assert auto["before"] == auto["after"]
    assert any("nothing had to be decided" in note for note in found.result.report["notes"])
    assert names.EXPECTING not in found.stages
    assert QuantizeConfig.load(tmp_path / "a" / "config.yaml").keep_float == ()


def test_everything_in_float_is_a_model_too(tmp_path: Path, val: Val) -> None:
    """Where the search may end, and config.yaml then begin."""
    found = run(tmp_path / "a", val, quantizer="vanilla", keep_float=("all",))
    assert found.result.report["tensors"] == []
    assert found.result.report["accuracy"]["quantized"]["sqnr_db"] > 100
    assert found.result.report["auto"] is None


@pytest.mark.parametrize(
    ("options", "paths", "said"),
    [
        ({"max_drop": 1.0}, {}, "--max-drop: top-1 needs labelled images"),
        ({"max_drop": 1.0}, {"val": DIGITS / "val"}, "--max-drop: top-1 needs labelled images"),
        ({}, {"scales": "report.json"}, "--scales report.json: --auto decides"),
    ],
)
def test_refused(options: dict[str, Any], paths: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = QuantizeConfig(**QUICK, auto=True, **options)
    with pytest.raises(ConfigError) as error:
        quantize(MODEL, config=config, calib=DIGITS / "calib", output=tmp_path / "out", **paths)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_label_out_of_range_is_told_before_the_search(tmp_path: Path, val: Val) -> None:
    wrong = Val(val.images, tmp_path / "wrong.txt", val.truth)
    wrong.labels.write_text(
        val.labels.read_text().replace("0 ", "0 99 ", 1).replace("99 ", "99\n#")
    )
    with pytest.raises(ImageError, match="Label 99 of image '0' is out of range"):
        run(tmp_path / "out", wrong, quantizer="vanilla", auto=True)


def test_selectors_of_one_role_are_one() -> None:
    given = [Selector("fc2", (6,)), Selector("head"), Selector("fc2", (5,)), Selector("fc1", (0,))]
    assert merged(given) == ("fc2@5,6", "head", "fc1@0")
    assert merged([Selector("gate", (1,)), Selector("gate")]) == ("gate",)
    assert merged([]) == ()
