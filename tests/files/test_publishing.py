"""A folder of results is old whole or new whole, whatever kills the run that replaces it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq_onnx.errors import ConfigError
from ptq_onnx.files import publishing
from ptq_onnx.files.held_folder import LOCK, clear
from ptq_onnx.files.publishing import MANIFEST, publish, workshop

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts on flock and renameat2")


def make(output: Path, files: dict[str, str]) -> tuple[Path, ...]:
    with workshop(output) as work:
        for name, text in files.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text)
        return publish(work, output)


def content(folder: Path) -> dict[str, str]:
    """Text by name, without the manifest."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p != folder)


@pytest.fixture(params=["exchange", "aside"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "aside":
        monkeypatch.setattr(publishing, "_exchanged", lambda *_: False)
    return tmp_path / "o u t"


def test_the_folder_is_replaced_as_a_whole(out: Path) -> None:
    made = make(out, {"report.html": "1", "quantized.onnx": "1", "attention/a.png": "1"})
    names = ["attention/a.png", "quantized.onnx", "report.html"]
    assert [p.relative_to(out).as_posix() for p in made] == names
    make(out, {"quantized.onnx": "2"})
    assert content(out) == {"quantized.onnx": "2"}
    assert beside(out) == []


def test_foreign_files_stay(out: Path) -> None:
    make(out, {"quantized.onnx": "1", "attention/a.png": "1"})
    (out / "notes").mkdir()
    (out / "empty").mkdir()
    foreign = {"notes/mine.txt": "mine", "attention/mine.png": "mine"}
    for name, text in foreign.items():
        (out / name).write_text(text)
    (out / "link").symlink_to("nowhere")
    make(out, {"quantized.onnx": "2"})
    make(out, {"report.json": "3"})
    assert content(out) == {"report.json": "3", **foreign}
    assert (out / "empty").is_dir()
    assert os.readlink(out / "link") == "nowhere"


def test_results_without_a_manifest_are_known_by_name(out: Path) -> None:
    (out / "attention").mkdir(parents=True)
    for name in ("report.html", "fused.onnx", "attention/block_01.png", "m.onnx.bak"):
        (out / name).write_text("old")
    make(out, {"quantized.onnx": "new"})
    assert content(out) == {"quantized.onnx": "new", "m.onnx.bak": "old"}


def test_a_failure_leaves_what_was_there(out: Path) -> None:
    make(out, {"quantized.onnx": "1"})
    with pytest.raises(FileNotFoundError):
        make(out, {"quantized.onnx": "2", "no/such/folder": "2"})
    assert content(out) == {"quantized.onnx": "1"}
    assert beside(out) == []


def test_a_failure_leaves_no_new_folders(out: Path) -> None:
    place = out.parent / "new" / "deep" / "out"
    with pytest.raises(FileNotFoundError):
        make(place, {"no/such/folder": "1"})
    assert not (out.parent / "new").exists()
    make(place, {"quantized.onnx": "1"})
    assert content(place) == {"quantized.onnx": "1"}


def test_the_users_mask_is_kept(out: Path) -> None:
    before = os.umask(0o077)
    try:
        make(out, {"quantized.onnx": "1"})
        assert out.stat().st_mode & 0o777 == 0o700
        out.chmod(0o750)
        make(out, {"quantized.onnx": "2"})
        assert out.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


def test_a_link_to_a_folder_stays_a_link(out: Path) -> None:
    real = out.with_name("real")
    real.mkdir()
    out.symlink_to(real)
    make(out, {"quantized.onnx": "1"})
    assert out.is_symlink()
    assert content(real) == {"quantized.onnx": "1"}


def test_the_folder_that_one_stands_in(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(out, {"report.html": "1", "quantized.onnx": "1"})
    (out / "mine").write_text("mine")
    monkeypatch.chdir(out)
    make(Path(), {"quantized.onnx": "2"})
    assert content(Path()) == content(out) == {"quantized.onnx": "2", "mine": "mine"}
    assert beside(out) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="is a file; name a folder"), workshop(tmp_path / "out"):
        pass


@linux
def test_runs_that_go_on_are_left_alone(out: Path) -> None:
    with workshop(out) as one, workshop(out) as other:
        assert one.is_dir()
        (other / "quantized.onnx").write_text("other")
        publish(other, out)
        assert one.is_dir()
        (one / "quantized.onnx").write_text("one")
        publish(one, out)
    assert content(out) == {"quantized.onnx": "one"}
    assert beside(out) == []


@linux
def test_old_results_that_were_put_aside_come_back(out: Path) -> None:
    make(out, {"quantized.onnx": "1"})
    os.replace(out, out.with_name(f".{out.name}.ptq-0123.old"))
    clear(out)
    assert content(out) == {"quantized.onnx": "1"}
    assert not (out / LOCK).exists()


REPLACE = """
import sys
from pathlib import Path
from ptq_onnx import publishing
if sys.argv[2] == "aside":
    publishing._exchanged = lambda *_: False
print("ready", flush=True)
for turn in range(100_000):
    with publishing.workshop(Path(sys.argv[1])) as work:
        for name in ("a", "b", "c"):
            (work / name).write_text(str(turn))
        (work / f"only-{turn % 2}").write_text(str(turn))
        publishing.publish(work, Path(sys.argv[1]))
"""


@linux
@pytest.mark.parametrize("way", ["exchange", "aside"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random(tmp_path: Path, way: str, how: signal.Signals) -> None:
    out, chance = tmp_path / "out", random.Random(0)
    out.mkdir()
    (out / "mine").write_text("mine")
    for _ in range(12):
        command = [sys.executable, "-c", REPLACE, str(out), way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0.005, 0.05))
            process.send_signal(how)
        clear(out)
        found = content(out)
        assert found.pop("mine") == "mine"
        found.pop(LOCK, None)
        turns = set(found.values())
        if found:
            assert len(turns) == 1
            assert sorted(found) == ["a", "b", "c", f"only-{int(turns.pop()) % 2}"]
        assert beside(out) == []
