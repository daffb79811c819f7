"""What was read from a file stays known for as long as nobody writes that file."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
FILES = 8
"""How many files are remembered: those read last."""


def kept_while_unchanged(read: Callable[[Path], T]) -> Callable[[str | Path], T]:
    """``read``, which opens a file a second time only where its inode, size or times are others.
    What it gives is the same object each time, and not to be changed; errors are not kept."""

    @lru_cache(FILES)
    def known(path: Path, state: tuple[int, ...]) -> T:
        return read(path)

    @wraps(read)
    def found(path: str | Path) -> T:
        path = Path(path)
        try:
            now = path.stat()
        except OSError:
            return read(path)  # which says what is wrong
        state = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
        return known(path, state)

    return found
