"""What drawings are made of: text, lines, and the frame with what a screen reader says."""

from __future__ import annotations

from ptq_onnx.files.file_names import in_html

LEFT, RIGHT, TOP, BOTTOM = 58, 8, 10, 36
"""Margins of a drawing with axes."""


def drawing(body: str, width: float, height: float, title: str, description: str) -> str:
    """The drawing, with what a screen reader says of it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" font-size="11" fill="currentColor">'
        f"<title>{in_html(title)}</title><desc>{in_html(description)}</desc>{body}</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{in_html(words)}</text>'


def upright(label: str, middle: float, x: float = 11) -> str:
    """The label of a vertical axis."""
    return text(x, middle, label, extra=f' transform="rotate(-90 {x} {middle:.1f})"')


def line(x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    """A line in the colour of axes."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="axis"{style}/>'
