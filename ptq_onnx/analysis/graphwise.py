"""Graphwise analysis: the error of every op while all ops are quantized.

Each op's output, quantized, is compared with that of the float model on the same images;
sums run over all images, so memory holds one batch. Covers every compute op (LayerNorm,
softmax, GELU and adds as well as products) and every quantized tensor that a layout op
makes: q, k, v out of a packed linear, the concatenation with the class token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums, logits_error
from ptq_onnx.analysis.results import BlockError, Error, Graphwise, OpError, OutputError
from ptq_onnx.analysis.tokens import Tokens, find_tokens, first_images
from ptq_onnx.blocks.roles import Blocks, Role
from ptq_onnx.blocks.walking import is_layout, is_product, name_of, through_layout
from ptq_onnx.calibration.class_output import feature_outputs, float_outputs
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.engine.vit_quantizer import VitQuantizer
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.spec import Site

Array = NDArray[np.float32]

OTHER_MODEL = 1e-3
"""Noise to signal between two float models beyond which a tensor was changed on purpose."""


@dataclass
class _Pair:
    """Sums over the whole tensor, its class token and its patches."""

    whole: Sums = field(default_factory=Sums)
    first: Sums = field(default_factory=Sums)
    patches: Sums = field(default_factory=Sums)

    def add(self, reference: Array, value: Array, tokens: Tokens | None) -> None:
        """Add a batch's values of one tensor, the float ones and the quantized ones."""
        self.whole.add(reference, value)
        if tokens is None:
            return
        one, other = tokens.split(reference), tokens.split(value)
        if one is not None and other is not None:
            self.first.add(one[0], other[0])
            self.patches.add(one[1], other[1])


def graphwise(
    model: ir.Model,
    quantizer: VitQuantizer,
    blocks: Blocks,
    batches: Iterable[Any],
    *,
    held_apart: bool,
    sites: Mapping[str, Site] | None = None,
    simulator: Simulator | None = None,
    reference: Simulator | None = None,
    own: Simulator | None = None,
    count: int | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Graphwise:
    """Errors of all compute ops and blocks over all batches ([B, C, H, W]).

    ``count``: how many images these are, where others fill up a batch behind the last.

    ``model`` is the float model that was quantized. ``reference`` simulates the float model to
    compare with, ``model`` where none is given. Where it is another one with the same tensor
    names (``model`` is an equalised copy of it), ``own`` simulates ``model`` in float: a tensor
    that the two float models themselves disagree on was changed on purpose, and is compared
    with ``model``'s own. Raises ModelError where there is not a single image.
    """
    floats = _FloatValues(reference or Simulator(model, None, threads=threads), own)
    quantized = simulator or Simulator(model, quantizer, threads=threads)
    nodes = _compared(model, quantizer)
    gathered = _Gathered(nodes, float_outputs(model), find_tokens(model, blocks))
    images = 0
    for batch in batches:
        real = len(batch) if count is None else min(len(batch), count - images)
        gathered.add(quantized, batch, floats.of(batch), real)
        images += real
        if progress is not None:
            progress(real)
    if not images:
        raise ModelError("There are no images to analyse the quantized model on.")
    ops = [
        _op_error(node, name, gathered.sums[name], _role(name, node, blocks, sites), quantizer)
        for name, node in nodes.items()
        if gathered.sums[name].whole.count
    ]
    found = _output_errors(gathered.ends, feature_outputs(model))
    logits = next((one.error for one in found if one.error.agreement is not None), None)
    if logits is None and found:
        logits = found[0].error
    return Graphwise(images, held_apart, tuple(ops), tuple(_block_errors(ops)), logits, found)


class _FloatValues:
    """Every tensor of the float model to compare with, batch by batch.

    ``own`` simulates the float model that was quantized, where it is another: what the two
    disagree on in the first batch is taken from it.
    """

    def __init__(self, reference: Simulator, own: Simulator | None) -> None:
        self.reference, self.own = reference, own
        self.changed: frozenset[str] | None = None

    def of(self, batch: Array) -> dict[str, Array]:
        """The values for a batch [B, C, H, W], by tensor."""
        floats: dict[str, Array] = {}
        self.reference.walk(batch, floats.__setitem__)
        if self.own is None:
            return floats
        if self.changed is None:
            self.changed = _changed(self.own, batch, floats)
        if self.changed:
            again: dict[str, Array] = {}
            self.own.walk(batch, again.__setitem__)
            floats.update({name: again[name] for name in self.changed})
        return floats


class _Gathered:
    """Sums by tensor compared, and the values of the outputs, over all batches."""

    def __init__(
        self, compared: Iterable[str], outputs: Iterable[str], tokens: Tokens | None
    ) -> None:
        self.sums = {name: _Pair() for name in compared}
        self.ends: dict[str, list[tuple[Array, Array]]] = {name: [] for name in outputs}
        self.tokens = tokens

    def add(self, quantized: Simulator, batch: Array, floats: dict[str, Array], real: int) -> None:
        """Run a batch, of which the first ``real`` images count, and compare it with ``floats``,
        whose tensors go as they are compared."""

        def compare(name: str, value: Array) -> None:
            if name not in floats:
                return
            one, other = (first_images(v, len(batch), real) for v in (floats.pop(name), value))
            if name in self.sums:
                self.sums[name].add(one, other, self.tokens)
            if name in self.ends:
                self.ends[name].append((one, other))

        quantized.walk(batch, compare)


def _compared(model: ir.Model, quantizer: VitQuantizer) -> dict[str, ir.Node]:
    """The first output of every compute op, and all quantized outputs, with their node."""
    return {
        str(value.name): node
        for node in model.graph
        for index, value in enumerate(node.outputs)
        if (index == 0 and not is_layout(node)) or str(value.name) in quantizer.specs
    }


def _changed(own: Simulator, batch: Array, floats: Mapping[str, Array]) -> frozenset[str]:
    """Tensors that two float models with the same names disagree on."""
    found: set[str] = set()

    def compare(name: str, value: Array) -> None:
        sums = Sums()
        if name in floats:
            sums.add(floats[name], value)
        if sums.snr > OTHER_MODEL:
            found.add(name)

    own.walk(batch, compare)
    return frozenset(found)


def _output_errors(
    ends: Mapping[str, list[tuple[Array, Array]]], features: Collection[str]
) -> tuple[OutputError, ...]:
    """The errors of the outputs that were seen; of those that are features, without classes."""
    return tuple(
        OutputError(name, _error(pairs, name not in features))
        for name, pairs in ends.items()
        if pairs
    )


def _error(pairs: list[tuple[Array, Array]], answers: bool) -> Error:
    error = logits_error(*(np.concatenate(values) for values in zip(*pairs, strict=True)))
    return error if answers else replace(error, agreement=None)


def _role(name: str, node: ir.Node, blocks: Blocks, sites: Mapping[str, Site] | None) -> Role:
    """The op's role; that of the tensor where a layout op makes it."""
    site = None if sites is None else sites.get(name)
    if is_layout(node) and site is not None:
        return Role(site.block, site.role)
    return blocks.roles[name_of(node)]


def _is_quantized(node: ir.Node, quantizer: VitQuantizer) -> bool:
    """True where the op's output is rounded to codes: at once, or wherever it is read, behind
    layout ops or behind the scalar that scales QKᵀ."""
    if any(str(v.name) in quantizer.specs for v in node.outputs):
        return True
    output = node.outputs[0]
    read = [reader.inputs[index] for reader, index in through_layout(output)]
    if read and all(v is not None and str(v.name) in quantizer.specs for v in read):
        return True
    readers = [reader for reader, _ in through_layout(output)]
    return (
        is_product(node)
        and len(readers) == 1
        and readers[0].op_type == "Mul"
        and _is_quantized(readers[0], quantizer)
    )


def _op_error(
    node: ir.Node, tensor: str, pair: _Pair, role: Role, quantizer: VitQuantizer
) -> OpError:
    found = pair.whole
    return OpError(
        node=name_of(node),
        op_type=node.op_type,
        role=role.name,
        block=role.block,
        snr=found.snr,
        snr_db=decibels(found.snr),
        mse=found.noise / found.count,
        cosine=found.cosine,
        max_abs=found.largest,
        quantized=_is_quantized(node, quantizer),
        tensor=tensor,
        class_db=decibels(pair.first.snr) if pair.first.count else None,
        patch_db=decibels(pair.patches.snr) if pair.patches.count else None,
        class_snr=pair.first.snr if pair.first.count else None,
        patch_snr=pair.patches.snr if pair.patches.count else None,
    )


def _block_errors(ops: Iterable[OpError]) -> list[BlockError]:
    """A block's error is that of its second residual add."""
    return [
        BlockError(op.block, op.snr, op.snr_db)
        for op in ops
        if op.role == "residual2" and op.block is not None
    ]
