"""The written pages, and the modules that make parts of them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

sys.path.insert(0, str(DOCS / "_hooks"))


def named(path: Path) -> str:
    """How a test names a page."""
    return path.relative_to(ROOT).as_posix()
