"""A prepared model that is read again is the one that was kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from small_image_model import image_model

from ptq_onnx.errors import ModelError
from ptq_onnx.preparation import kept
from ptq_onnx.preparation.kept import FACTS, MODEL, Preparing
from ptq_onnx.preparation.prepare import Prepared


def bytes_of(found: Prepared) -> bytes:
    return ir.serde.serialize_model(found.model).SerializeToString(deterministic=True)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that are prepared from their files."""
    made: list[Path] = []
    plain = kept.prepare

    def prepare(path: Path, *how: object, **more: object) -> Prepared:
        made.append(path)
        return plain(path, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(kept, "prepare", prepare)
    return made


@pytest.mark.parametrize("batch", ["batch", 4])
def test_the_same_again(tmp_path: Path, anew: list[Path], batch: int | str) -> None:
    what = Preparing(image_model(tmp_path / "m.onnx", batch=batch), 21, None, {})
    plain = what.anew()
    assert (plain.fixed is None) == (batch == "batch")
    what.keep(tmp_path / "deep/kept")
    anew.clear()
    found = what.read(tmp_path / "deep/kept")
    assert anew == []
    assert bytes_of(found) == bytes_of(plain)
    assert replace(found, model=plain.model) == plain
    assert len(found.sites) > 20
    if plain.fixed is not None:
        restored = [one.fixed.restore(one.model) for one in (plain, found) if one.fixed]
        assert [str(m.graph.outputs[0].shape) for m in restored] == ["[4,10]"] * 2
    assert [p.name for p in (tmp_path / "deep/kept").iterdir()] == [what.word]


def test_readers_in_the_order_that_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewritten graph tells readers in another order than its file, and sites follow that."""
    plain = kept.prepare

    def turned(*how: object, **more: object) -> Prepared:
        found = plain(*how, **more)  # type: ignore[arg-type]
        values = (value for node in found.model.graph for value in node.outputs)
        read = next(value for value in values if len(value.uses()) > 1)
        uses = tuple(read.uses())
        for value, order in ((None, uses), (read, uses[::-1])):
            for use in order:
                use.node.replace_input_with(use.idx, value)
        return replace(found, sites=kept.find_sites(found.model, found.blocks))

    what = Preparing(image_model(tmp_path / "m.onnx"), 21, None, {})
    straight = what.anew()
    monkeypatch.setattr(kept, "prepare", turned)
    what.keep(tmp_path / "kept")
    wanted = what.anew()
    assert wanted.sites != straight.sites
    assert what.read(tmp_path / "kept").sites == wanted.sites


def test_what_is_missing_or_broken_is_prepared(tmp_path: Path, anew: list[Path]) -> None:
    what = Preparing(image_model(tmp_path / "m.onnx"), 21, None, {})
    what.read(None)
    what.read(tmp_path)
    what.keep(tmp_path)
    (tmp_path / what.word / MODEL).write_bytes(b"no model")
    what.read(tmp_path)
    (tmp_path / what.word / FACTS).write_text("{}")
    what.read(tmp_path)
    assert len(anew) == 5


def test_a_place_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    what = Preparing(image_model(tmp_path / "m.onnx"), 21, None, {})
    what.keep(tmp_path / "file/kept")
    with pytest.raises(ModelError):
        replace(what, path=tmp_path / "file").keep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_word_follows_what_decides_the_model(tmp_path: Path) -> None:
    what = Preparing(image_model(tmp_path / "m.onnx"), 21, None, {})
    others = ({"opset": 20}, {"size": (16, 16)}, {"shapes": {"x": (3,)}})
    words = {what.word, *(replace(what, **other).word for other in others)}
    image_model(tmp_path / "m.onnx", channels=1)
    assert len(words | {what.word}) == 5
