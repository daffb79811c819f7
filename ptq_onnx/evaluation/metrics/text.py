"""Text that a model reads: CTC, or a sequence of tokens, against strings or the float model's.

White space at the ends of a string does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError, one_line
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running, by_image
from ptq_onnx.evaluation.outputs import percent
from ptq_onnx.files.text_file import read_text

Reading = list[int] | str
MOST_CHARACTERS = 1 << 22
"""Bytes of a dictionary."""


@dataclass
class Text(Metric):
    """The share of strings that are right to the last character, and edits: the edit distance over
    all characters of the truth."""

    name: ClassVar[str] = "text"
    figure: ClassVar[str] = "exact"
    takes: ClassVar[dict[str, str]] = {
        "output": "scores [batch, steps, characters], or tokens [batch, steps]",
        "decode": "ctc (repeated characters are one, blanks none) or sequence (up to its end)",
        "blank": "ctc: the blank's number (0)",
        "end": "sequence: the number that ends it (2)",
        "start": "sequence: the number that begins it and is left out (none)",
        "dictionary": "file of a character or token a line, the first being number 1 for ctc, else"
        " 0; by default the model's own (metadata 'character'), else numbers are compared",
    }
    stored: str | None = None
    """The dictionary in the model's metadata."""

    def begin(self) -> Running:
        """Counts at nothing."""
        self.word("decode", ("ctc", "sequence"))
        return _Strings(self)

    @cached_property
    def characters(self) -> list[str] | None:
        """By number, the blank included; None where there is no dictionary."""
        path, ctc = self.options.get("dictionary"), self.options.get("decode", "ctc") == "ctc"
        if path is not None:
            try:
                lines = read_text(Path(path), MOST_CHARACTERS).split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"--metric-option dictionary={path} cannot be read: {one_line(error)}."
                ) from error
            lines = [line.rstrip("\r") for line in lines]
        elif self.stored is not None:
            lines = self.stored.split("\n")
        else:
            return None
        while lines and not lines[-1]:
            lines.pop()
        if ctc:
            lines.insert(self.whole("blank", 0), "")
        return lines

    def read(self, names: Sequence[str], outputs: Outputs) -> list[Reading]:
        """What stands in each image."""
        fits = {
            n: (v.ndim == 3 and v.dtype.kind == "f") or (v.ndim == 2 and v.dtype.kind in "iu")
            for n, v in outputs.items()
        }
        what = "scores [batch, steps, characters] or tokens [batch, steps]"
        found = by_image(self, names, self.output(outputs, "output", fits, what))
        steps = found if found.ndim == 2 else found.argmax(axis=-1)
        width = 0 if found.ndim == 2 else found.shape[-1]
        if self.options.get("decode", "ctc") == "ctc":
            blank = self.whole("blank", 0)
            tokens = [row[kept(row, blank)].tolist() for row in steps]
        else:
            end, start = self.whole("end", 2), self.options.get("start")
            tokens = [row[: _until(row, end)].tolist() for row in steps]
            if start is not None:
                tokens = [[t for t in row if t != self.whole("start", 0)] for row in tokens]
        return [self._spelled(row, width) for row in tokens]

    def _spelled(self, tokens: list[int], width: int) -> Reading:
        known = self.characters
        if known is None:
            if self.targets is not None:
                raise ConfigError(
                    "--metric text with --targets: strings need --metric-option dictionary=FILE;"
                    " the model's metadata have none."
                )
            return tokens
        if width == len(known) + 1:  # a space is the last one, and in no list
            known = [*known, " "]
        if tokens and max(tokens) >= len(known):
            raise ConfigError(
                f"--metric text: the model writes number {max(tokens)}, and its dictionary has"
                f" {len(known)} entries, the blank included."
            )
        return "".join(known[t] for t in tokens).strip()  # what ends in blank paper


class _Strings(Running):
    """Edits, and strings without any."""

    def __init__(self, metric: Text) -> None:
        self.metric, self.exact, self.edits, self.length = metric, 0, 0, 0

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Compare a batch."""
        found, targets = self.metric.read(names, outputs), self.metric.targets
        truth: list[Reading]
        if targets is not None:
            truth = [targets.text(name).strip() for name in names]
        elif reference is not None:
            truth = self.metric.read(names, reference)
        else:
            raise ImageError("--metric text needs --targets or a reference.")
        for one, other in zip(truth, found, strict=True):
            distance = edit_distance(one, other)
            self.edits, self.length = self.edits + distance, self.length + len(one)
            self.exact += distance == 0
        self.count += len(names)

    def figures(self) -> dict[str, float]:
        """Percentages; edits may be above 100."""
        return {
            "exact": percent(self.exact, self.count),
            "edits": percent(self.edits, self.length) if self.length else 100.0 * bool(self.edits),
        }


def kept(row: NDArray[np.int64], blank: int) -> NDArray[np.bool_]:
    """CTC's greedy reading [T]: the first of equals in a row, but no blank (Graves et al.,
    2006)."""
    new = np.ones(len(row), bool)
    new[1:] = row[1:] != row[:-1]
    return np.asarray(new & (row != blank))


def _until(row: NDArray[np.int64], end: int) -> int:
    places = np.flatnonzero(row == end)
    return int(places[0]) if len(places) else len(row)


def edit_distance(one: Reading, other: Reading) -> int:
    """Insertions, deletions and exchanges that make one the other (Levenshtein)."""
    before = np.arange(len(other) + 1)
    places = np.arange(len(other) + 1)
    for index, character in enumerate(one):
        cost = np.array([character != c for c in other], np.int64)
        best = np.empty_like(before)
        best[0] = index + 1
        best[1:] = np.minimum(before[1:] + 1, before[:-1] + cost)
        before = np.minimum.accumulate(best - places) + places  # insertions, one after the other
    return int(before[-1])
