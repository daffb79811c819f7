"""Where results go: a folder of everything, or a file with a folder of reports beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx import QuantizeConfig, Result, quantize
from ptq_onnx.analysis.compare import find_reference, quantized_file
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.files.output_paths import Found, Output, find_output
from ptq_onnx.pipeline.model_path import find_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits_vit.onnx"
CALIB = ROOT / "img" / "digits" / "calib"
QUICK = QuantizeConfig(images=4, report=False, threads=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, short: Path) -> dict[str, Result]:
    """A folder with ``a/`` and with ``b.onnx``, ``b/``: the same run twice."""
    folder = tmp_path_factory.mktemp("written")
    return {
        name: quantize(short, config=QUICK, calib=CALIB, output=folder / name)
        for name in ("a", "b.onnx")
    }


@pytest.fixture
def written(results: dict[str, Result]) -> Path:
    return results["a"].output.parent


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_file_and_its_folder(written: Path) -> None:
    assert names(written) == [
        "a/.ptq_onnx.json", "a/config.yaml", "a/formed.onnx", "a/fused.onnx", "a/quantized.onnx",
        "a/report.json", "b.onnx", "b/.ptq_onnx.json", "b/config.yaml", "b/formed.onnx",
        "b/fused.onnx", "b/report.json",
    ]  # fmt: skip
    assert (written / "b.onnx").read_bytes() == (written / "a/quantized.onnx").read_bytes()


def test_the_result_tells_both(results: dict[str, Result], written: Path) -> None:
    file = results["b.onnx"]
    assert (file.model, file.output) == (written / "b.onnx", written / "b")
    assert file.files[0] == file.model
    assert {p.name for p in file.files} == {
        "b.onnx", "config.yaml", "formed.onnx", "fused.onnx", "report.json",
    }  # fmt: skip
    folder = results["a"]
    assert (folder.model, folder.output) == (written / "a/quantized.onnx", written / "a")


def test_either_is_found_again(written: Path) -> None:
    a, b = written / "a", written / "b"
    for given, want in (
        (a, Found(a / "quantized.onnx", a)),
        (a / "quantized.onnx", Found(a / "quantized.onnx", a)),
        (b, Found(written / "b.onnx", b)),
        (written / "b.onnx", Found(written / "b.onnx", b)),
    ):
        assert find_output(given) == want
        assert quantized_file(given) == want.model
        assert find_reference([given], None) == want.folder / "fused.onnx"  # type: ignore[operator]
    assert find_model(b, written=True) == written / "b.onnx"
    with pytest.raises(ModelError, match=r"is a folder; name the file: .*a/fused.onnx or one of 2"):
        find_model(a)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed(written: Path, tmp_path: Path) -> None:
    """To a file, to a folder, to a folder whose model lies beside it."""
    for name, real, model in (
        ("a", written / "a", "a/quantized.onnx"),
        ("b", written / "b", "b.onnx"),
        ("c.onnx", written / "b.onnx", "b.onnx"),
        ("d.onnx", written / "a/quantized.onnx", "a/quantized.onnx"),
    ):
        link = tmp_path / name
        link.symlink_to(real)
        assert quantized_file(link).samefile(written / model)
        assert find_model(link, written=True).samefile(written / model)
        folder = written / model.removesuffix("/quantized.onnx").removesuffix(".onnx")
        assert find_reference([link], None).samefile(folder / "fused.onnx")


def test_a_folder_of_another_run_is_not_taken(written: Path, tmp_path: Path) -> None:
    """x.onnx beside x/, which holds a model of its own: its reports are not those of the file."""
    (tmp_path / "x").mkdir()
    for name in ("quantized.onnx", "report.json"):
        (tmp_path / "x" / name).write_bytes((written / "a" / name).read_bytes())
    (tmp_path / "x.onnx").write_bytes(b"")
    assert find_output(tmp_path / "x.onnx").folder is None
    with pytest.raises(ConfigError, match=r"holds the quantized\.onnx of another run"):
        Output.at(tmp_path / "x.onnx")


def matmul(path: Path, factor: float) -> Path:
    g = SmallGraph(("batch", 4))
    g.output_shape = ("batch", 5)
    return g.save(path, g("MatMul", "x", factor * sample(4, 5)))


def with_weights_apart(folder: Path, factor: float) -> Path:
    """A finished folder whose model has its weights beside it, as beyond 1.9 GB."""
    folder.mkdir()
    onnx.save(
        onnx.load(matmul(folder.with_suffix(".plain"), factor)), folder / "quantized.onnx",
        save_as_external_data=True, location="quantized.onnx.data", size_threshold=0,
    )  # fmt: skip
    (folder / "report.json").write_text("{}")
    return folder


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((1, 4), np.float32)})[0]


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Beyond 1.9 GB weights lie beside the model, which then names the new file."""
    out = Output.at(tmp_path / "new.onnx")
    files = out.publish(with_weights_apart(tmp_path / "one", 1))
    assert [f.relative_to(tmp_path).as_posix() for f in files] == [
        "new.onnx", "new.onnx.data", "new/report.json",
    ]  # fmt: skip
    np.testing.assert_array_equal(run(out.model), run(tmp_path / "one.plain"))


def test_a_model_never_meets_the_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that replaces the model's file is the one that changes its weights."""
    out = Output.at(tmp_path / "new.onnx")
    out.publish(with_weights_apart(tmp_path / "one", 1))
    work = with_weights_apart(tmp_path / "two", 2)
    replace, seen = os.replace, []

    def stop_at(source: Path, target: Path) -> None:
        if target == out.model:
            seen.append(run(out.model))
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at)
    out.publish(work)
    np.testing.assert_array_equal(seen[0], run(tmp_path / "one.plain"))
    np.testing.assert_array_equal(run(out.model), run(tmp_path / "two.plain"))
    assert len(list(tmp_path.glob("new.onnx*data"))) == 1
    out.publish(with_weights_apart(tmp_path / "three", 3))
    np.testing.assert_array_equal(run(out.model), run(tmp_path / "three.plain"))
    assert [p.name for p in tmp_path.glob("new.onnx*data")] == ["new.onnx.data"]


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").write_text("")
    with pytest.raises(ConfigError, match="needs the folder x, which is a file"):
        Output.at("x.onnx")
    with pytest.raises(ConfigError, match="x is a file; name a folder"):
        Output.at("x")
    with pytest.raises(ConfigError, match="no model is written here"):
        Output.of_reports("y.onnx")
    with pytest.raises(ConfigError, match="is the model itself"):
        quantize(MODEL, output=MODEL)
    os.mkdir("z.onnx")  # a folder may be called so
    assert Output.at("z.onnx").model == Path("z.onnx/quantized.onnx")
