"""What has a public name tells what it does, in private classes too, which ruff does not ask."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from test_layers import PACKAGE


def silent(node: ast.AST, inside: str = "") -> Iterator[str]:
    """Functions and methods without a docstring; not those inside functions, nor special ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from silent(child, f"{inside}{child.name}.")
            continue
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if function and not child.name.startswith("_") and not ast.get_docstring(child):
            yield f"{inside}{child.name}"


def test_every_public_name_has_a_docstring() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in silent(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_private_names_and_inner_functions_may_be_silent() -> None:
    source = "def f():\n    def g(): ...\ndef _h(): ...\nclass _C:\n    def m(self): ...\n"
    assert list(silent(ast.parse(source))) == ["f", "_C.m"]
