"""A folder of results appears all at once, in place of the one before.

The files are made in a hidden folder beside the output, which then takes the output's place in one
step: the kernel exchanges the two names (Linux, macOS), or else the old folder goes aside and the
new one in, which the next run completes or takes back if the process is killed in between. So a
reader sees the old results or the new ones. What lies in the folder and is not of this package
(no manifest names it) moves along by hard links.

What a killed run leaves, the next run into the same folder removes (see ``held_folder.py``).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ptq_onnx.errors import ConfigError
from ptq_onnx.files.held_folder import ASIDE, LOCK, held_folder, hidden, locked, remove, unlock
from ptq_onnx.files.result_names import CONFIG, FLOAT, FORMED, PAGE, PICTURES, QUANTIZED, REPORT
from ptq_onnx.files.text_file import read_text

MANIFEST = ".ptq_onnx.json"
"""Lists the files that a run has written into its folder."""

BEFORE_MANIFESTS = frozenset(
    (
        *(QUANTIZED, FLOAT, FORMED, CONFIG, REPORT, PAGE),
        *(f"{model}.data" for model in (QUANTIZED, FLOAT, FORMED)),
    )
)
"""What is ours in a folder that has no manifest, beside the pictures in ``attention``."""


@contextmanager
def workshop(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` to make the results in; gone afterwards.

    Removes what killed runs have left there. Raises ConfigError where nothing can be written.
    """
    place = output.resolve()
    if place.exists() and not place.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder.")
    with ExitStack() as stack:
        try:
            stack.enter_context(parents_of(place))
            work = stack.enter_context(held_folder(place))
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}.") from error
        yield work


@contextmanager
def parents_of(place: Path) -> Iterator[None]:
    """The folders above ``place`` exist; those that were made for it go if nothing came of it.
    Raises OSError."""
    made = [folder for folder in place.resolve().parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        _remove_empty(made)


@contextmanager
def added_to(output: Path) -> Iterator[Path]:
    """A hidden folder for files that then move into the folder ``output``, beside what is there:
    all are written before the first moves. Raises ConfigError where nothing can be written."""
    with workshop(output) as work:
        yield work
        output.mkdir(exist_ok=True)
        for name in _files(work):
            if name != Path(LOCK):
                os.replace(work / name, output / name)


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


def ours(folder: Path) -> set[Path]:
    """The files in ``folder`` that a run of this package has written, by its manifest."""
    try:
        listed = json.loads(read_text(folder / MANIFEST))["files"]
        return {Path(name) for name in listed} | {Path(MANIFEST), Path(LOCK)}
    except (OSError, ValueError, KeyError, TypeError):
        pictures = {name for name in _files(folder) if name.parts[0] == PICTURES}
        pictures = {name for name in pictures if name.suffix == ".png" and len(name.parts) == 2}
        return {Path(name) for name in BEFORE_MANIFESTS} | pictures | {Path(MANIFEST), Path(LOCK)}


def _files(folder: Path) -> Iterator[Path]:
    return (p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


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
    lock = locked(place)
    try:
        if not _exchanged(work, place):
            old = hidden(place, ASIDE)
            os.replace(place, old)
            os.replace(work, place)
            remove(old)
    finally:
        unlock(lock)


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
