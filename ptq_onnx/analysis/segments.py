"""Cuts a fused graph where a single tensor holds all that the rest needs.

In a transformer these are the residual adds. A run in which only one op changes starts at
the segment that holds the op, from stored activations, and ends in a float (or quantized)
session that all such runs share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import consumers, is_constant, is_layout
from ptq_onnx.evaluation.network import open_with_fp8
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.runtime.sessions import share_arena

Array = NDArray[np.float32]
Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Segment:
    """Nodes ``start`` to ``stop`` (exclusive) of the graph, between two tensors."""

    start: int
    stop: int
    input: str
    output: str


def find_segments(model: ir.Model, *outputs: str, features: str | None = None) -> list[Segment]:
    """The graph from the image to the last of ``outputs``, cut wherever one tensor alone is alive
    that an elementwise add makes or several ops read. An output lives to the end; from where
    ``features`` are made on there is no cut."""
    nodes = list(model.graph)
    place = {node: index for index, node in enumerate(nodes)}
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    last_use: dict[ir.Value, int] = {}
    for value in [*inputs, *(v for node in nodes for v in node.outputs)]:
        if not is_constant(value):
            uses = [place[node] for node, _ in consumers(value) if node in place]
            last_use[value] = max(uses, default=-1)
    made = {v.name: i for i, node in enumerate(nodes) for v in node.outputs}
    end = max(made[output] for output in outputs)
    last_use |= {v: len(nodes) for v in last_use if v.name in outputs}
    segments: list[Segment] = []
    alive = set(inputs)
    start, before = 0, str(inputs[0].name)
    for index, node in enumerate(nodes[: end + 1]):
        alive.update(v for v in node.outputs if not is_constant(v))
        alive = {v for v in alive if last_use[v] > index}
        if index == end:
            segments.append(Segment(start, index + 1, before, str(nodes[end].outputs[0].name)))
        elif (
            len(alive) == 1
            and _is_cut(value := next(iter(alive)), node)
            and value.name not in outputs
            and index < made.get(features, end)
        ):
            segments.append(Segment(start, index + 1, before, str(value.name)))
            start, before = index + 1, str(value.name)
    return segments


def _is_cut(value: ir.Value, node: ir.Node) -> bool:
    if value.producer() is not node or is_layout(node):
        return False
    joins = node.op_type == "Add" and not any(is_constant(v) for v in node.inputs)
    return joins or len(value.uses()) > 1


@dataclass(frozen=True)
class Passed:
    """What a run of segments gives: ``value``, the output of the last of them [N, …]; behind the
    graph's last one all outputs too, and the features where these were asked for."""

    value: Array
    outputs: tuple[Array, ...] = ()
    features: Array | None = None


class Segments:
    """ONNX Runtime sessions of runs of segments, lowered with any set of specs.

    Runs may be made from several threads; each of them takes one.
    ``keep`` sessions stay open, those used last; memory is that of the weights in them.
    ``features``: a tensor of the last segment that runs to the end give beside the outputs.
    ``rounded``: the same graph with weights rounded and biases corrected; a product has those
    of its constants where a run quantizes its weight, and ``model``'s where it does not.
    """

    def __init__(
        self,
        model: ir.Model,
        output: str | Sequence[str],
        threads: int = 1,
        keep: int = 3,
        features: str | None = None,
        rounded: ir.Model | None = None,
    ) -> None:
        self._model = model
        self._features = features
        self._outputs = (output,) if isinstance(output, str) else tuple(output)
        self.parts = find_segments(model, *self._outputs, features=features)
        self._threads, self._keep = threads, keep
        self._changed = {} if rounded is None else changed_constants(model, rounded)
        self._open: OrderedDict[tuple[int, int, str], ort.InferenceSession] = OrderedDict()
        self._cut: dict[tuple[int, int], ir.Model] = {}
        self._lock, self._cutting = Lock(), Lock()

    def places(self) -> dict[str, int]:
        """The segment that makes each tensor; of a constant, the first that reads it."""
        found = {str(v.name): 0 for v in self._model.graph.inputs if not v.is_initializer()}
        nodes = list(self._model.graph)
        for number, part in enumerate(self.parts):
            for node in nodes[part.start : part.stop]:
                for value in (*node.outputs, *node.inputs):
                    if value is not None and (value.producer() is node or is_constant(value)):
                        found.setdefault(str(value.name), number)
        return found

    def run(
        self, value: Array, first: int, last: int, specs: Specs, batch: int, name: str = ""
    ) -> Passed:
        """What segment ``last`` makes of the input of segment ``first`` [N, …].

        The tensors in ``specs`` are quantized on the way. ``name``: keep the session open under
        this name; a name stands for one set of specs.
        """
        where = first, last, specs
        session = self._kept(*where, name) if name else self._build(*where)
        feed = session.get_inputs()[0].name
        parts = [
            session.run(None, {feed: np.ascontiguousarray(value[i : i + batch])})
            for i in range(0, len(value), batch)
        ]
        whole = [np.concatenate([p[i] for p in parts]) for i in range(len(parts[0]))]
        if last < len(self.parts) - 1:
            return Passed(whole[0])
        ends, rest = whole[: len(self._outputs)], whole[len(self._outputs) :]
        return Passed(whole[0], tuple(ends), rest[0] if rest else None)

    def _kept(self, first: int, last: int, specs: Specs, name: str) -> ort.InferenceSession:
        """The session of that name, opened by one thread while the others wait for it."""
        key = (first, last, name)
        with self._lock:
            if key not in self._open:
                self._open[key] = self._build(first, last, specs)
            self._open.move_to_end(key)
            while len(self._open) > self._keep:
                self._open.popitem(last=False)
            return self._open[key]

    def _build(self, first: int, last: int, specs: Specs) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        share_arena(options)
        model = self._rounded(self.model_of(first, last), specs)
        data = graphs.serialize_own(lower(model, specs_within(self, specs, first)))
        return open_with_fp8(data, options, ["CPUExecutionProvider"])

    def _rounded(self, model: ir.Model, specs: Specs) -> ir.Model:
        """The model, in which products whose weight is quantized have their rounded weight and
        corrected bias."""
        names = set()
        for node in model.graph if self._changed else ():
            read = [str(v.name) for v in node.inputs[1:] if v is not None]
            if read and read[0] in specs:
                names |= self._changed.keys() & read
        if names:
            model = model.clone()
            for name in names:
                model.graph.initializers[name].const_value = self._changed[name]
        return model

    def model_of(self, first: int, last: int) -> ir.Model:
        """Segments ``first`` to ``last`` as a model of their own, made once: not to be changed."""
        with self._cutting:
            if (first, last) not in self._cut:
                self._cut[first, last] = self._cut_out(first, last)
            return self._cut[first, last]

    def _cut_out(self, first: int, last: int) -> ir.Model:
        copy = self._model.clone()
        graph = copy.graph
        start, stop = self.parts[first].start, self.parts[last].stop
        nodes = list(graph)
        values = {v.name: v for node in nodes for v in node.outputs}
        final = last == len(self.parts) - 1
        ends = self._outputs if final else (self.parts[last].output,)
        graph.outputs[:] = [values[name] for name in ends]
        if final and self._features in values and self._features not in ends:
            graph.outputs.append(values[self._features])
        for node in reversed(nodes[stop:]):
            graph.remove(node, safe=True)
        if first:
            old = values[self.parts[first].input]
            new = ir.Value(name=old.name, shape=old.shape, type=old.type)
            old.name = f"{old.name}_cut"
            old.replace_all_uses_with(new)
            for node in reversed(nodes[:start]):
                graph.remove(node, safe=True)
            graph.inputs[:] = [new]
        for name in [n for n, v in graph.initializers.items() if not v.uses()]:
            del graph.initializers[name]
        return copy


def changed_constants(model: ir.Model, other: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers of ``other`` that differ from ``model``'s of the same name."""
    found = {}
    for name, value in other.graph.initializers.items():
        mine = model.graph.initializers.get(name)
        old, new = (None if v is None else v.const_value for v in (mine, value))
        if old is None or new is None or old is new:
            continue
        if old.shape == new.shape and not np.array_equal(old.numpy(), new.numpy()):
            found[name] = new
    return found


def specs_within(segments: Segments, specs: Specs, first: int) -> dict[str, TensorSpec]:
    """The specs but for that of the tensor a run starts from, which is quantized already."""
    start = segments.parts[first].input
    return {t: spec for t, spec in specs.items() if first == 0 or t != start}
