"""The part of a network behind a tensor, for runs in which nothing before it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant
from ptq_onnx.calibration.tapped_runs import open_taps, tapped_session

Kept = dict[str, list[dict[str, NDArray[Any]]]]
"""What is read from before each of some tensors: its values by name, batch by batch."""

HELD = 2**28
"""Bytes of these that are kept at once, about; those of one tensor always are."""


@dataclass(frozen=True)
class Suffix:
    """What depends on a tensor, as a model; ``read``: what it takes from before."""

    model: ir.Model
    read: tuple[str, ...]
    rounded: frozenset[str]

    def rounds(self, tensor: str) -> bool:
        """Whether the tensor's numbers are among what this part is given."""
        return tensor in self.rounded


class Suffixes:
    """The parts of a standard model behind some tensors. ``given``: the inputs of the model that
    the numbers of each tensor are, which parts take too."""

    def __init__(self, model: ir.Model, given: Mapping[str, Sequence[str]]) -> None:
        self._model, self._given = model, given
        self._found: dict[str, Suffix | None] = {}

    def of(self, tensor: str) -> Suffix | None:
        """What is behind a tensor, or None where that cannot be run by itself."""
        if tensor not in self._found:
            numbers = frozenset(name for names in self._given.values() for name in names)
            part = part_behind(self._model, tensor, numbers)
            self._found[tensor] = None if part is None else self._suffix(part)
        return self._found[tensor]

    def _suffix(self, part: ir.Model) -> Suffix:
        names = {str(v.name) for v in part.graph.inputs if not v.is_initializer()}
        rounded = frozenset(t for t, numbers in self._given.items() if names.issuperset(numbers))
        numbers = {name for tensor in rounded for name in self._given[tensor]}
        return Suffix(part, tuple(sorted(names - numbers)), rounded)

    def kept(
        self, tensors: Sequence[str], batches: Iterable[Mapping[str, NDArray[Any]]], threads: int
    ) -> Kept:
        """What is read from before the tensors, in one run of the ``batches`` of all inputs of the
        model: of as many of the last tensors as ``HELD`` bytes hold."""
        parts = {tensor: self.of(tensor) for tensor in tensors}
        read = {tensor: part.read for tensor, part in parts.items() if part is not None}
        every = dict.fromkeys(name for names in read.values() for name in names)
        session, *_ = open_taps(self._model.clone(), every, threads)
        batches = list(batches)
        found: Kept = {tensor: [] for tensor in read}
        for batch in batches:
            wanted = list(dict.fromkeys(name for tensor in found for name in read[tensor]))
            values = dict(zip(wanted, session.run(wanted, dict(batch)), strict=True))
            size = sum(v.nbytes for v in values.values()) * len(batches) / len(found)
            most = max(int(HELD / max(size, 1)), 1)
            found = {tensor: found[tensor] for tensor in list(found)[-most:]}
            for tensor, kept in found.items():
                kept.append({name: values[name] for name in read[tensor]})
        return found


def open_suffix(suffix: Suffix, threads: int) -> ort.InferenceSession:
    """A session of it."""
    return tapped_session(suffix.model, threads)


def part_behind(model: ir.Model, tensor: str, given: frozenset[str]) -> ir.Model | None:
    """What depends on ``tensor``, as a model that reads the tensor, what else it takes from before
    it, and inputs of the model among ``given``.

    None where that cannot be run by itself: an output does not depend on the tensor or is among
    what is taken from before, or something behind it reads another input of the model or has a
    graph of its own. The model stays as it is.
    """
    copy = model.clone()
    graph = copy.graph
    values = {str(v.name): v for node in graph for v in node.outputs}
    if tensor not in values:
        return None
    start = values[tensor]
    inside, kept, before = {start}, set[ir.Node](), {start}
    for node in graph:
        if inside.isdisjoint(node.inputs):
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
               for a in node.attributes.values()):  # fmt: skip
            return None
        kept.add(node)
        inside.update(node.outputs)
        before.update(v for v in node.inputs if v is not None and not _from_elsewhere(v, given))
    before -= inside - {start}
    read_elsewhere = any(v.producer() is None or v.is_graph_output() for v in before)
    if read_elsewhere or not inside.issuperset(graph.outputs):
        return None
    return _cut(copy, kept, start, before, given)


def _from_elsewhere(value: ir.Value, given: frozenset[str]) -> bool:
    """Whether it is a constant, or an input that runs are given."""
    return is_constant(value) or value.name in given


def _cut(
    model: ir.Model,
    kept: set[ir.Node],
    start: ir.Value,
    before: set[ir.Value],
    given: frozenset[str],
) -> ir.Model:
    """The model of the nodes ``kept``, changed in place, with the values ``before`` as inputs."""
    graph = model.graph
    inputs = []
    for old in sorted(before, key=lambda v: (v is not start, str(v.name))):
        new = ir.Value(name=old.name, shape=old.shape, type=old.type)
        old.name = f"{old.name}_before"
        old.replace_all_uses_with(new)
        inputs.append(new)
    for node in reversed(list(graph)):
        if node not in kept and node.op_type != "Constant":
            graph.remove(node, safe=True)
    graph.inputs[:] = inputs + [v for v in graph.inputs if v.name in given and v.uses()]
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        del graph.initializers[name]
    return model
