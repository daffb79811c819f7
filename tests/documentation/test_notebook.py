"""The notebook runs as it stands, and what it keeps is what it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from documentation.pages import DOCS, ROOT

NOTEBOOK = DOCS / "notebooks" / "quickstart.ipynb"


def test_it_runs(tmp_path: Path) -> None:
    copy = tmp_path / NOTEBOOK.name
    shutil.copy(NOTEBOOK, copy)
    done = subprocess.run(
        [sys.executable, str(DOCS / "_hooks" / "notebook_page.py"), str(copy)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    import notebook_page

    kept, fresh = notebook_page.stored(NOTEBOOK), notebook_page.stored(copy)
    assert [len(text.splitlines()) for text in kept] == [len(t.splitlines()) for t in fresh]
    printed = "".join(fresh)
    before, after = map(float, re.findall(r"top-1 ([\d.]+) → ([\d.]+) %", printed)[0])
    assert after > before - 2
    assert float(re.findall(r"SQNR of the logits ([\d.]+) dB", printed)[0]) > 30
    assert "38 of 38 linears, 0 errors" in printed


def test_it_is_a_notebook() -> None:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    counts = [c["execution_count"] for c in found["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
