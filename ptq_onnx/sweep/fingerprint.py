"""What a cell's numbers depend on, as one word: a finished cell of the same is not run again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ptq_onnx.files.digest import digest_of
from ptq_onnx.files.model_size import data_files
from ptq_onnx.sweep.matrix import Cell
from ptq_onnx.version import __version__


def fingerprint(cell: Cell) -> str:
    """Of the version, the options, the content of the model and of the labels, and the names and
    sizes of the images. Raises ModelError for a file that is no model, OSError."""
    parts = {
        "version": __version__,
        "config": None if cell.config is None else asdict(cell.config),
        "model": of_model(str(cell.model)),
        "labels": None if cell.labels is None else _of_file(cell.labels),
        "images": [of_images(path) for path in (cell.calib, cell.val)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def forget() -> None:
    """Read files anew."""
    for function in (of_model, _of_file, of_images):
        function.cache_clear()


@cache
def of_model(path: str) -> list[str]:
    """Hashes of a model's file and of those that hold its weights. Raises ModelError, OSError."""
    return [_of_file(str(p)) for p in (Path(path), *data_files(path)) if p.is_file()]


@cache
def _of_file(path: str) -> str:
    return digest_of(path)


@cache
def of_images(path: str | None) -> str | None:
    """Names and sizes below a folder, or of a file; of no path its name."""
    if path is None or not os.path.exists(path):
        return path
    found = hashlib.sha256()
    if os.path.isfile(path):
        return str(os.stat(path).st_size)
    for folder, below, names in os.walk(path, followlinks=True):
        below.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            size = os.stat(file).st_size if os.path.isfile(file) else -1
            found.update(f"{os.path.relpath(file, path)}\0{size}\n".encode("utf-8", "replace"))
    return found.hexdigest()
