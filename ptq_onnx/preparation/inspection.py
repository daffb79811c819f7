"""What a model is, as this package sees it: read only, for ``ptq-onnx inspect``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from ptq_onnx.blocks.walking import ahead_to, back_to, is_product
from ptq_onnx.errors import PtqError
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.fusion.near_miss import NearMiss, near_misses
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.preparation.signature import signature

OUTSIDE = "outside"


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Unrecognised:
    """An op without a role."""

    node: str
    op_type: str


@dataclass(frozen=True)
class Inspection:
    """A file, and what cleaning, fusion and block finding make of it."""

    path: str
    bytes: int
    producer: str
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: int
    nodes_before: int
    nodes: int
    fusions: dict[str, int]
    blocks: int
    roles: dict[str, dict[str, int]]
    """How often each role occurs, by block (``0``, ``1``, … and ``outside``), layout ops aside."""
    unrecognised: tuple[Unrecognised, ...]
    near_misses: tuple[NearMiss, ...]
    notes: tuple[str, ...]
    ops: dict[str, int] = field(default_factory=dict)
    """How often each op occurs in the file, the most frequent first."""
    refused: str | None = None
    """Why the model cannot be prepared for quantization; then what cleaning finds is empty."""


def inspect(path: str | Path) -> Inspection:
    """Load, clean and fuse a model, and say what is in it; of one that cannot be prepared, what
    the file says, and why. Raises ModelError where onnx cannot read it."""
    plain = graphs.outline(path)
    try:
        found = describe(prepare(path))
    except PtqError as error:
        return _as_written(plain, Path(path), str(error))
    return replace(found, ops=_ops(plain))


def _as_written(model: ir.Model, path: Path, reason: str) -> Inspection:
    """What a file says of itself."""
    graph = model.graph
    return Inspection(
        path=str(path),
        bytes=model_bytes(path),
        producer=_producer(model),
        opset=model.graph.opset_imports.get("", 0),
        inputs=tuple(_tensor(v) for v in graph.inputs if not v.is_initializer()),
        outputs=tuple(_tensor(v) for v in graph.outputs),
        parameters=_parameters(graph),
        nodes_before=len(graph),
        nodes=len(graph),
        fusions={},
        blocks=0,
        roles={},
        unrecognised=(),
        near_misses=(),
        notes=(),
        ops=_ops(model),
        refused=reason,
    )


def _ops(model: ir.Model) -> dict[str, int]:
    """Ops of the graph, of branches and of functions."""
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = (n for part in parts for n in ir.traversal.RecursiveGraphIterator(part))
    return dict(Counter(node.op_type for node in nodes).most_common())


def _parameters(graph: ir.Graph) -> int:
    tensors = (v.const_value for v in graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)


def _producer(model: ir.Model) -> str:
    return " ".join(filter(None, (model.producer_name, model.producer_version)))


def describe(prepared: Prepared) -> Inspection:
    """The same of a model that is prepared already."""
    graph = prepared.model.graph
    kinds = {node.name or str(node.outputs[0].name): node.op_type for node in graph}
    unknown = [Unrecognised(name, kinds[name]) for name in prepared.blocks.unrecognised]
    return Inspection(
        path=str(prepared.path),
        bytes=model_bytes(prepared.path),
        producer=_producer(prepared.model),
        opset=prepared.cleaned.opset_before,
        inputs=_inputs(prepared.model),
        outputs=tuple(_tensor(v) for v in graph.outputs),
        parameters=_parameters(graph),
        nodes_before=prepared.cleaned.nodes_before,
        nodes=len(graph),
        fusions=prepared.fusions,
        blocks=prepared.blocks.count,
        roles=_roles(prepared),
        unrecognised=tuple(unknown),
        near_misses=(*near_misses(prepared.model), *_lost_attention(prepared)),
        notes=prepared.cleaned.notes,
    )


def _inputs(model: ir.Model) -> tuple[Tensor, ...]:
    """The inputs of the file, in whatever form they are in here."""
    own = signature(model)
    return tuple(
        Tensor(own.name, own.dtype.lower(), own.shape)
        if own is not None and v.name == own.inner
        else _tensor(v)
        for v in model.graph.inputs
        if not v.is_initializer()
    )


def _tensor(value: ir.Value) -> Tensor:
    dims = () if value.shape is None else tuple(value.shape)
    return Tensor(
        name=str(value.name),
        dtype="" if value.dtype is None else value.dtype.name.lower(),
        shape=tuple(d if isinstance(d, int) else str(d.value) for d in dims),
    )


def _roles(prepared: Prepared) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for role in prepared.blocks.roles.values():
        if role.name not in ("layout", "other"):
            key = OUTSIDE if role.block is None else str(role.block)
            counts.setdefault(key, Counter())[role.name] += 1
    order = sorted((k for k in counts if k != OUTSIDE), key=int)
    return {k: dict(counts[k]) for k in (*order, OUTSIDE) if k in counts}


def _lost_attention(prepared: Prepared) -> list[NearMiss]:
    """Softmaxes that are no part of a block, and what they lack."""
    found: list[NearMiss] = []
    for node in prepared.model.graph:
        name = node.name or str(node.outputs[0].name)
        role = prepared.blocks.roles.get(name)
        if node.op_type != "Softmax" or (role is not None and role.block is not None):
            continue
        found.append(NearMiss(name, node.op_type, "attention", _lacks(node)))
    return found


def _lacks(softmax: ir.Node) -> str:
    if softmax.inputs[0] is None or not back_to(softmax.inputs[0], is_product):
        return "No product of two activations in front of it."
    if not ahead_to(softmax.outputs[0], lambda n, i: is_product(n) and i == 0, lambda _: False):
        return "No product with values reads it as its first factor."
    return "Something other than scales, biases and masks stands between product and softmax."
