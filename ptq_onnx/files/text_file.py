"""Text files: read whole, but never an endless one; written so that there is never half a file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ptq_onnx.files.held_folder import replacing

LARGEST = 64 << 20
"""Bytes of the largest text that is read: names and labels of a million images."""


def read_text(path: str | Path, largest: int | None = None) -> str:
    """The text of a file in UTF-8, with or without its mark.

    Raises OSError, also for what is no regular file (a device, a pipe) or holds more than
    ``largest`` bytes (``LARGEST`` unless given), and UnicodeDecodeError.
    """
    most = LARGEST if largest is None else largest
    with open(path, "rb", opener=_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / (1 << 20):g} MB")
    return content.decode("utf-8-sig")


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of what may be a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_text(path: Path, text: str) -> None:
    """Write a file that takes the place of ``path`` when it is whole. Raises OSError."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
