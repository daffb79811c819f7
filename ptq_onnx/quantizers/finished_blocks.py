"""What blocks have learned, kept where a run that was stopped is found again by the next.

A block is found by all that it learned from: its graph, numbers, inputs and target. Each is one
file, written beside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.files.held_folder import replacing
from ptq_onnx.quantizers.learning import Learning, Trained

CONSTANT, STEP, TRAINED = "constant:", "step:", "trained"


def fingerprint(
    form: TorchForm,
    streams: Iterable[Mapping[str, list[NDArray[Any]]]],
    settings: Any,
) -> str:
    """A name for all that decides what a block learns."""
    found = hashlib.sha256(repr(settings).encode())
    for node in form.nodes:
        found.update(repr((node.name, node.op_type, [v.name for v in node.outputs])).encode())
    for name, value in form.constants.items():
        found.update(name.encode() + np.ascontiguousarray(value.numpy(force=True)).tobytes())
    for name, scale in form.scales.items():
        found.update(name.encode() + scale.numpy(force=True).tobytes())
        found.update(str(form.specs[name].rule).encode())
    for stream in streams:
        for name, batches in stream.items():
            found.update(name.encode())
            for batch in batches:
                found.update(np.ascontiguousarray(batch).tobytes())
    return found.hexdigest()[:32]


class FinishedBlocks:
    """The blocks in a folder; none where there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, key: str) -> Learning | None:
        """What the block of that name has learned; None where it is not there, or not whole."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{key}.npz") as arrays:
                told = json.loads(str(arrays[TRAINED]))
                constants = _named(arrays, CONSTANT)
                steps = _named(arrays, STEP)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        return Learning(replace(Trained(**told), resumed=True), constants, steps)

    def keep(self, key: str, learning: Learning) -> None:
        """Write a block; where that fails, a stopped run will learn it again."""
        if self.folder is None:
            return
        arrays = {CONSTANT + n: v for n, v in learning.constants.items()}
        arrays |= {STEP + n: v for n, v in learning.steps.items()}
        told = np.array(json.dumps(asdict(learning.trained)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{key}.npz") as new, new.open("wb") as file:
                np.savez(file, **arrays, **{TRAINED: told})  # type: ignore[arg-type]
        except OSError:
            return


def _named(arrays: Mapping[str, NDArray[Any]], start: str) -> dict[str, NDArray[np.float32]]:
    return {n.removeprefix(start): arrays[n] for n in arrays if n.startswith(start)}
