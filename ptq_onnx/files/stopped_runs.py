"""A hidden folder beside the output, where a run that is stopped leaves what the next takes up."""

from __future__ import annotations

import shutil
from pathlib import Path

END = "unfinished"


def left_by_stopped(output: Path) -> Path:
    """The folder beside ``output``, whether it is there or not."""
    place = output.resolve()
    return place.with_name(f".{place.name}.{END}")


def forget_stopped(output: Path) -> None:
    """Remove it, the results being there."""
    shutil.rmtree(left_by_stopped(output), ignore_errors=True)
