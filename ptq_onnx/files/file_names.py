"""Names of our files that are made of names of the user's, which may be anything."""

from __future__ import annotations

from pathlib import PurePosixPath

LONGEST = 100
"""Bytes: most file systems end at 255, with all that is put in front and behind."""


def short_stem(name: str) -> str:
    """The name without folder and ending, printable and not too long."""
    stem = PurePosixPath(name).stem
    printable = "".join(c if c.isprintable() else "_" for c in stem)
    return printable.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
