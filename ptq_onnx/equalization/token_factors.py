"""Factors for the tokens of a residual stream that are far above the rest, equal in float.

A norm divides every row by its own size, so that a row of the stream may have a factor from some
add on, if all that is added to it later has the same one. Some ViTs keep a few tokens as registers:
in ViT-Ti (AugReg) those in the four corners are 40 times as large as all others behind the MLP of
block 7, on every image (see Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588;
RegCache, arXiv 2510.04547, takes such tokens out of the image instead). One scale for a tensor of
the stream then spends nearly all of its codes on them. With factors 2⁻ᵏ there they are like the
others; as no code of another token changes, what is multiplied may keep its scale.

The MLP that makes them large would still make one large tensor: the factors go in front of its last
linear, whose bias becomes a hidden channel that is always on and so gets them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant, is_layout, is_linear, name_of
from ptq_onnx.calibration.tapped_runs import add_outputs, copies_in, taken_in_order
from ptq_onnx.equalization.foldings import Hidden, hidden_channels, readers_of
from ptq_onnx.equalization.norm_readers import READ_BY_SHAPE
from ptq_onnx.equalization.streams import KEEPING, find_streams
from ptq_onnx.equalization.writer import Writer
from ptq_onnx.graph.formula import constant, new_constant, sizes
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.progress import Advance, silent

Double = NDArray[np.float64]

IMAGES = 32
"""Images that are looked at."""
LEAST = 4.0
"""Size of a token over the median of all from which on it is massive."""
SMALLEST = 6
"""Largest k: 2⁻ᵏ is still a whole code where one is the middle of 8-bit ones."""
ALWAYS_ON = {"Gelu": 6.0, "QuickGelu": 9.0, "Silu": 16.0, "Relu": 1.0}
"""Where a channel that is always on stands: f(x) = x there, but for 1e-5."""


@dataclass(frozen=True)
class TokenFactors:
    """The tokens of one stream that have factors, 2⁻ᵏ, from one of its adds on."""

    start: str
    """What that add makes."""
    tokens: tuple[int, ...]
    """Their places."""
    exponents: tuple[int, ...]
    """k of each."""
    before: float
    """Largest size of one of them over the median of all tokens …"""
    after: float
    """… and with the factors."""
    tensors: int = 0
    """Tensors of the stream that norms read from there on."""

    def row_factors(self, count: int) -> NDArray[np.float32]:
        """[1, T, 1]: one, but for these tokens."""
        factors = np.ones((1, count, 1), np.float32)
        factors[0, list(self.tokens), 0] = 2.0 ** -np.array(self.exponents, np.float64)
        return factors


@dataclass
class Spine:
    """A stream from one of its adds on: where factors of rows have to go."""

    start: ir.Node
    before: int
    """The input of ``start`` that is the stream before; the other is what the MLP makes."""
    hidden: Hidden
    """That MLP's channels."""
    added: list[tuple[ir.Node, int]] = field(default_factory=list)
    """Later adds, and which input is added to the stream."""
    norms: list[ir.Node] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """T of [B, T, D]."""
        found = sizes(self.start.outputs[0])
        assert found is not None
        assert isinstance(found[1], int)
        return found[1]


def find_token_factors(
    model: ir.Model,
    batches: Iterable[Any],
    *,
    threads: int = 0,
    progress: Advance = silent,
) -> tuple[TokenFactors, ...]:
    """Factors for massive tokens of the model's streams, which stays as it is. ``batches``
    [B, C, H, W]: ``IMAGES`` of them are run."""
    spines = _spines(model.graph)
    if not spines:
        return ()
    read = dict.fromkeys(str(n.inputs[0].name) for s in spines for n in s.norms if n.inputs[0])
    sizes_of = _token_sizes(model, list(read), batches, threads, progress)
    found: list[TokenFactors] = []
    taken: set[ir.Node] = set()
    for spine in spines:  # in graph order: the first of a stream from which on any is massive
        names = [str(n.inputs[0].name) for n in spine.norms if n.inputs[0] is not None]
        if taken & set(spine.norms) or not names:
            continue
        if sizes_of[names[0]].max() < LEAST:
            continue
        largest = np.max([sizes_of[name] for name in dict.fromkeys(names)], axis=0)
        places = np.flatnonzero(largest >= LEAST)
        exponents = np.minimum(np.rint(np.log2(largest[places])), SMALLEST).astype(int)
        left = largest.copy()
        left[places] *= 2.0**-exponents
        taken |= set(spine.norms)
        found.append(
            TokenFactors(
                start=str(spine.start.outputs[0].name),
                tokens=tuple(places.tolist()),
                exponents=tuple(exponents.tolist()),
                before=float(largest.max()),
                after=float(left.max()),
                tensors=len(dict.fromkeys(names)),
            )
        )
    return tuple(found)


def set_token_factors(model: ir.Model, found: Sequence[TokenFactors]) -> dict[str, str]:
    """Put the factors into the model, in place. Returns the Muls that were added, by name, each
    with the name of the node whose block it is of."""
    spines = _by_start(model.graph)
    added: dict[str, str] = {}
    for one in found:
        spine = spines[one.start]
        factors = one.row_factors(spine.tokens)
        spine.hidden.keep_bias(model.graph, ALWAYS_ON[spine.hidden.activation.op_type])
        places = [(spine.hidden.after[0], 0), (spine.start, spine.before), *spine.added]
        for node, index in places:
            added[_times(model.graph, node, index, factors)] = name_of(node)
    return added


def fit(model: ir.Model, found: Sequence[TokenFactors]) -> bool:
    """Whether factors that an earlier run chose are of this model's streams."""
    spines = _by_start(model.graph)
    return len({one.start for one in found}) == len(found) and all(
        one.start in spines
        and len(one.tokens) == len(one.exponents) > 0
        and all(0 <= t < spines[one.start].tokens for t in one.tokens)
        and all(0 < k <= SMALLEST for k in one.exponents)
        for one in found
    )


def describe(one: TokenFactors) -> str:
    """A note for the user."""
    places = ", ".join(map(str, one.tokens[:8])) + (", …" if len(one.tokens) > 8 else "")
    return (
        f"Tokens: {len(one.tokens)} tokens ({places}) of the residual stream from '{one.start}' on"
        f" are up to {one.before:.3g} times as large as the others on every image; with factors of"
        f" their own, which norms do not see, {one.after:.2g} times."
    )


def _times(graph: ir.Graph, node: ir.Node, index: int, factors: NDArray[np.float32]) -> str:
    """A Mul by factors [1, T, 1] in front of a node's input; its name."""
    value = node.inputs[index]
    assert value is not None
    assert value.shape is not None
    number = new_constant(graph, f"{value.name}_tokens_factors", factors)
    made = Writer(graph, node).node("Mul", [value, number], list(value.shape), value, "tokens")
    node.replace_input_with(index, made)
    mul = made.producer()
    assert mul is not None
    return name_of(mul)


def _by_start(graph: ir.Graph) -> dict[str, Spine]:
    """Spines by what their first add makes."""
    return {str(s.start.outputs[0].name): s for s in _spines(graph)}


def _spines(graph: ir.Graph) -> list[Spine]:
    """The places from which on rows of a stream may have factors, in graph order."""
    streams, _ = find_streams(graph)
    found = []
    for stream in streams:
        adds = [n for n in graph if n.op_type == "Add" and n.outputs[0] in stream.axes]
        for node in adds:
            spine = _start(node)
            if spine is not None and _follow(graph, spine):
                found.append(spine)
    return found


def _start(node: ir.Node) -> Spine | None:
    """A stream's add [B, T, D] of what an MLP makes, T known."""
    shape = sizes(node.outputs[0])
    if shape is None or len(shape) != 3 or not isinstance(shape[1], int) or shape[1] < 2:
        return None
    for index in (0, 1):
        linear = _linear_of(node.inputs[index], shape)
        read = None if linear is None else linear.inputs[0]
        if read is None or sizes(node.inputs[1 - index]) != shape:
            continue
        hidden = hidden_channels(read, readers_of(read) or ())
        if hidden is not None and len(hidden.after) == 1 and hidden.activation.op_type in ALWAYS_ON:
            whole = all(constant(n.inputs[1]) is not None for n in (hidden.before, *hidden.after))
            if whole:
                return Spine(node, 1 - index, hidden)
    return None


def _linear_of(value: ir.Value | None, shape: list[int | str]) -> ir.Node | None:
    """The linear that makes a tensor for one reader, perhaps times a factor per channel."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or sizes(value) != shape:
            return None
        if is_linear(node):
            return node
        if node.op_type != "Mul":
            return None
        data = [v for v in node.inputs if v is not None and not is_constant(v)]
        value = data[0] if len(data) == 1 else None
    return None


def _follow(graph: ir.Graph, spine: Spine) -> bool:
    """Find what is added to the stream and what reads it; False where something that reads it is
    not blind to the size of rows, as norms are."""
    shape = sizes(spine.start.outputs[0])
    rows, parts = {spine.start.outputs[0]}, set[ir.Value]()
    behind = False
    for node in graph:
        if node is spine.start:
            behind = not node.outputs[0].is_graph_output()
        read = [i for i, v in enumerate(node.inputs) if v in rows or v in parts]
        if not behind or not read or node is spine.start or node.op_type in READ_BY_SHAPE:
            continue
        if node.op_type in KEEPING and read == [0] and node.inputs[0] is not None:
            rank = len(sizes(node.inputs[0]) or [])
            if node.attributes.get_int("axis", -1) % max(rank, 1) != rank - 1:
                return False
            if node.inputs[0] in rows:
                spine.norms.append(node)
            continue
        if any(v.is_graph_output() for v in node.outputs):
            return False
        if node.op_type == "Add" and len(read) == 1 and node.inputs[read[0]] in rows:
            other = node.inputs[1 - read[0]]
            if other is None or is_constant(other) or sizes(other) != shape:
                return False
            spine.added.append((node, 1 - read[0]))
            rows.add(node.outputs[0])
        elif is_layout(node) and node.op_type != "Concat" and _keeps_rows(node):
            parts.update(node.outputs)
        else:
            return False
    return behind and bool(spine.norms)


def _keeps_rows(node: ir.Node) -> bool:
    """True for a layout op that leaves the last axis as it is."""
    value = node.inputs[0]
    before = sizes(value)
    return before is not None and all(
        (after := sizes(v)) is not None and len(after) > 0 and after[-1] == before[-1]
        for v in node.outputs
    )


def _token_sizes(
    model: ir.Model,
    tensors: Sequence[str],
    batches: Iterable[Any],
    threads: int,
    progress: Advance,
) -> dict[str, Double]:
    """Of tensors [B, T, D], each token's standard deviation over D, the lower quartile of the
    images, over the median of all tokens and images: [T]."""
    standard, copies = graphs.to_standard(model.clone()), copies_in(batches)
    names = add_outputs(standard, tensors)

    def take(_: NDArray[np.float32], values: dict[str, Any]) -> dict[str, Double]:
        arrays = {name: values[name] for name in names}
        return {n: a[: len(a) // copies].astype(np.float64).std(axis=-1) for n, a in arrays.items()}

    found: list[dict[str, Double]] = []
    seen = 0
    for batch, each in taken_in_order(standard, names, batches, take, threads=threads):
        found.append(each)
        seen += len(batch) // copies
        progress(len(batch) // copies)
        if seen >= IMAGES:
            break
    of_images = {name: np.concatenate([each[name] for each in found]) for name in names}
    return {
        name: np.quantile(each, 0.25, axis=0) / max(float(np.median(each)), 1e-30)
        for name, each in of_images.items()
    }
