"""Outputs of the float model kept for other runs: the same figures, and the model not run again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import PICTURES, PLAIN, WEIGHT, classifier

from ptq_onnx.evaluation import recorded
from ptq_onnx.evaluation.evaluate import Evaluation, evaluate
from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.recorded import Record
from ptq_onnx.images.opening import open_images

LABELS = np.arange(len(PICTURES)) % 6
OTHER = classifier(WEIGHT + 0.01 * np.sign(WEIGHT), extra=True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Images that each model is run on, by its name."""
    runs = {"tested": 0, "float": 0}
    plain = Network.__call__

    def call(self: Network, images: np.ndarray) -> dict[str, np.ndarray]:
        runs[self.name] += len(images)
        return plain(self, images)

    monkeypatch.setattr(Network, "__call__", call)
    return runs


def figures(record: Record | None, pictures: np.ndarray = PICTURES) -> Evaluation:
    return evaluate(
        OTHER, open_images(pictures, PLAIN), LABELS[: len(pictures)], batch_size=4, threads=1,
        reference=classifier(extra=True), names=("tested", "float"), baseline=True, record=record,
    )  # fmt: skip


def test_the_second_run_reads_what_the_first_has_kept(
    tmp_path: Path, counted: dict[str, int]
) -> None:
    record = Record(tmp_path / "deep" / "a.npy")
    plain = figures(None)
    assert figures(record) == plain
    assert counted == {"tested": 22, "float": 22}
    assert [p.name for p in record.path.parent.iterdir()] == ["a.npy"]
    assert figures(record) == plain
    assert counted == {"tested": 33, "float": 22}
    names, found, whole = list(record.batches())[2]
    assert (names, sorted(found), whole) == (["8", "9", "10"], ["tokens", "y"], set())
    np.testing.assert_allclose(found["y"], (PICTURES.reshape(11, 48) @ WEIGHT)[8:], rtol=1e-4)


@pytest.mark.parametrize("length", [0, 7, 200, 2000])
def test_what_is_missing_is_run(tmp_path: Path, counted: dict[str, int], length: int) -> None:
    """A file that is cut short, or no such file at all."""
    record = Record(tmp_path / "a.npy")
    plain = figures(record)
    record.path.write_bytes(record.path.read_bytes()[:length])
    assert figures(record) == plain
    kept = sum(len(names) for names, _, _ in record.batches())
    assert counted["float"] == 22 - kept
    assert kept == (4 if length == 2000 else 0)


def test_other_images_are_run(tmp_path: Path, counted: dict[str, int]) -> None:
    """Where one could not be read before, batches hold others."""
    record = Record(tmp_path / "a.npy")
    figures(record, PICTURES[:6])
    assert figures(record) == figures(None)
    assert counted["float"] == 6 + 11 - 4 + 11


def test_a_failed_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "a.npy")
    monkeypatch.setattr(Network, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures(record)
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 3000)
    assert figures(Record(tmp_path / "a.npy")) == figures(None)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert figures(Record(tmp_path / "file" / "a.npy")) == figures(None)


def test_the_place_follows_what_the_bits_depend_on(tmp_path: Path) -> None:
    model, other = tmp_path / "m.onnx", tmp_path / "o.onnx"
    model.write_bytes(classifier())
    other.write_bytes(OTHER)
    first = Record.of(tmp_path, model, PLAIN, 8, 1)
    assert Record.of(tmp_path, model, PLAIN, 8, 1) == first
    others = {
        Record.of(tmp_path, other, PLAIN, 8, 1).path,
        Record.of(tmp_path, model, replace(PLAIN, mean=(0.5,) * 3), 8, 1).path,
        Record.of(tmp_path, model, PLAIN, 4, 1).path,
        Record.of(tmp_path, model, PLAIN, 8, 2).path,
        Record.of(tmp_path / "x", model, PLAIN, 8, 1).path,
    }
    assert len(others | {first.path}) == 6
