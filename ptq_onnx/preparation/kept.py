"""A prepared model kept in a folder, for other runs that need the same: they read it.

It is a cache: where it cannot be read the model is prepared anew, which gives the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.files.held_folder import hidden, remove
from ptq_onnx.files.model_size import data_files
from ptq_onnx.files.text_file import read_text
from ptq_onnx.preparation.cleaning import CleanReport
from ptq_onnx.preparation.free_batch import FixedBatch
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.preparation.shared_models import read_shared, write_shared

MODEL, FACTS = "model.onnx", "prepared.json"


@dataclass(frozen=True)
class Preparing:
    """What decides a prepared model, of any batch size where its graph allows that; the arguments
    are those of :func:`prepare`."""

    path: Path
    opset: int
    size: tuple[int, int] | None
    shapes: Mapping[str, tuple[int, ...]]

    def anew(self) -> Prepared:
        """From the model's file. Raises ModelError, ConfigError."""
        return prepare(self.path, self.opset, self.size, free=True, shapes=self.shapes)

    def read(self, folder: Path | None) -> Prepared:
        """From ``folder`` where it is kept there, else anew. Raises ModelError, ConfigError."""
        if folder is None:
            return self.anew()
        try:
            return _read(self, folder / self.word)
        except Exception:  # of those that read it, which share no base; the model's own come again
            return self.anew()

    def keep(self, folder: Path) -> None:
        """Prepare it and write it into ``folder``, in one step; a disk that takes no more keeps
        nothing. Raises ModelError, ConfigError."""
        found, place = self.anew(), folder / self.word
        new = hidden(place)
        try:
            new.mkdir(parents=True)
            write_shared(found.model, new / MODEL)
            (new / FACTS).write_text(json.dumps(_facts(found)), encoding="utf-8")
            os.replace(new, place)
        except OSError:
            with suppress(OSError):
                remove(new)

    @property
    def word(self) -> str:
        """Names it in a folder, for as long as its files are not written again. Raises
        ModelError, OSError."""
        files = [Path(self.path), *data_files(self.path)]
        states = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        parts = [states, self.opset, self.size, sorted(self.shapes.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _facts(found: Prepared) -> dict[str, Any]:
    """What is known of a model besides what its file tells."""
    fixed = found.fixed
    shapes = None if fixed is None else [_dims(shape) for shape in fixed.outputs]
    return {
        "cleaned": asdict(found.cleaned),
        "fusions": found.fusions,
        "fixed": None if fixed is None else {"size": fixed.size, "outputs": shapes},
        "readers": _readers(found.model),
    }


def _readers(model: ir.Model) -> dict[str, list[tuple[int, int]]]:
    """The nodes, by their place, and inputs that read a tensor, in the order in which the graph
    tells them, where that is not the order of the nodes, as when it is read from a file."""
    places = {node: place for place, node in enumerate(model.graph)}
    found = {}
    for value in _values(model):
        order = [(places[use.node], use.idx) for use in value.uses() if use.node in places]
        if order != sorted(order):
            found[str(value.name)] = order
    return found


def _read_in_order(model: ir.Model, readers: Mapping[str, list[list[int]]]) -> None:
    """Let the graph tell the readers of tensors in that order, in place."""
    nodes, values = list(model.graph), {str(value.name): value for value in _values(model)}
    for name, order in readers.items():
        for value in (None, values[name]):
            for place, index in order:
                nodes[place].replace_input_with(index, value)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from dict.fromkeys((*model.graph.inputs, *model.graph.initializers.values()))
    for node in model.graph:
        yield from node.outputs


def _dims(shape: ir.Shape | None) -> list[int | str | None] | None:
    return None if shape is None else [d if isinstance(d, int) else d.value for d in shape]


def _read(what: Preparing, place: Path) -> Prepared:
    facts = json.loads(read_text(place / FACTS))
    cleaned = facts["cleaned"]
    report = CleanReport(**{**cleaned, "notes": tuple(cleaned["notes"])})
    fixed = facts["fixed"]
    if fixed is not None:
        shapes = (None if dims is None else ir.Shape(dims) for dims in fixed["outputs"])
        fixed = FixedBatch(fixed["size"], tuple(shapes))
    model = read_shared(place / MODEL)
    _read_in_order(model, facts["readers"])
    blocks = find_blocks(model)
    sites = find_sites(model, blocks)
    return Prepared(Path(what.path), model, report, facts["fusions"], blocks, sites, fixed)
