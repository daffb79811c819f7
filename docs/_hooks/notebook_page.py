"""Notebooks without Jupyter: a page of one, and its cells run for their output.

    python docs/_hooks/notebook_page.py docs/notebooks/quickstart.ipynb

runs the cells in the project's folder and stores what they print.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def cells(path: Path) -> list[Cell]:
    """The cells of a notebook, in order."""
    found: list[Cell] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def text_of(part: str | list[str]) -> str:
    """Source or output, which a notebook keeps as lines."""
    return part if isinstance(part, str) else "".join(part)


def run(path: Path) -> list[str]:
    """Run the code cells in one namespace; what each prints, its last expression included."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        _printed(text_of(cell["source"]), names)
        for cell in cells(path)
        if cell["cell_type"] == "code"
    ]


def stored(path: Path) -> list[str]:
    """The outputs that the notebook keeps, one a code cell."""
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    return ["".join(text_of(o["text"]) for o in cell["outputs"]) for cell in code]


def page(path: Path) -> str:
    """The notebook in Markdown."""
    parts = []
    for cell in cells(path):
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        output = "".join(text_of(one["text"]) for one in cell["outputs"])
        if output:
            parts.append(f"```text\n{output.rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\nThe notebook: [{path.name}]({path.name})\n"


def store(path: Path) -> None:
    """Run the notebook and write what its cells print into it."""
    outputs = iter(run(path))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = next(outputs)
        lines = printed.splitlines(keepends=True)
        cell["execution_count"] = count
        cell["outputs"] = (
            [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        )
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _printed(source: str, names: dict[str, Any]) -> str:
    """Run statements; a last expression is shown as a prompt shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


if __name__ == "__main__":
    store(Path(sys.argv[1]))
