"""Scales of what products read, by what they make of the products' outputs.

Source: Liu et al., "Post-Training Quantization for Vision Transformer" (NeurIPS 2021, arXiv
2106.14156): per product the scale of one input is searched in [``LEAST`` Δ, ``MOST`` Δ] with
the other's held, Δ being the one that covers the extremes; then the other's; ``ROUNDS`` times.
A scale per channel is searched as a whole, the ratios between channels staying as they are, and
so does a zero point. A tensor that several products read takes the best mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear, is_product, name_of
from ptq_onnx.calibration.methods import FROM_PRODUCTS, OF_LOGITS, Score
from ptq_onnx.calibration.product_samples import Wanted, collect_samples
from ptq_onnx.engine.node_sessions import carried_specs
from ptq_onnx.fusion.attention import reaches_softmax
from ptq_onnx.fusion.patch_embed import is_patch_embed
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import relative
from ptq_onnx.numerics.spec import TensorSpec

Array = NDArray[np.float32]
Double = NDArray[np.float64]

LEAST, MOST, NUMBER = 0.5, 1.2, 29
"""Candidates, as shares of the initial scale: the steps are 0.025."""
ROUNDS = 2
ALIKE, LEAST_LOSS = 1e-4, 1e-6
"""Candidates whose 1 - ρ is larger by no more than this part, and this, are as good."""
AT_ONCE = 64 << 20
"""Bytes of candidate outputs held at a time."""


@dataclass(frozen=True)
class Operand:
    """One input of a product: its site (or weight), its spec in the form of ``value``.

    ``value`` is [R, K] rows or a weight [K, N], or [U, R, K] and [U, K, N] of pairs.
    """

    tensor: str
    spec: TensorSpec | None
    value: Array

    def rounded(self, shares: Double) -> Array:
        """The value quantized with so many times its scale, [C, ...]; itself where float."""
        spec, value = self.spec, self.value
        if spec is None:
            return value[None]
        # A mean over tokens is not the sample's to take out: it has single rows and columns.
        rows = replace(spec, rule=replace(spec.rule, around=spec.rule.per_row))
        found, numbers = relative(value, rows), spec.numbers(value.shape)
        numbers = replace(
            numbers, scale=numbers.scale * shares.reshape(-1, *[1] * value.ndim).astype(np.float32)
        )
        part = found.part if spec.factor is None else found.part / spec.factor
        real = spec.rule.code.values(spec.rule.code.codes(part[None], numbers), numbers)
        real = real if spec.factor is None else real * spec.factor
        real = np.asarray(real * found.factor, np.float32)
        for around in rows.rule.around:
            real = around.behind(real, real)
        return real


@dataclass(frozen=True)
class Product:
    """Both operands, the float output, how often each row counts, whether a softmax reads it."""

    operands: tuple[Operand, Operand]
    output: Array
    weight: Double
    logits: bool = False

    def scores(self, index: int, shares: Double, held: float, score: Score) -> Double:
        """Of every share of one operand's scale, the other's being ``held`` times its own."""
        other = self.operands[1 - index].rounded(np.array([held]))[0]
        size = max(1, AT_ONCE // (4 * self.output.size))
        found = []
        for part in np.split(shares, range(size, len(shares), size)):
            mine = self.operands[index].rounded(part)
            made = mine @ other if index == 0 else other @ mine
            found.append(score(self.output, made, self.weight))
        return np.concatenate(found)


def is_searched(node: ir.Node) -> bool:
    """True for products whose inputs' scales are searched: linears, attention's two, and
    patch embeddings."""
    return is_linear(node) or is_product(node) or is_patch_embed(node)


def searched_scales(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    fixed: Collection[str],
    batches: Iterable[Array],
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, TensorSpec]:
    """The specs, with searched scales around activations whose method is of ``FROM_PRODUCTS``.

    ``fixed``: tensors whose scale stays. The batches are run once.
    """
    methods = {t: s.rule.method for t, s in specs.items() if s.rule.method in FROM_PRODUCTS}
    constants = model.graph.initializers
    free = {t for t in methods if t not in fixed and t not in constants}
    if not free:
        return dict(specs)
    method = next(iter(methods.values()))
    products = _sampled(model, specs, free, batches, threads, progress)
    readers: dict[str, list[tuple[Product, int]]] = {}
    for product in products:
        for index, operand in enumerate(product.operands):
            weight = operand.spec is not None and operand.tensor in constants
            if operand.tensor in free or weight:
                readers.setdefault(operand.tensor, []).append((product, index))
    candidates = np.linspace(LEAST, MOST, NUMBER)
    candidates = candidates[np.argsort(np.abs(candidates - 1), kind="stable")]
    shares = dict.fromkeys((o.tensor for p in products for o in p.operands), 1.0)
    for _ in range(ROUNDS):
        for tensor, uses in readers.items():
            found = [
                product.scores(
                    index,
                    candidates,
                    shares[product.operands[1 - index].tensor],
                    (OF_LOGITS if product.logits else FROM_PRODUCTS)[method],
                )
                for product, index in uses
            ]
            shares[tensor] = float(candidates[_first_good(np.mean(found, axis=0))])
    return {t: _scaled(spec, shares.get(t, 1.0), t in free) for t, spec in specs.items()}


def _first_good(scores: Double) -> int:
    """The first of the candidates, the nearest to 1 before, that is as good as the best but for
    rounding: where all factors of a product are one number (the map of a single key), ρ is the same
    for all of them, and 0.675 times the range was taken."""
    lost = 1 - scores
    return int(np.argmax(lost <= lost.min() * (1 + ALIKE) + LEAST_LOSS))


def _scaled(spec: TensorSpec, share: float, activation: bool) -> TensorSpec:
    """The spec with so many times its scale; an activation's clip range goes with it."""
    low, high = spec.clip
    clip = (low * share, high * share) if activation else spec.clip
    return replace(spec, scale=np.asarray(spec.scale * np.float32(share)), clip=clip)


# --- from the graph ---------------------------------------------------------------------


def _sampled(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    free: Collection[str],
    batches: Iterable[Array],
    threads: int,
    progress: Callable[[int], None] | None,
) -> list[Product]:
    """The products around the free tensors, on a sample of what they read."""
    carried = carried_specs(model, specs)

    def read(value: ir.Value) -> tuple[str, TensorSpec | None]:
        name = str(value.name)
        return carried[name] if name in carried else (name, specs.get(name))

    nodes = [
        node
        for node in model.graph
        if is_searched(node) and any(v is not None and read(v)[0] in free for v in node.inputs[:2])
    ]
    rows: dict[str, tuple[Callable[[Array], Array], Array | None]] = {}
    pairs: dict[str, tuple[str, str]] = {}
    for node in nodes:
        first, second = node.inputs[0], node.inputs[1]
        assert first is not None
        assert second is not None
        if is_product(node):
            pairs[name_of(node)] = str(first.name), str(second.name)
            continue
        spec = _of_rows(read(first)[1], node)
        rows[str(first.name)] = _as_rows(node), None if spec is None else spec.factor
    samples, pair_samples = collect_samples(
        model, Wanted(rows, pairs), batches, threads=threads, progress=progress
    )
    found = []
    for node in nodes:
        names = [read(v) for v in node.inputs[:2] if v is not None]
        if is_product(node):
            pair = pair_samples[name_of(node)]
            one, other = pair.factors
            weight = np.ones(one.shape[1])
            forms = [_of_pair(spec, pair.places, pair.lead) for _, spec in names]
        else:
            sample = samples[str(node.inputs[0].name)]  # type: ignore[union-attr]
            one, other, weight = sample.rows, _matrix(node), sample.weight
            forms = [_of_rows(names[0][1], node), _of_matrix(names[1][1])]
        operands = Operand(names[0][0], forms[0], one), Operand(names[1][0], forms[1], other)
        found.append(Product(operands, one @ other, weight, makes_logits(node)))
    return found


def makes_logits(node: ir.Node) -> bool:
    """True for QKᵀ."""
    return is_product(node) and reaches_softmax(node.outputs[0])


def _matrix(node: ir.Node) -> Array:
    """The weight [K, N]; of a convolution [O, C, h, w] as [C h w, O]."""
    weight = np.asarray(constant(node.inputs[1]), np.float32)
    return weight if weight.ndim == 2 else np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def _as_rows(node: ir.Node) -> Callable[[Array], Array]:
    """From what the node reads to rows [n, K]: for a convolution, patches."""
    if is_linear(node):
        return lambda x: x.reshape(-1, x.shape[-1])
    high, wide = np.asarray(constant(node.inputs[1])).shape[2:]

    def patches(image: Array) -> Array:
        batch, channels, height, width = image.shape
        rows, columns = height // high, width // wide
        grid = image[:, :, : rows * high, : columns * wide]
        grid = grid.reshape(batch, channels, rows, high, columns, wide)
        return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * high * wide)

    return patches


def _of_rows(spec: TensorSpec | None, node: ir.Node) -> TensorSpec | None:
    """The spec with its factor along the K columns of the rows."""
    if spec is None or spec.factor is None:
        return spec
    weight = np.asarray(constant(node.inputs[1]))
    shape = weight.shape[:1] if weight.ndim == 2 else weight.shape[1:]
    return spec.with_factor(np.broadcast_to(spec.factor, shape).ravel())


def _of_matrix(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec of a convolution's weight, whose outputs come first, as that of a matrix."""
    return spec if spec is None or spec.axis != 0 else replace(spec, axis=1)


def _of_pair(
    spec: TensorSpec | None, places: list[tuple[int, ...]], lead: tuple[int, ...]
) -> TensorSpec | None:
    """The spec with its factor for each pair [U, 1 or R, 1 or K] from that of all heads."""
    if spec is None or spec.factor is None:
        return spec
    factor = spec.factor.reshape((1,) * (2 - min(spec.factor.ndim, 2)) + spec.factor.shape)
    heads = np.broadcast_to(factor, (*lead[1:], *factor.shape[-2:]))
    return spec.with_factor(np.stack([heads[place[1:]] for place in places]))
