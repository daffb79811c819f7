"""What the pages tell a reader to type exists: commands, options, scripts, make's targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from documentation.pages import ROOT, WRITTEN, named
from ptq_onnx.cli.help import NAMES

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PLACEHOLDER = re.compile(r"[A-Z]{2,}|…")
STARTS = ("ptq-onnx ", "python ", "make ", "pytest ")


def commands(path: Path) -> Iterator[list[str]]:
    """Lines that are commands: indented, or in code font."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", "\n".join(k for k in text.splitlines() if k[:4] != "    "))
    for line in lines:
        for part in re.split(r" && ", line):
            if part.startswith(STARTS):
                yield shlex.split(part, comments=True)


def known_options() -> dict[str, set[str]]:
    """The options of each command."""
    import command_tables

    return {
        name: {*NAMES, *(o for p in c.params for o in (*p.opts, *p.secondary_opts))}
        for name, c in command_tables.all_commands().items()
    }


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_commands_exist(path: Path) -> None:
    options = known_options()
    for words in commands(path):
        given = [w.partition("=")[0] for w in words[1:] if w.startswith("-")]
        if words[0] == "ptq-onnx" and words[1] != "--version":
            if words[1] not in ("-h", "--help"):
                assert words[1] in options, words
                assert set(given) <= options[words[1]], words
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {w for w in words[1:] if "=" not in w} <= set(targets), words
        elif words[0] == "python" and words[1].endswith(".py"):
            if PLACEHOLDER.search(words[1]):
                continue
            text = (ROOT / words[1]).read_text(encoding="utf-8")
            shared = ROOT / "benchmarks" / "figures" / "subject.py"
            text += shared.read_text(encoding="utf-8") if "subject" in text else ""
            for option in given:
                assert option in text, words


def test_the_extraction_sees_commands() -> None:
    found = [words for path in WRITTEN for words in commands(path)]
    assert sum(words[:2] == ["ptq-onnx", "quantize"] for words in found) >= 14
    assert ["make", "docs"] in found
    assert {w[1] for w in found if w[0] == "ptq-onnx"} >= {
        "analyse", "benchmark", "calibration-curve", "check", "compare", "evaluate", "export",
        "inspect", "quantize",
    }  # fmt: skip
