"""``--workers``: statistics, files and figures are the same bytes, whatever their number."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_onnx.calibration.histogram import Histogram
from ptq_onnx.calibration.statistics import Statistics, add_histograms, collect
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.evaluate import evaluate, session
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline import sharing
from ptq_onnx.pipeline.calibration_images import Batches
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.runtime.processes import Processes

DIGITS = Path(__file__).resolve().parents[2] / "img" / "digits"
IMAGES = 21
"""No multiple of the batch, nor of the workers."""


def statistics(model: Path, workers: int) -> Statistics:
    prepared = prepare(model)
    preprocess = resolve_preprocess(model, QuantizeConfig())
    batches = Batches(open_images(DIGITS / "calib", preprocess, IMAGES), 4)
    sites = [site for site in prepared.sites.values() if not site.is_parameter]
    found = collect(prepared.model, sites, batches, threads=1, workers=workers)
    wide = {site.tensor for site in sites[::2]}
    add_histograms(prepared.model, found, sites, wide, batches, threads=1, workers=workers)
    return found


def arrays(histogram: Histogram | None) -> list[np.ndarray[Any, Any]]:
    if histogram is None:
        return []
    return [histogram.low, histogram.high, histogram.counts, *arrays(histogram.inner)]


def test_statistics_are_the_same_bytes(short: Path) -> None:
    one, two = statistics(short, 1), statistics(short, 2)
    assert one.images == two.images == IMAGES
    assert len(one.channels) == 19
    for tensor, found in one.channels.items():
        for name, value in asdict(found).items():
            other = getattr(two.channels[tensor], name)
            if isinstance(value, np.ndarray):
                assert value.tobytes() == other.tobytes(), (tensor, name)
        assert found.trace == two.channels[tensor].trace
        mine, theirs = arrays(one.histograms[tensor]), arrays(two.histograms[tensor])
        assert len(mine) == 9
        assert sum(int(counts.sum()) for counts in mine[2:3]) > 0
        assert [a.tobytes() for a in mine] == [a.tobytes() for a in theirs]


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize(("quantizer", "method"), [("channelwise", "percentile"), ("deploy", None)])
def test_files_are_the_same_bytes(
    short: Path, tmp_path: Path, quantizer: str, method: str | None
) -> None:
    reports, files = [], []
    for workers in (1, 2):
        config = QuantizeConfig(
            quantizer=quantizer, method=method, images=12, analysis_images=9,
            report=False, threads=1, workers=workers,
        )  # fmt: skip
        output = tmp_path / str(workers)
        quantize(short, config=config, calib=DIGITS / "calib", output=output)
        report = json.loads((output / "report.json").read_text())
        del report["config"]["workers"], report["invocation"]
        reports.append(report)
        files.append((output / "quantized.onnx").read_bytes())
    assert files[0] == files[1]
    assert reports[0] == reports[1]


def test_figures_are_the_same(short: Path, tmp_path: Path) -> None:
    whole = Path(__file__).resolve().parents[2] / "models" / "digits_vit.onnx"
    source = open_images(DIGITS / "val", resolve_preprocess(short, QuantizeConfig()), 50)
    truth = labels_for(source, DIGITS / "val.txt")
    told: list[int] = []
    found = [
        evaluate(
            short, source, truth, batch_size=8, threads=1, reference=whole, baseline=True,
            workers=workers, progress=lambda done, _: told.append(done),
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert found[0].count == 50
    assert told == 2 * [8, 16, 24, 32, 40, 48, 50]


def test_what_cannot_be_shared(short: Path) -> None:
    source = open_images(DIGITS / "val", resolve_preprocess(short, QuantizeConfig()), 4)
    with pytest.raises(ConfigError, match="--workers needs a model that each of them opens"):
        evaluate(session(short), source, workers=2)
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        QuantizeConfig(workers=0)


@pytest.mark.parametrize(("seconds", "used"), [(0.0, 2), (3.0, 1)])
def test_processes_that_do_not_pay_are_not_started(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, used: int
) -> None:
    """What is shared here takes hundredths of a second."""
    monkeypatch.setattr(sharing, "STARTING", seconds)
    counts: list[int] = []
    plain = Processes.__init__

    def init(self: Processes, count: int, *how: Any) -> None:
        counts.append(count)
        plain(self, count, *how)

    monkeypatch.setattr(Processes, "__init__", init)
    config = QuantizeConfig(
        images=8, analysis_images=16, report=False, threads=1, workers=2, quantizer="vanilla"
    )
    result = quantize(short, config=config, calib=DIGITS / "calib", output=tmp_path / "out")
    assert set(counts) == ({2} if used == 2 else set())
    assert result.report["config"]["workers"] == used
    told = [note for note in result.report["notes"] if note.startswith("--workers")]
    assert len(told) == (used == 1)
    if told:
        assert "would take one process about 0.0 s, and each 3.0 s to begin" in told[0]


def test_an_error_in_a_process_is_its_line(short: Path, tmp_path: Path) -> None:
    prepared = prepare(short)
    sites = [site for site in prepared.sites.values() if not site.is_parameter]
    bad = [np.full((2, 3, 32, 32), np.nan, np.float32)]
    with pytest.raises(ModelError, match="NaN or infinite"):
        collect(prepared.model, sites, bad, threads=1, workers=2)
