"""Whether files that are compared belong together: one float model, one preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.parity import powers
from ptq_onnx.files.output_paths import find_output
from ptq_onnx.files.result_names import FLOAT
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess
from ptq_onnx.images.source import ImageSource

FEW = 4
"""Images that tell two models apart."""
APART = 0.05
"""Relative difference beyond which float files are different models; targets rewrite one a little,
and half floats move it by less than a hundredth."""


def check_same_model(
    base: Path, paths: Sequence[str | Path], names: Sequence[str], images: ImageSource, threads: int
) -> None:
    """Refuse a folder whose own float model is another one than ``base``. Raises ConfigError."""
    pairs = zip(names, paths, strict=True)
    beside = [(name, find_output(path).beside(FLOAT)) for name, path in pairs]
    others = [(name, file) for name, file in beside if file is not None and not file.samefile(base)]
    if not others:
        return
    batch = next(iter(images.batches(FEW)))
    wanted = Network(base, threads)(batch)
    for name, file in others:
        found = Network(file, threads)(batch)
        if found.keys() != wanted.keys() or _difference(wanted, found) > APART:
            raise ConfigError(
                f"{name} was made from another float model than {base}: its {FLOAT} gives other"
                " outputs. Compare files of one model."
            )


def preprocess_notes(
    files: Sequence[Path], names: Sequence[str], used: Preprocess
) -> tuple[str, ...]:
    """Which preprocessing is in force, and which files were made with another one."""
    notes = [f"Preprocessing: {used.described}."]
    for name, file in zip(names, files, strict=True):
        own = stored_preprocess(file)
        if own is not None and (own.mean, own.std) != (used.mean, used.std):
            notes.append(
                f"{name} was made with another preprocessing: {own.described}. Its figures here"
                " are not those of its own run."
            )
    return tuple(notes)


def stored_preprocess(file: Path) -> Preprocess | None:
    """The preprocessing that a file carries in its metadata."""
    proto = onnx.load_model(file, load_external_data=False)
    text = next((p.value for p in proto.metadata_props if p.key == METADATA_KEY), None)
    try:
        return None if text is None else Preprocess.from_json(text)
    except ConfigError:
        return None


def _difference(wanted: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> float:
    """The largest √(Σ(a - b)²/Σa²) of the float outputs; infinite for another shape."""
    floats = [name for name, value in wanted.items() if value.dtype.kind == "f"]
    pairs = [powers(wanted[name], found[name]) for name in floats]
    return max((np.sqrt(noise / signal) for noise, signal in pairs if signal), default=0.0)
