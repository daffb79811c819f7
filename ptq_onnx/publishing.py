"""A folder of results appears all at once, in place of the one before.

The files are made in a hidden folder beside the output, which then takes the output's place in one
step: the kernel exchanges the two names (Linux, macOS), or else the old folder goes aside and the
new one in, which the next run completes or takes back if the process is killed in between. So a
reader sees the old results or the new ones. What lies in the folder and is not of this package
(no manifest names it) moves along by hard links.

The hidden folder is locked as long as its process lives; the next run into the same folder removes
those that nobody holds.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptq_onnx.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = ".ptq_onnx.json"
"""Lists the files that a run has written into its folder."""

BEFORE_MANIFESTS = frozenset(
    (
        *("quantized.onnx", "quantized.onnx.data", "fused.onnx", "fused.onnx.data"),
        *("formed.onnx", "formed.onnx.data"),
        *("config.yaml", "report.json", "report.html"),
    )
)
"""What is ours in a folder that has no manifest, beside the pictures in ``attention``."""

LOCK = ".lock"
ASIDE = ".old"
_MARK = "ptq-"
_TRIES = 8


@contextmanager
def workshop(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` to make the results in; gone afterwards.

    Removes what killed runs have left there. Raises ConfigError where nothing can be written.
    """
    place = output.resolve()
    if place.exists() and not place.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder.")
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear(place)
        work, lock = _made(place)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}.") from error
    try:
        yield work
    finally:
        _remove(work)
        _unlock(lock)
        _remove_empty(made)


def publish(work: Path, output: Path) -> tuple[Path, ...]:
    """Let the finished folder ``work`` take the place of ``output``; returns the files' paths.

    ``work`` then holds what was there before, for :func:`workshop` to remove.
    """
    place = output.resolve()
    names = sorted(name for name in _files(work) if name != Path(LOCK))
    manifest = json.dumps({"files": [name.as_posix() for name in names]}, indent=1)
    (work / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    if not place.exists():
        work.chmod(0o777 & ~_mask())
        os.replace(work, place)
    elif _in_use(place):
        _file_by_file(work, place, names)
    else:
        _keep_foreign(work, place)
        shutil.copymode(place, work)
        _exchange(work, place)
    with suppress(OSError):
        (place / LOCK).unlink()
    return tuple(output / name for name in names)


def clear(place: Path) -> None:
    """Remove the hidden folders of runs into ``place`` whose process is gone; where one was killed
    with the old results aside and nothing in their place, put those back."""
    for left in sorted(place.parent.glob(f".{_escaped(place.name)}.{_MARK}*")):
        with suppress(OSError):  # another run may be clearing it too
            lock = _locked(left)
            if lock is None:
                continue
            if left.name.endswith(ASIDE) and not place.exists():
                (left / LOCK).unlink()
                os.replace(left, place)
            else:
                _remove(left)
            _unlock(lock)


def ours(folder: Path) -> set[Path]:
    """The files in ``folder`` that a run of this package has written, by its manifest."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {Path(name) for name in listed} | {Path(MANIFEST), Path(LOCK)}
    except (OSError, ValueError, KeyError, TypeError):
        pictures = {name for name in _files(folder) if name.parts[0] == "attention"}
        pictures = {name for name in pictures if name.suffix == ".png" and len(name.parts) == 2}
        return {Path(name) for name in BEFORE_MANIFESTS} | pictures | {Path(MANIFEST), Path(LOCK)}


def _hidden(place: Path, end: str = "") -> Path:
    return place.with_name(f".{place.name}.{_MARK}{secrets.token_hex(4)}{end}")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _files(folder: Path) -> Iterator[Path]:
    return (p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def _made(place: Path) -> tuple[Path, int | None]:
    """A new hidden folder and its lock."""
    for _ in range(_TRIES):
        work = _hidden(place)
        work.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # another run took it for one that a killed run left
            lock = _locked(work)
            if fcntl is None or (lock is not None and (work / LOCK).exists()):
                return work, lock
            _unlock(lock)
    raise OSError(0, "other runs into the same folder are in the way")


def _locked(folder: Path) -> int | None:
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


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a hidden folder, its lock last, so that a killed removal can be seen and completed."""
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


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, that nothing was put into."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _mask() -> int:
    """The user's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _in_use(place: Path) -> bool:
    """True where the folder must keep its identity: a mount, or where somebody stands in it."""
    return place.is_mount() or Path.cwd().is_relative_to(place)


def _keep_foreign(work: Path, place: Path) -> None:
    """Put what is not ours in ``place`` into ``work`` too, under the names that are free there."""
    mine = ours(place)
    for name in _files(place):
        if name in mine or (work / name).exists():
            continue
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(place / name, work / name, follow_symlinks=False)
        except OSError:
            shutil.copy2(place / name, work / name, follow_symlinks=False)
    for folder in (p for p in place.rglob("*") if p.is_dir() and not any(p.iterdir())):
        (work / folder.relative_to(place)).mkdir(parents=True, exist_ok=True)


def _exchange(work: Path, place: Path) -> None:
    """Swap two folders, at once where the system can."""
    lock = _locked(place)
    try:
        if not _exchanged(work, place):
            old = _hidden(place, ASIDE)
            os.replace(place, old)
            os.replace(work, place)
            _remove(old)
    finally:
        _unlock(lock)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names by the system call for it; False where there is none."""
    here = -2 if sys.platform == "darwin" else -100  # AT_FDCWD
    swap = 2  # RENAME_EXCHANGE, and macOS's RENAME_SWAP
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    try:
        call = getattr(ctypes.CDLL(None), name) if name else None
    except (AttributeError, OSError, TypeError):
        return False
    if call is None:
        return False
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def _file_by_file(work: Path, place: Path, names: list[Path]) -> None:
    """Replace our files one by one, where the folder itself cannot be; the old ones go first."""
    for name in ours(place) - {*names, Path(LOCK)}:
        with suppress(OSError):
            (place / name).unlink()
    for name in [*names, Path(MANIFEST)]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, place / name)
