"""Temporary folders are gone with their process, at the latest when the next one looks."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ptq_onnx.errors import ConfigError
from ptq_onnx.files.held_folder import (
    clear,
    held_folder,
    replacing,
    scratch_folder,
    unfinished,
)
from ptq_onnx.files.text_file import write_text

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_process_leaves_what_the_next_removes(temporary: Path) -> None:
    code = (
        "import os, signal\n"
        "from ptq_onnx.files.held_folder import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'big').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    where = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=where, check=False).returncode == -9
    (left,) = names(temporary)
    with scratch_folder() as mine, scratch_folder() as other:
        assert names(temporary) == sorted((mine.name, other.name))
        assert left not in names(temporary)
    assert names(temporary) == []


def test_planted_names_are_left_alone(temporary: Path) -> None:
    """In a folder that everybody writes to, a link may lead anywhere."""
    precious = temporary / "precious"
    precious.mkdir()
    (precious / "file").write_text("1")
    (temporary / ".ptq_onnx.ptq-00000000").symlink_to(precious)
    (temporary / ".ptq_onnx.ptq-00000001").write_text("a file")
    with scratch_folder():
        pass
    clear(temporary / "ptq_onnx")
    assert names(precious) == ["file"]
    assert len(names(temporary)) == 3


def test_folders_of_others_are_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / ".ptq_onnx.ptq-00000000").mkdir()
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    clear(temporary / "ptq_onnx")
    assert len(names(temporary)) == 1


def test_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ConfigError, match=r"No temporary folder .*: set TMPDIR"), scratch_folder():
        pass


def test_a_file_is_replaced_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as new:
        new.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["page.html"])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_users_mask_holds(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "page.html", "1")
        with held_folder(tmp_path / "x") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_else_makes_temporary_names() -> None:
    """A named file in the system's folder outlives a killed process."""
    allowed = {
        "held_folder.py": {"gettempdir"},
        "array_files.py": {"TemporaryFile", "gettempdir"},
        "own.py": {"TemporaryFile"},  # has no name
    }
    found = {}
    for path in (ROOT / "ptq_onnx").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "tempfile"
        }
        if used - allowed.get(path.name, set()):
            found[path.name] = used
    assert found == {"trials.py": {"TemporaryDirectory"}}  # in the folder of the run


def test_what_is_unfinished_in_a_folder(tmp_path: Path) -> None:
    assert unfinished(tmp_path) == []
    (tmp_path / "b").mkdir()
    with held_folder(tmp_path / "a.x"), held_folder(tmp_path / "b"), held_folder(tmp_path / "b"):
        assert unfinished(tmp_path) == [tmp_path / "a.x", tmp_path / "b"]
    assert unfinished(tmp_path) == []
