"""A file is read once, until it is written again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptq_onnx.files.unchanged import kept_while_unchanged


class Reader:
    """Gives what a file holds, and counts how often it was read."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> str:
        self.times += 1
        return path.read_text()


def test_read_again_where_it_was_written(tmp_path: Path) -> None:
    reader = Reader()
    read = kept_while_unchanged(reader)
    file = tmp_path / "file"
    file.write_text("one")
    assert [read(file), read(str(file)), reader.times] == ["one", "one", 1]
    state = file.stat()
    file.write_text("two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert [read(file), read(file), reader.times] == ["two", "two", 2]
    other = tmp_path / "other"
    other.write_text("six")
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    os.replace(other, file)  # the size and the time are the same
    assert [read(file), reader.times] == ["six", 3]


def test_errors_are_told_each_time(tmp_path: Path) -> None:
    reader = Reader()
    read = kept_while_unchanged(reader)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
    assert reader.times == 2
    (tmp_path / "none").write_text("now")
    assert read(tmp_path / "none") == "now"
