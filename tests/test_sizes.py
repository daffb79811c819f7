"""One idea each: no function of the package is longer than a screen, no file than a few of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from conftest import LONG, TESTS
from test_layers import PACKAGE

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
"""The signature counted, the docstring not."""


def functions(source: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function of a file and how many lines it has, its docstring left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = node.body[0]
            told = first.end_lineno - first.lineno + 1 if is_text(first) else 0
            yield node, node.end_lineno - node.lineno + 1 - told


def is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_no_file_is_too_long() -> None:
    sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE.rglob("*.py")}
    assert [f"{p.relative_to(PACKAGE)}: {n}" for p, n in sizes.items() if n > LINES_OF_A_FILE] == []


def test_no_function_is_too_long() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {size}"
        for path in PACKAGE.rglob("*.py")
        for node, size in functions(path.read_text(encoding="utf-8"))
        if size > LINES_OF_A_FUNCTION
    ]
    assert long == []


def test_lines_are_counted_without_the_docstring() -> None:
    source = (
        'def f(\n    x,\n):\n    """One\n    two."""\n    def g():\n        pass\n    return x\n'
    )
    assert [(node.name, size) for node, size in functions(source)] == [("f", 6), ("g", 2)]


def test_the_long_test_files_are_there() -> None:
    """Those that run first; a name of none would do nothing."""
    assert [name for name in LONG if not (TESTS / name).is_file()] == []
    assert len(set(LONG)) == len(LONG)
