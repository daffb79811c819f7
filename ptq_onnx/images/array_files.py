"""Arrays of images in ``.npy`` and ``.npz`` files, whatever those claim to hold.

The header says what to expect and is believed only as far as the file bears it out: a ``.npy`` file
is mapped, a ``.npz`` file read as a stream. Of that, the images that are asked for are kept in a
temporary file without a name, unless they are too many: then every pass unpacks it anew. So memory
holds an image or two and the disk ``KEPT`` bytes at most, however much an archive unpacks to.
"""

from __future__ import annotations

import lzma
import math
import os
import stat
import struct
import tempfile
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError, one_line

Array = NDArray[Any]

KEPT = 256 << 20
"""Bytes of unpacked images that are kept for the next pass."""
CHUNK = 1 << 20
LONGEST_SIDE = 1 << 31
KEYS = ("images", "input", "x", "arr_0")
"""Names in a ``.npz`` file that are taken for the images."""

UNREADABLE = (
    OSError, ValueError, EOFError, LookupError, RuntimeError, OverflowError, MemoryError,
    SyntaxError, struct.error, tokenize.TokenError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile and numpy raise on files that are damaged, cut short, forged or encrypted."""


@dataclass(frozen=True)
class Header:
    """What a ``.npy`` file says of its array; a single image counts as one of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]


@contextmanager
def told(where: str) -> Iterator[None]:
    """Whatever is wrong with a file as an ImageError that names it."""
    try:
        yield
    except UNREADABLE as error:
        reason = one_line(error)
        raise ImageError(f"{where} cannot be read: {reason[:200]}.") from None


def is_archive(path: Path, where: str) -> bool:
    """True for a ``.npz`` file, by content. Raises ImageError for what is no regular file."""
    with told(where):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            start = file.read(8)
    return not start.startswith(npy.MAGIC_PREFIX)


def mapped(path: Path, where: str, *, plain: bool = False) -> Callable[[], Array]:
    """A function that maps the ``.npy`` file at ``path`` into memory; ``plain``: whatever its rank,
    as it is. Raises ImageError."""
    with told(where), path.open("rb") as file:
        header, offset = _header(file, plain=plain), file.tell()
        if os.fstat(file.fileno()).st_size < offset + header.nbytes:
            raise EOFError("it is cut short")

    def load() -> Array:
        if header.nbytes == 0:
            return np.empty(header.shape, header.dtype)
        with told(where):
            whole: Array = np.memmap(
                path, header.dtype, "r", offset, header.shape, "F" if header.fortran else "C"
            )
            return whole

    return load


def arrays_in(path: Path, where: str, largest: int) -> dict[str, Array]:
    """The arrays of a ``.npz`` file by name, of ``largest`` bytes together at most; that of a
    ``.npy`` file, mapped, without a name. Raises ImageError."""
    if not is_archive(path, where):
        return {"": mapped(path, where, plain=True)()}
    found: dict[str, Array] = {}
    left = largest
    with told(where), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                header = _header(file, plain=True)
                left -= header.nbytes
                if left < 0:
                    raise ValueError(f"it unpacks to more than {largest >> 20} MB")
                flat = np.frombuffer(_exactly(file, header.nbytes), header.dtype)
                name = member.filename.removesuffix(".npy")
                turned = header.shape[::-1] if header.fortran else header.shape
                array = flat.reshape(turned)
                found[name] = array.T if header.fortran else array
    return found


class Packed:
    """The array of images in a ``.npz`` file, read from front to back. Raises ImageError."""

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where
        with told(where), self._open() as (_, header):
            self.header = header

    def images(self, chosen: Sequence[int]) -> Iterator[Array]:
        """Those images, by ascending index; behind the last the rest is read, for its checksum."""
        shape, dtype = self.header.shape[1:], self.header.dtype
        size, at = math.prod(shape) * dtype.itemsize, 0
        with told(self.where), self._open() as (file, _):
            for index in chosen:
                _pass(file, (index - at) * size)
                pixels = np.frombuffer(_exactly(file, size), dtype).reshape(shape)
                at = index + 1
                yield pixels
            _pass(file, (len(self.header) - at) * size)
            if file.read(1):
                raise ValueError("it holds more than its array")

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], Header]]:
        with (
            zipfile.ZipFile(self.path) as archive,
            archive.open(self._member(archive)) as file,
        ):
            header = _header(file)
            if header.fortran and header.nbytes:
                raise ValueError(
                    "its array is stored column by column (Fortran order): save a copy made by"
                    " np.ascontiguousarray"
                )
            yield file, header

    def _member(self, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        key = next((key for key in KEYS if key in members), None)
        if key is None and len(members) != 1:
            found = ", ".join(sorted(members)) or "none"
            raise ImageError(
                f"{self.where}: expected one array, or one called {', '.join(KEYS)};"
                f" found {found[:200]}."
            )
        return members[key or next(iter(members))]


def spooled(images: Iterable[Array]) -> IO[bytes]:
    """The bytes of images one after the other, in a temporary file that has no name: nothing is
    left of it when the process ends, however it does. Raises ImageError where it has no room."""
    try:
        file = tempfile.TemporaryFile(prefix="ptq_onnx-")  # noqa: SIM115
        for image in images:
            file.write(image.tobytes())
        file.flush()
    except OSError as error:
        raise ImageError(
            f"Images cannot be kept in '{tempfile.gettempdir()}' ({error.strerror}): set TMPDIR to"
            " a folder with more space."
        ) from None
    return file


class Kept:
    """Some images of an archive in a temporary file, by their index in the archive.

    The file has no name, so that nothing is left of it whatever becomes of the process.
    """

    def __init__(self, packed: Packed, chosen: Sequence[int]) -> None:
        self.shape, self.dtype, self.ndim = packed.header.shape, packed.header.dtype, 4
        self._place = {index: place for place, index in enumerate(chosen)}
        self._size = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._lock = threading.Lock()
        self._file = spooled(packed.images(chosen))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Array:
        with self._lock:
            self._file.seek(self._place[index] * self._size)
            content = self._file.read(self._size)
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


def _header(file: IO[bytes], *, plain: bool = False) -> Header:
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"its format has the version {version}, 1.0 or 2.0 was expected")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if not all(0 <= side < LONGEST_SIDE for side in shape):
        raise ValueError(f"it claims the shape {list(shape)!r:.60}")
    sides = tuple(int(side) for side in shape)
    alone = len(sides) == 3 and not plain
    return Header((1, *sides) if alone else sides, dtype, fortran)


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise EOFError("it is cut short")
    return content


def _pass(file: IO[bytes], count: int) -> None:
    """Read on without keeping anything."""
    while count > 0:
        count -= len(_exactly(file, min(count, CHUNK)))
