"""Names of the user's, which may be anything: how they are shown, and our files named by them."""

from __future__ import annotations

import html
from pathlib import PurePosixPath

LONGEST = 100
"""Bytes: most file systems end at 255, with all that is put in front and behind."""


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what is not to be seen: control characters, line breaks, marks
    that turn the direction of writing, bytes that are no text; but for the characters of ``keep``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def for_page(value: object) -> object:
    """What a page shows of a value: a string, unless it is markup already, by :func:`printable`."""
    return printable(value, keep="\n\t") if type(value) is str else value


def in_html(text: str) -> str:
    """A text between tags, or in an attribute."""
    return html.escape(printable(text))


def short_stem(name: str) -> str:
    """The name without folder and ending, printable and not too long."""
    stem = PurePosixPath(name).stem
    seen = "".join(c if c.isprintable() else "_" for c in stem)
    return seen.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
