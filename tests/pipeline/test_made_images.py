"""``--calib psaq``: a whole run on images that its model made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from recorded_progress import Recorded
from small_image_model import image_model
from test_several_inputs import text_model

from ptq_onnx.cli import app as cli
from ptq_onnx.config import stages
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine import model_images
from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation import parts as evaluation_parts
from ptq_onnx.files.output_paths import Output
from ptq_onnx.images.synthetic import MadeSource, SyntheticSource
from ptq_onnx.pipeline import made_images
from ptq_onnx.pipeline.apart import Unfinished, quantize_apart
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.pipeline.reading import read_inputs
from ptq_onnx.pipeline.request import Request, Shared
from ptq_onnx.progress import Stages

VAL = Path(__file__).resolve().parents[2] / "img/digits/val"
QUICK: dict[str, Any] = {"threads": 1, "report": False, "images": 4, "analysis_images": 2}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_images, "STEPS", 2)


def made(model: Path, **options: Any) -> MadeSource:
    """The images of a run."""
    request = Request(
        model, QuantizeConfig(**{**QUICK, **options}), Output.at("nowhere"), calib="psaq"
    )
    found = made_images.with_made_images(request, read_inputs(request), Stages(None)).images
    assert isinstance(found, MadeSource)
    return found


def test_a_whole_run(tmp_path: Path, short: Path) -> None:
    """Against what the model says of real digits; images that are not normalised as the model
    wants them give 21.8 dB, these 29.6."""
    told = Recorded()
    config = QuantizeConfig(**{**QUICK, "images": 16})
    result = quantize(
        short, config=config, output=tmp_path / "o", calib="psaq", val=VAL, progress=told
    )
    report = result.report
    assert report["calibration"] == {
        "source": "psaq", "images": 16, "skipped": [], "method": "robust",
    }  # fmt: skip
    assert report["invocation"]["calib"] == "psaq"
    assert sum("were made from the model" in note for note in report["notes"]) == 1
    assert report["fidelity"]["sqnr_db"] > 26
    told.assert_complete()
    assert told.names[:4] == ["All", stages.READING, stages.LOADING, stages.MAKING]
    (making,) = [s for s in told.stages if s.name == stages.MAKING]
    assert making.steps == [8] * 60


@pytest.mark.usefixtures("few_steps")
def test_the_seed_decides_and_the_runs_batch_does_not(short: Path) -> None:
    one, again, other = made(short), made(short, batch=3), made(short, seed=5)
    assert one.made is not None
    np.testing.assert_array_equal(one.made, again.made)
    assert (one.made != other.made).mean() > 0.5
    seen = np.concatenate(list(one.batches(3)))
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (one.preprocess.mean, one.preprocess.std))
    pixels = (seen * std + mean) * 255
    np.testing.assert_allclose(pixels, one.made.transpose(0, 3, 1, 2), atol=1e-3)
    few = one.reopened(2)
    assert few.names == ["psaq 0", "psaq 1"]
    np.testing.assert_array_equal(np.concatenate(list(few.batches(1))), seen[:2])
    assert one.made.nbytes == 4 * 32 * 32 * 3


def test_they_begin_with_drawn_pictures(short: Path) -> None:
    source = MadeSource(made_of(short), 3, 7)
    drawn = SyntheticSource(source.preprocess, 3, 7)
    (one,), (other,) = source.batches(3), drawn.batches(3)
    np.testing.assert_array_equal(one, other)
    (kept,) = source.filled(source.drawn_pixels()).batches(3)
    np.testing.assert_array_equal(kept, other)


def made_of(model: Path) -> Any:
    request = Request(model, QuantizeConfig(**QUICK), Output.at("nowhere"), calib="psaq")
    return read_inputs(request).preprocess


@pytest.mark.usefixtures("few_steps")
def test_a_model_without_classes(tmp_path: Path, short: Path) -> None:
    model = onnx.load(short)
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["features" if n == name else n for n in node.output]
    model.graph.output[0].name = "features"
    onnx.save(model, tmp_path / "m.onnx")
    result = quantize(
        tmp_path / "m.onnx", config=QuantizeConfig(**QUICK), output=tmp_path / "o", calib="psaq"
    )
    said = [note for note in result.report["notes"] if "--calib psaq" in note]
    assert said == [made_images.NO_CLASSES]
    assert made_images.ON_MADE in result.report["notes"]


@pytest.mark.usefixtures("few_steps")
def test_softmax_is_taken_back(tmp_path: Path, short: Path) -> None:
    model = onnx.load(short)
    name = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Softmax", [name], ["p"], axis=-1))
    model.graph.output[0].name = "p"
    onnx.save(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(made(tmp_path / "m.onnx").made, made(short).made)


@pytest.mark.usefixtures("few_steps")
def test_a_file_measured_by_others_has_them_too(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_parts, "FEWEST", 8)
    monkeypatch.setattr(evaluation_parts, "SECONDS", 0.0)
    config = QuantizeConfig(**QUICK)
    request = Request(
        short, config, Output.at(tmp_path / "a"), calib="psaq", val=str(VAL),
        shared=Shared(tmp_path / "floats"),
    )  # fmt: skip
    half = quantize_apart(request, tmp_path / "between")
    whole = quantize(short, config=config, output=tmp_path / "b", calib="psaq", val=VAL)
    assert isinstance(half, Unfinished)
    file = "quantized.onnx"
    assert (half.folder / "files" / file).read_bytes() == (whole.output / file).read_bytes()


def test_what_torch_cannot_run(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(**QUICK)
    monkeypatch.setattr(TorchForm, "missing", lambda _: "a: no Lstm in torch")
    with pytest.raises(ConfigError, match=r"\(a: no Lstm in torch\); use --calib synthetic"):
        quantize(short, config=config, output=tmp_path / "o", calib="psaq")
    monkeypatch.undo()
    monkeypatch.setattr(made_images, "reads_of", lambda _: model_images.Reads(None, (), None))
    with pytest.raises(ConfigError, match="neither an attention nor an output of logits"):
        quantize(short, config=config, output=tmp_path / "o", calib="psaq")
    monkeypatch.undo()

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not fit.\nmuch more")

    monkeypatch.setattr(TorchForm, "run", broken)
    with pytest.raises(ConfigError, match=r"\(shapes do not fit\); use") as error:
        quantize(short, config=config, output=tmp_path / "o", calib="psaq")
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == []


def test_several_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text_model(tmp_path / "text.onnx")
    monkeypatch.chdir(tmp_path)
    words = ["quantize", "text.onnx", "--calib", "psaq", "--output", "o"]
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert (stop.value.code, said.err.count("\n")) == (2, 1)
    assert "one input, which takes pictures" in said.err
    assert "Use --calib synthetic" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]


@pytest.mark.usefixtures("few_steps")
def test_another_network(tmp_path: Path) -> None:
    """Its logits come behind a pool of tokens, and no class token stands among them."""
    image_model(tmp_path / "m.onnx")
    assert made(tmp_path / "m.onnx").made is not None
