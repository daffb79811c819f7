"""Temporary folders that lie where their results will, and that no killed run leaves for good.

A process locks its folder for as long as it lives. Whoever makes the next one of the same name
first removes those that nobody holds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ptq_onnx.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
ASIDE = ".old"
"""Ends the name of a folder whose content was the result until another one took its place."""

LONGEST_ABOVE = 30
"""Bytes of the folder above sockets that lie deep."""

_MARK = "ptq-"
_TRIES = 8


@contextmanager
def held_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside ``place``, for this user's eyes alone; gone afterwards.

    Raises OSError where none can be made.
    """
    clear(place)
    folder, lock = _made(place)
    try:
        yield folder
    finally:
        remove(folder)
        unlock(lock)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's temporary one, for what nobody will look at; gone afterwards.

    Raises ConfigError where none can be made.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(held_folder(_scratch()))
        except OSError as error:
            raise ConfigError(
                f"No temporary folder can be made ({error.strerror or error}): set TMPDIR to one"
                " that can be written."
            ) from error
        yield folder


@contextmanager
def socket_folder(name: str) -> Iterator[Path]:
    """A folder for the sockets of other programs, whose paths end at 107 bytes: in the system's
    temporary one, or in /tmp where that has a long name; gone afterwards. Raises OSError."""
    folder = Path(tempfile.gettempdir())
    short = os.name == "nt" or len(os.fsencode(folder)) <= LONGEST_ABOVE
    with held_folder((folder if short else Path("/tmp")) / name) as made:
        yield made


def is_scratch(folder: Path) -> bool:
    """Whether it is one that :func:`scratch_folder` made."""
    place = _scratch()
    return folder.parent == place.parent and folder.name.startswith(f".{place.name}.{_MARK}")


def _scratch() -> Path:
    return Path(tempfile.gettempdir()) / "ptq_onnx"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, that takes the place of ``path`` when it is whole; else nothing changes.

    Raises OSError.
    """
    with held_folder(path) as folder:
        new = folder / "new"
        yield new
        os.replace(new, path)


def clear(place: Path) -> None:
    """Remove the folders beside ``place`` whose process is gone; where one was killed with the old
    results aside and nothing in their place, put those back."""
    for left in sorted(place.parent.glob(f".{_escaped(place.name)}.{_MARK}*")):
        with suppress(OSError):  # another run may be clearing it too
            lock = locked(left) if _own(left) else None
            if lock is None:
                continue
            if left.name.endswith(ASIDE) and not place.exists():
                (left / LOCK).unlink()
                os.replace(left, place)
            else:
                remove(left)
            unlock(lock)


def unfinished(folder: Path) -> list[Path]:
    """The places in ``folder`` beside which there are such folders, held or not."""
    found = folder.glob(f".*.{_MARK}*")
    return sorted({left.with_name(left.name[1:].rpartition(f".{_MARK}")[0]) for left in found})


def hidden(place: Path, end: str = "") -> Path:
    """A new name beside ``place``."""
    return place.with_name(f".{place.name}.{_MARK}{secrets.token_hex(4)}{end}")


def locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where another process has it, or where
    there are no such locks (Windows, where what a killed run leaves is therefore left)."""
    if fcntl is None:
        return None
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(lock: int | None) -> None:
    """Let go of what :func:`locked` gave."""
    if lock is not None:
        os.close(lock)


def remove(folder: Path) -> None:
    """Remove a folder, its lock last, so that a killed removal can be seen and completed."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name == LOCK:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _own(folder: Path) -> bool:
    """True for a folder of this user: in a place that all write to, others plant names."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and (os.name == "nt" or found.st_uid == os.geteuid())


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _made(place: Path) -> tuple[Path, int | None]:
    """A new folder and its lock."""
    for _ in range(_TRIES):
        folder = hidden(place)
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # another run took it for one that a killed run left
            lock = locked(folder)
            if fcntl is None or (lock is not None and (folder / LOCK).exists()):
                return folder, lock
            unlock(lock)
    raise OSError(0, "other runs into the same folder are in the way")
