"""What is printed is text, whatever the names of files, nodes and labels hold.

Control characters, line breaks and marks that turn the direction of writing are shown as escapes,
and brackets are no markup: :func:`plain` makes such a text, :class:`Screen` lets nothing else
through. What the terminal's encoding does not have is spelled in ASCII (``×`` as ``x``), or is an
escape too.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ptq_onnx.files.file_names import printable

SPELLED = {
    "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "⇒": "=>",
    "≥": ">=", "≤": "<=", "≈": "~", "±": "+-", "²": "^2", "√": "sqrt", "γ": "gamma", "β": "beta",
    "α": "alpha", "μ": "mu", "σ": "sigma", "Σ": "sum", "ε": "eps",
}  # fmt: skip
"""How texts of ours are written where the encoding does not have the sign."""
PIPE_WIDTH = 120
"""Columns where there is no terminal to ask."""
_ERRORS = "ptq_onnx.spelled"


def plain(text: object, style: str = "") -> Text:
    """A text for a table or a line."""
    return Text(printable(str(text)), style=style)


class Screen(Console):
    """A console on which no text does anything but stand there."""

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """A string as text; its line breaks are ours, as in the heading of a column."""
        return super().render_str(printable(text, keep="\n"), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As Console; a text that :func:`plain` has not seen is made plain here."""
        if isinstance(renderable, Text) and not renderable.plain.isprintable():
            renderable = plain(renderable.plain, str(renderable.style))
        return super().render(renderable, options)

    def say(self, text: object, style: str = "") -> None:
        """Print one line, however long."""
        self.print(plain(text, style), soft_wrap=True)


def stdout() -> Screen:
    """The console of the results, wide enough for its tables in a pipe."""
    screen = Screen()
    return screen if screen.is_terminal else Screen(width=PIPE_WIDTH)


def spell_what_is_missing() -> None:
    """Let no stream stumble over a sign that its encoding does not have: it is spelled in tables,
    and an escape in errors, whose names are looked for."""
    codecs.register_error(_ERRORS, _spelled)
    for stream, errors in ((sys.stdout, _ERRORS), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or ascii(c)[1:-1] for c in missing), error.end
