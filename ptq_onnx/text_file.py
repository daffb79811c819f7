"""Text files: read whole, but never an endless one; written so that there is never half a file."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

LARGEST = 64 << 20
"""Bytes of the largest text that is read: names and labels of a million images."""


def read_text(path: str | Path, largest: int | None = None) -> str:
    """The text of a file in UTF-8, with or without its mark.

    Raises OSError, also for what is no regular file (a device, a pipe) or holds more than
    ``largest`` bytes (``LARGEST`` unless given), and UnicodeDecodeError.
    """
    most = LARGEST if largest is None else largest
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / (1 << 20):g} MB")
    return content.decode("utf-8-sig")


def write_text(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: there is never half a file."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
