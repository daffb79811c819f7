"""Equalisation for few bits: every channel has a range of its own, in plain per-tensor Q/DQ.

    x̂ = s_c (clip(round((x - m_c) / s_c) + z, 0, 2^b - 1) - z) + m_c

With s_c and m_c moved into what makes the tensor and what reads it, all channels have one scale.
The ranges are those of the least squared error on a sample of rows (``numerics/range_search.py``).

* a norm's output → γ, β and the linears behind it; the input of proj: a Mul and an Add;
* v R, with the same R, and its ranges → proj, which the rows of A pass on: they sum to one;
* q R and k R, R being orthogonal and even, so that QKᵀ is the same and no channel of a head stands
  out (in late blocks of ViT-Ti the channels that stand out in q do so in k too, and a factor from
  one to the other helps neither); each head with a scale of its own, the product of both a Mul on
  QKᵀ; and k without the mean of its channels, which no softmax sees;
* what an activation function gives, and attention maps: only the numbers of their codes are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.roles import Role
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear, is_product, name_of
from ptq_onnx.calibration.product_samples import PairSample, Wanted, collect_samples
from ptq_onnx.calibration.row_samples import collect_rows
from ptq_onnx.config import stages
from ptq_onnx.equalization.equalize import Move
from ptq_onnx.equalization.factor_search import Product, choose_factor, normalized
from ptq_onnx.equalization.foldings import (
    columns_behind,
    insert_affine,
    keys_may_shift,
    norm_before,
    readers_of,
    value_path,
)
from ptq_onnx.equalization.form import Form, take_form
from ptq_onnx.equalization.linear_weights import move_rows, turn_rows
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.code import TINY, Solved
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.ptf import needed_step, zero_points
from ptq_onnx.numerics.range_search import channel_bounds, logarithmic_range, share_rate
from ptq_onnx.numerics.rotations import even
from ptq_onnx.numerics.spec import Rule, Site
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer

Array = NDArray[np.float32]
Double = NDArray[np.float64]

LOGARITHMIC = Logarithmic()
SEARCHED_ROWS = 512
"""Rows whose values a logarithmic range is searched on."""


@dataclass
class _Steps:
    """The state of one model, changed in place."""

    form: Form
    rules: dict[str, Rule]
    weight_bits: int
    moves: list[Move] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    solved: dict[str, Solved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.form.model.graph
        self.values = {str(v.name): v for n in self.graph for v in n.outputs}
        self.samples: dict[str, Array] = {}
        self.places = {(s.role, s.block): s for s in self.form.sites.values() if not s.is_parameter}

    def take(self, samples: dict[str, Array]) -> None:
        """Decide for all tensors of which rows are given; q goes with k, v with A·V."""
        self.samples = samples
        for tensor in samples:
            site = self.form.sites[tensor]
            if self.rules[tensor].code == LOGARITHMIC:
                self.activated(site)
            elif site.role == "q":
                self.queries(site, self.places.get(("k", site.block)))
            elif site.role == "v":
                self.attended(site)
            elif site.role == "av":
                self.product(site)
            elif site.role != "k":
                self.linear_input(site)

    # --- pieces -------------------------------------------------------------------------

    def levels(self, site: Site) -> int:
        return 1 << self.rules[site.tensor].bits

    def steps(
        self, site: Site, weights: Sequence[Array | None] = ()
    ) -> tuple[Double, Double, Solved]:
        """Shift and factor per channel [C], and the one scale and zero point then.

        The factor follows the steps as far as the ``weights`` [C, N] that read the tensor allow,
        whose rows it multiplies; without any it is the steps.
        """
        levels = self.levels(site)
        rows = self.samples[site.tensor]
        low, high = channel_bounds(rows, levels)
        half = np.maximum((high - low) / 2, TINY)
        half = np.maximum(half, 1e-6 * half.max())  # a channel that never changes
        factor = normalized(half)
        products = [Product(np.abs(w), self.weight_bits) for w in weights if w is not None]
        if products:
            factor = choose_factor(
                half, rows.var(axis=0, dtype=np.float64), products, levels
            ).factor
        scale = 2 * float((half / factor).max()) / (levels - 1)
        zero = levels // 2
        shift = (low + high) / 2 + factor * scale * (zero - (levels - 1) / 2)
        self.note(site, low, high)
        return shift, factor, _numbers(scale, zero)

    def note(self, site: Site, low: Double, high: Double) -> None:
        """How much less noise steps of single channels make than one step for all."""
        width = np.maximum(high - low, TINY)
        plain = float(high.max() - low.min())
        gain = 10 * float(np.log10(plain**2 / np.mean(width**2)))
        into = {"q": "k", "v": "proj"}.get(site.role, "LayerNormalization")
        ratio = float(width.max() / width.min())
        self.moves.append(Move(site.tensor, site.role, site.block, into, gain, ratio))

    def behind(self, site: Site, value: ir.Value, shift: Double, factor: Double) -> ir.Value:
        """A Mul and an Add behind a value; they have the site's role."""
        before = {name_of(node) for node in self.graph}
        made = insert_affine(self.graph, value, shift, factor, "stepped")
        for node in self.graph:
            if name_of(node) not in before:
                self.roles[name_of(node)] = Role(site.block, site.role)
        return made

    # --- sites --------------------------------------------------------------------------

    def linear_input(self, site: Site) -> None:
        """A norm's output, or what linears alone read."""
        value = self.values[site.tensor]
        norm = norm_before(value)
        linears = readers_of(value)
        if len(site.channel_axes) != 1 or (norm is None and linears is None):
            return
        readers = norm.linears if norm is not None else linears or ()
        shift, factor, solved = self.steps(site, [_weight(n) for n in readers])
        if norm is not None:
            norm.apply(self.graph, shift, factor)
            read = {str(n.inputs[0].name) for n in norm.linears if n.inputs[0] is not None}
            self.solved.update(dict.fromkeys({site.tensor, *read} & {*self.rules}, solved))
        elif linears is not None:
            made = self.behind(site, value, shift, factor)
            for linear in linears:
                move_rows(self.graph, linear, factor, shift)
            self.solved[str(made.name)] = solved

    def queries(self, q: Site, k: Site | None) -> None:
        """q R and k R - t, and a scale for each head."""
        if k is None or k.tensor not in self.samples:
            return
        rows_q, rows_k = self.samples[q.tensor], self.samples[k.tensor]
        shape_q, shape_k = (tuple(int(s.shape[a]) for a in s.channel_axes) for s in (q, k))
        left = columns_behind(self.values[q.tensor], _spread(q))
        right = columns_behind(self.values[k.tensor], _spread(k))
        uses = {use.node for use in self.values[k.tensor].uses()}
        reads = {use.node for use in self.values[q.tensor].uses()}
        if left is None or right is None or shape_q != shape_k or len(uses) != 1 or uses != reads:
            return
        product = next(iter(uses))
        apart = all(len(np.unique(side.columns)) == side.columns.size for side in (left, right))
        if not is_product(product) or not apart:
            return
        heads = shape_q[0] if len(shape_q) == 2 else 1
        width = rows_q.shape[1] // heads
        rotation = even(width)
        rows_q, rows_k = (_turned(rows, rotation) for rows in (rows_q, rows_k))
        shift, zero = np.zeros(rows_k.shape[1]), np.zeros(rows_k.shape[1])
        if keys_may_shift(product):
            shift = rows_k.mean(axis=0, dtype=np.float64)
        rows_k = np.asarray(rows_k - shift, np.float32)
        head_q, solved_q = self.heads(q, rows_q, heads)
        head_k, solved_k = self.heads(k, rows_k, heads)
        for side in (left, right):
            side.turn(self.graph, rotation)
        left.apply(self.graph, zero, np.repeat(head_q, width))
        right.apply(self.graph, shift, np.repeat(head_k, width))
        if heads > 1:
            self.scores(q, product, head_q * head_k)
        self.solved[q.tensor], self.solved[k.tensor] = solved_q, solved_k

    def heads(self, site: Site, rows: Array, heads: int) -> tuple[Double, Solved]:
        """The factor of every head [H], and the one scale and zero point then."""
        levels = self.levels(site)
        flat = rows.reshape(len(rows), heads, -1).transpose(0, 2, 1).reshape(-1, heads)
        low, high = channel_bounds(flat[:: max(1, flat.shape[0] // len(rows) // 8)], levels)
        limits = self.rules[site.tensor].limits
        symmetric = self.rules[site.tensor].symmetric
        found = {
            z: needed_step(low, high, z, limits) for z in zero_points(low, high, limits, symmetric)
        }
        zero = min(found, key=lambda z: float(np.sum(found[z] ** 2)))
        step = np.maximum(found[zero], TINY)
        scale = float(np.exp(np.mean(np.log(step))))
        self.note(site, low, high)
        return step / scale, _numbers(scale, zero)

    def scores(self, site: Site, product: ir.Node, factor: Double) -> None:
        """Multiply QKᵀ by a factor per head [H]."""
        before = {name_of(node) for node in self.graph}
        insert_affine(
            self.graph, product.outputs[0], np.zeros(1), 1 / factor.reshape(-1, 1, 1), "headwise"
        )
        for node in self.graph:
            if name_of(node) not in before:
                self.roles[name_of(node)] = Role(site.block, "qk_scale")

    def attended(self, v: Site) -> None:
        """(v - m) / s, which A·V passes on, into the rows of proj."""
        value = self.values[v.tensor]
        path, columns = value_path(value), columns_behind(value, _spread(v))
        if path is None or columns is None:
            return
        product, linear = path
        read = linear.inputs[0]
        if read is None or len(np.unique(columns.columns)) != columns.columns.size:
            return
        rows = _rows(product.outputs[0], read, v)
        if rows is None:
            return
        av = str(product.outputs[0].name)
        width = int(v.shape[v.channel_axes[-1]])
        rotation = even(width)
        columns.turn(self.graph, rotation)
        turn_rows(self.graph, linear, np.argsort(rows).reshape(-1, width), rotation)
        for tensor in {v.tensor, av} & {*self.samples}:
            self.samples[tensor] = _turned(self.samples[tensor], rotation)
        shift, factor, solved = self.steps(v)
        columns.apply(self.graph, shift, factor)
        move_rows(self.graph, linear, factor[rows], shift[rows])
        if av in self.samples:
            moved = (self.samples[av] - shift) / factor
            self.samples[av] = np.asarray(moved, np.float32)
        self.solved[v.tensor] = solved

    def product(self, av: Site) -> None:
        """(A·V - m) / s by a Mul and an Add in front of proj."""
        value = self.values[av.tensor]
        nodes = {name_of(n): n for n in self.graph}
        linears = [nodes[name] for name in av.consumers]
        if len(linears) != 1 or not is_linear(linears[0]) or linears[0].inputs[0] is None:
            return
        rows = _rows(value, linears[0].inputs[0], av)
        if rows is None:
            return
        weight = _weight(linears[0])
        ordered = None if weight is None else weight[np.argsort(rows)]
        shift, factor, solved = self.steps(av, [ordered])
        shift, factor = shift[rows], factor[rows]
        made = self.behind(av, linears[0].inputs[0], shift, factor)
        move_rows(self.graph, linears[0], factor, shift)
        self.solved[str(made.name)] = solved

    def activated(self, site: Site) -> None:
        """M, τ and zero point of what an activation function gives, weighted by the rows of the
        weights that read it."""
        rows = self.samples[site.tensor]
        nodes = {name_of(n): n for n in self.graph}
        weights = [constant(nodes[name].inputs[1]) for name in site.consumers]
        power = np.zeros(rows.shape[1])
        for weight in weights:
            if weight is not None and len(weight) == len(power):
                power += np.sum(np.asarray(weight, np.float64) ** 2, axis=1)
        if not power.any():
            power += 1
        picked = rows[:: max(1, len(rows) // SEARCHED_ROWS)]
        found = logarithmic_range(
            picked.ravel(),
            np.broadcast_to(power, picked.shape).ravel(),
            self.rules[site.tensor].bits,
        )
        self.solved[site.tensor] = found

    def maps(self, pairs: dict[str, PairSample]) -> None:
        """τ of attention maps."""
        for node in self.graph:
            if name_of(node) not in pairs or node.inputs[0] is None:
                continue
            tensor = str(node.inputs[0].name)
            attention, values = pairs[name_of(node)].factors
            bits = self.rules[tensor].bits
            rate = share_rate(attention, values, bits)
            self.solved[tensor] = _numbers(1.0, (1 << bits) - 1, {"eighths": rate})


def _numbers(scale: float, zero: int, details: Mapping[str, int] | None = None) -> Solved:
    return Solved(np.array([scale], np.float32), np.array([zero], np.int32), details or {})


def _turned(rows: Array, rotation: Double) -> Array:
    """Rows [n, H d] with the channels of every head times R [d, d]."""
    turned = rows.reshape(len(rows), -1, len(rotation)) @ rotation.astype(np.float32)
    return np.asarray(turned.reshape(rows.shape), np.float32)


def _weight(linear: ir.Node) -> Array | None:
    """[K, N]"""
    value = constant(linear.inputs[1])
    return None if value is None else np.asarray(value, np.float32)


def _spread(site: Site) -> tuple[int, ...]:
    """The shape in which an array per channel broadcasts against the tensor, without the batch."""
    axes = {axis - len(site.shape) for axis in site.channel_axes}
    full = [int(site.shape[a]) if a in axes else 1 for a in range(-len(site.shape) + 1, 0)]
    return tuple(full)


def _rows(value: ir.Value, read: ir.Value, site: Site) -> NDArray[np.int64] | None:
    """The channel of each row of a linear that reads ``value`` behind layout ops; None where rows
    are no channels of their own."""
    shape = _spread(site)
    index = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    rows = rows_of(value, read, index)
    if rows is None or not np.array_equal(np.sort(rows), index.ravel()):
        return None
    return rows.astype(np.int64)


def _map_products(graph: ir.Graph, rules: Mapping[str, Rule]) -> dict[str, tuple[str, str]]:
    """Both inputs of the products that read attention maps in logarithmic codes, by name."""
    found = {}
    for node in graph:
        if is_product(node):
            one, other = (str(v.name) for v in node.inputs[:2] if v is not None)
            if one in rules and rules[one].code == LOGARITHMIC:
                found[name_of(node)] = one, other
    return found


def step_in_place(plan: Plan, batches: Iterable[Any]) -> Plan:
    """The plan for its own model with a step per channel, from batches [B, C, H, W] that are run
    once for each group of samples, and once more for attention maps."""
    form = take_form(plan, pixels=True)
    report = plan.progress or (lambda _: lambda __: None)
    threads = plan.config.threads
    formed = replace(plan, model=form.model, blocks=form.blocks, sites=form.sites, fixed=form.fixed)
    rules = dict(make_quantizer(formed).rules)
    state = _Steps(form, rules, plan.config.widths.weights)
    wanted = [
        s
        for s in form.read_by_products
        if s.tensor in rules and s.role not in ("softmax", "input") and s.tensor not in form.fixed
    ]
    pairs = _map_products(form.model.graph, rules)
    # Both read the model as it is: nothing is moved before.
    float_model = form.model.clone()
    if pairs:
        _, found = collect_samples(
            float_model, Wanted({}, pairs), batches, threads=threads, progress=report(stages.SCALES)
        )
        state.maps(found)
    for samples in collect_rows(
        float_model, wanted, batches, threads=threads, progress=report(stages.EQUALISING)
    ):
        state.take(samples)
    blocks = replace(form.blocks, roles={**form.blocks.roles, **state.roles})
    return replace(
        plan,
        model=form.model,
        blocks=blocks,
        sites=find_sites(form.model, blocks),
        moves=tuple(state.moves),
        forms=form.counts,
        fixed=form.fixed,
        solved=state.solved,
    )
