"""The package is a house: rooms on floors, and an import leads to a floor above in this list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ptq_onnx"
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "telemetry", "version"),
    ("files", "runtime"),
    ("images",),
    ("config",),
    ("numerics",),
    ("graph",),
    ("blocks",),
    ("fusion",),
    ("preparation",),
    ("evaluation",),
    ("calibration",),
    ("qdq",),
    ("engine",),
    ("quantizers",),
    ("equalization",),
    ("targets",),
    ("analysis",),
    ("auto", "report"),
    ("pipeline",),
    ("api",),
    ("sweep",),
    ("cli",),
)
"""Rooms by floor. Rooms of one floor do not know each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"__init__", "__main__"}
"""The public names, imported when they are asked for, and the command line's entry."""


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules() -> Iterator[Path]:
    return (p for p in PACKAGE.rglob("*.py") if room_of(p) not in DOORS)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package's own, lazy ones and those for types alike."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "ptq_onnx"
            names = [f"ptq_onnx.{a.name}" for a in node.names] if whole else [node.module or ""]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ptq_onnx":
                yield node.lineno, rest.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} == set(FLOOR)


def test_imports_lead_to_floors_above() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {room}"
        for path in modules()
        for line, room in imported(path)
        if room != room_of(path) and FLOOR.get(room, len(FLOORS)) >= FLOOR[room_of(path)]
    ]
    assert wrong == []


def test_targets_do_not_know_each_other() -> None:
    """What several have in common is in ``checking`` and ``timing``, which know none of them."""
    shared = {"checking", "timing"}
    wrong = []
    for path in (PACKAGE / "targets").rglob("*.py"):
        mine = path.relative_to(PACKAGE / "targets").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptq_onnx.targ"):
                other = (node.module or "").split(".")[2]
                if other not in {mine, *shared}:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} imports {other}")
    assert wrong == []


def test_no_logic_in_an_init() -> None:
    """But for the public names, which are imported when they are first asked for."""
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if path.parent != PACKAGE:
            assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path
