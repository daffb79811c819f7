"""Names do nothing on a terminal or a page, whatever they hold, and no encoding is too small."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from fuzz.cases import command
from fuzz.seeds import vit
from PIL import Image

import ptq_onnx
from ptq_onnx.cli.console import one_line_errors, simple_table
from ptq_onnx.cli.terminal import Screen, plain, spell_what_is_missing

PACKAGE = Path(ptq_onnx.__file__).parent
ROOT = PACKAGE.parent
EVIL = "\x1b[31m\u202eevil\x9b2J\r[bold]$\\bad$"
"""An escape sequence, a mark that turns the writing, a C1 control, markup, mathematics."""
FORBIDDEN = ("\x1b", "\u202e", "\x9b", "\r", "\x07", "\x00")


def named_evil(folder: Path) -> Path:
    """A model whose file, nodes, tensors, input, output and producer have such names."""
    model = vit()
    names = {model.graph.input[0].name, model.graph.output[0].name}
    model.producer_name = f"maker {EVIL}\nnote: all is well"
    for index, node in enumerate(model.graph.node):
        node.name = f"{index} {EVIL}"
        names.update(node.output)
    for value in (*model.graph.input, *model.graph.output):
        value.name = f"{value.name}{EVIL}"
    for node in model.graph.node:
        for words in (node.input, node.output):
            words[:] = [f"{n}{EVIL}" if n in names else n for n in words]
    del model.graph.value_info[:]
    path = folder / f"[x]{EVIL}.onnx"
    onnx.save(model, path)
    return path


def run(
    *words: object,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a command prints, which must succeed."""
    monkeypatch.chdir(folder)
    with one_line_errors(), suppress(SystemExit):  # check has found something
        command(*words)
    captured = capsys.readouterr()
    return harmless(captured.out + captured.err)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    (folder / "in").mkdir()
    for index in range(3):
        name = f"{index}{EVIL}.png" if index else os.fsdecode(b"\xff\xfe.png")
        Image.new("RGB", (12, 8), (80 * index, 9, 9)).save(folder / "in" / name)
    return named_evil(folder)


def harmless(shown: str) -> str:
    assert not [mark for mark in FORBIDDEN if mark in shown], shown
    return shown


@pytest.mark.parametrize("words", [("inspect",), ("check",), ("evaluate", "--val", "in"),
                                   ("benchmark", "--seconds", "0.01", "--batch", "1")])  # fmt: skip
def test_names_in_tables(
    words: tuple[str, ...],
    evil: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--reference", evil.name) if words[0] == "evaluate" else ()
    folder = evil.parent
    shown = run(
        words[0], evil.name, *words[1:], *more, folder=folder, monkeypatch=monkeypatch,
        capsys=capsys,
    )  # fmt: skip
    assert not any(line.startswith("note: all is well") for line in shown.splitlines())
    assert "[x]\\x1b[31m\\u202eevil" in "".join(shown.split())


def test_names_on_the_page(
    evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"folder": evil.parent, "monkeypatch": monkeypatch, "capsys": capsys}
    words = ("--calib", "in", "--threads", "1", "--analysis-images", "1", "--quantizer", "vanilla")
    run("quantize", evil.name, *words, "--keep-float", "fc2", **here)  # type: ignore[arg-type]
    for name in ("report.html", "report.json"):
        shown = harmless((evil.parent / "output" / name).read_text(encoding="utf-8"))
        assert "u202eevil" in shown
    words = ("output", "--val", "in", "-o", "side", "--threads", "1", "--reference", evil.name)
    run("compare", *words, **here)  # type: ignore[arg-type]
    assert "u202eevil" in harmless((evil.parent / "side/compare.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "2.1x >= 3 gamma \\udcff"), ("latin-1", "2.1× >= 3 gamma \\udcff"),
     ("cp1252", "2.1× >= 3 gamma \\udcff"), ("utf-8", "2.1× ≥ 3 γ \\udcff")],
)  # fmt: skip
def test_small_encodings(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    spell_what_is_missing()
    print("2.1× ≥ 3 γ \udcff")
    Screen(stream, 100).print(simple_table(("a",), [("2.1×",)]))
    lines = stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    assert lines[0] == shown
    assert any("2.1" in line for line in lines[1:])


def test_a_command_where_the_terminal_has_ascii_alone(evil: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptq_onnx", "inspect", evil.name],
        cwd=evil.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "producer" in harmless(done.stdout.decode("ascii"))


def test_a_screen_shows_what_no_one_has_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    screen = Screen(width=100)
    screen.print(Text(f"a{EVIL}\nb"))
    screen.print(f"[/b]{EVIL}")
    screen.print(simple_table((EVIL, "[/b]"), [(EVIL, "a\nb")]))
    screen.say(f"{EVIL}\nnote")
    out = capsys.readouterr().out
    assert not [mark for mark in FORBIDDEN if mark in out]
    assert "[/b]" in out
    assert "a\\nb" in out
    assert "\\nnote" in out


def test_texts_keep_their_style() -> None:
    assert str(plain("a\x1b", "bold").style) == "bold"
    assert plain("a\x1b").plain == "a\\x1b"


def test_all_that_rich_prints_goes_through_one_module() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module in ("rich.console", "rich.text") and path.stem != "terminal":
                names = [a.name for a in node.names]  # type: ignore[union-attr]
                if path.stem != "bars" or names != ["Text"]:  # its columns are made of stages
                    found.append(f"{path.name}: {module}")
    assert found == []
