"""The float model's outputs, kept for other runs on the same images: they run their own file alone.

A file of NumPy arrays, batch by batch: the images' names, the outputs that turned out not to be
batches, the names of all outputs, each output. It is read as it was written, one batch at a time,
and the outputs are those of the run that wrote it, bit for bit. Several processes write several
files, each of a part of the images, which read one after the other are the same. It is a cache:
where it cannot be read or written, the model is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.files.digest import digest_of
from ptq_onnx.files.held_folder import hidden
from ptq_onnx.files.model_size import data_files
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.runtime.devices import chosen

Found = dict[str, NDArray[Any]]
Batch = tuple[list[str], Found, set[str]]
"""Names of the images, outputs, and which of those are no batches."""

NOTHING: Batch = ([], {}, set())
MOST = 1 << 31
"""Bytes of outputs that are kept: those of 500,000 images with 1,000 classes."""


@dataclass(frozen=True)
class Record:
    """The outputs of one model on the images of one source, or the place for them."""

    path: Path

    @classmethod
    def of(
        cls, folder: Path, model: Path, preprocess: Preprocess, batch_size: int, threads: int
    ) -> Record:
        """The place in ``folder``, which is that of the images, by all else that the bits depend
        on: the model's content, the preprocessing, batch size, threads, device and version of
        ONNX Runtime. Raises ModelError, OSError."""
        content = digest_of(model, *data_files(model))
        ways = [content, asdict(preprocess), batch_size, threads, chosen(), ort.__version__]
        found = hashlib.sha256(json.dumps(ways, default=str).encode()).hexdigest()
        return cls(folder / f"{found[:32]}.npy")

    def batches(self) -> Iterator[Batch]:
        """What was written; ends early where a file does, or is none of these."""
        files = [self.path] if self.exists else sorted(self._folder.glob("*.npy"))
        try:
            for path in files:
                with open(path, "rb") as file:
                    while file.peek(1):
                        yield _read(file)
        except (OSError, ValueError, EOFError):
            return

    def part(self, first: int) -> Record:
        """The place for the outputs on the images from number ``first`` on."""
        return Record(self._folder / f"{first:012}.npy")

    @property
    def _folder(self) -> Path:
        return self.path.with_suffix("")

    @property
    def exists(self) -> bool:
        """Whether there is a file, which is whole then."""
        return self.path.is_file()


class Recorder:
    """Writes a record, batch by batch: a context manager, whose file appears when all went well,
    and not where that would be ``MOST`` bytes or the disk takes no more."""

    def __init__(self, record: Record) -> None:
        self._path, self._new = record.path, hidden(record.path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._new, "wb")
        return self

    def add(self, names: Sequence[str], found: Mapping[str, NDArray[Any]], whole: set[str]) -> None:
        """The next batch."""
        if self._file is None:
            return
        try:
            for array in (_text(names), _text(sorted(whole)), _text(found), *found.values()):
                np.save(self._file, array, allow_pickle=False)
            enough = self._file.tell() > MOST
        except (OSError, ValueError):
            enough = True
        if enough:
            self._close(keep=False)

    def drop(self) -> None:
        """Keep nothing of it."""
        self._close(keep=False)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._close(keep=kind is None)

    def _close(self, *, keep: bool) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):
            file.close()
            if keep:
                os.replace(self._new, self._path)
        with suppress(OSError):
            self._new.unlink(missing_ok=True)


def _text(names: Any) -> NDArray[Any]:
    return np.array(list(names), dtype=np.str_)


def _read(file: IO[bytes]) -> Batch:
    names, whole, outputs = (np.load(file, allow_pickle=False).tolist() for _ in range(3))
    found = {name: np.load(file, allow_pickle=False) for name in outputs}
    return names, found, set(whole)
