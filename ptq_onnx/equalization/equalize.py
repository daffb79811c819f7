"""Equalisation: the same float model, in a form and with factors that 8 bits can hold.

Only what is equal in float is done (``runtime_forms.py``: other ops for the same function;
``foldings.py``: shifts and factors per channel). How far each factor goes is chosen per site by
the expected error of the products that read it (``factor_search.py``), from the statistics of one
calibration run, which are carried over to the new graph.

* LayerNorm's γ, β → the linears behind it; GELU → fc2 (one Mul, where it pays);
* q → k, and the mean of every key channel, which no softmax sees;
* v → proj, and the mean of every value channel, which A·V passes on because A's rows sum to
  one: the rounding of A then multiplies values without their common part;
* the image in the units of its pixels, so that 8 bits hold it exactly.

For 8-bit floats the model is only brought into form: their precision is relative, so that a shift
away from zero costs it and factors gain nothing (ViT-Ti on 32 images: 14.3 dB without, 0.2 with).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.roles import Blocks, Role
from ptq_onnx.blocks.walking import is_product
from ptq_onnx.calibration.mean_centred import SUFFIX, collect_centred, takes_centring
from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.calibration.robust import robust_range
from ptq_onnx.config import stages
from ptq_onnx.config.targets import Target
from ptq_onnx.equalization.code_forms import regions_of, sites_of
from ptq_onnx.equalization.convolution_steps import WORTH_A_MUL, ConvolutionSteps
from ptq_onnx.equalization.factor_search import (
    Choice,
    Product,
    Records,
    balance,
    choose_factor,
    output_noise,
)
from ptq_onnx.equalization.foldings import (
    Hidden,
    columns_behind,
    hidden_channels,
    insert_affine,
    keys_may_shift,
    new_nodes_as,
    norm_before,
    readers_of,
    value_path,
)
from ptq_onnx.equalization.form import take_form
from ptq_onnx.equalization.hidden_factors import choose_hidden_factor, unshifted, with_copies
from ptq_onnx.equalization.linear_weights import move_rows
from ptq_onnx.equalization.signed_range import signed_range
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.by_name import code_named
from ptq_onnx.numerics.spec import Site
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import Move, Plan

Double = NDArray[np.float64]

BYTE_STEPS = 255
"""γ has 8-bit codes where it has codes at all; factors are chosen so that these hold it exactly."""
AVERAGED = 0.2
"""Weight of v's own rounding beside that of A·V: the rows of A average over tokens."""


@dataclass
class _Equalizer(ConvolutionSteps):
    """The state of equalising one model, changed in place."""

    model: ir.Model
    blocks: Blocks
    sites: dict[str, Site]
    stats: Statistics
    levels: int
    target: Target
    weight_bits: int
    moves: list[Move] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    exponents: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Ranges that go with a shift, by tensor."""

    def __post_init__(self) -> None:
        self.values = {str(v.name): v for n in self.model.graph for v in n.outputs}

    def run(self) -> None:
        """Equalise every site that statistics were collected of; q goes with k, v with A·V."""
        places = {(s.role, s.block): s for s in self.sites.values() if not s.is_parameter}
        for site in self.sites.values():
            if site.tensor not in self.stats.channels:
                continue
            if site.role == "q":
                self.queries(site, places.get(("k", site.block)))
            elif site.role == "v":
                self.attended(site, places.get(("av", site.block)))
            elif site.role not in ("k", "av", "softmax", "input"):
                self.linear_input(site)

    # --- pieces -------------------------------------------------------------------------

    def bounds(self, tensor: str) -> tuple[Double, Double]:
        """Lower and upper bound of each channel [C], by the method robust."""
        low, high = robust_range(self.stats.channels[tensor])
        return low.astype(np.float64), high.astype(np.float64)

    def records(self, tensor: str) -> Records | None:
        """How far single images stand out; None from a single image."""
        stats = self.stats.channels[tensor]
        if stats.images < 2:
            return None
        return Records(stats.record_ratio, stats.images, stats.count / stats.images)

    def products(self, linears: Iterable[ir.Node]) -> list[Product]:
        """The magnitudes of the linears' weights, and their bits, for the search."""
        found = [constant(node.inputs[1]) for node in linears]
        return [
            Product(np.abs(w).astype(np.float32), self.weight_bits) for w in found if w is not None
        ]

    def move_statistics(self, tensor: str, shift: Double, factor: Double, name: str = "") -> None:
        """Let the statistics of a tensor, or those of ``name`` after them, be of (x - shift) /
        factor."""
        self.stats.channels[name or tensor] = self.stats.channels[tensor].moved(shift, factor)

    def note(self, site: Site, into: str, choice: Choice) -> None:
        """Add what was moved at a site to the list of moves."""
        ratio = float(choice.factor.max() / choice.factor.min())
        more = 0 if choice.copies is None else int(choice.copies.sum() - len(choice.copies))
        self.moves.append(
            Move(site.tensor, site.role, site.block, into, choice.gain_db, ratio, more)
        )

    def unshifted(self, low: Double, high: Double, symmetric: bool) -> Double:
        """Half of the range that a channel takes up where all share one zero point."""
        return unshifted(low, high, self.levels, symmetric=symmetric)

    # --- sites --------------------------------------------------------------------------

    def linear_input(self, site: Site) -> None:
        """A norm's output, or any other tensor that only linears read."""
        value = self.values[site.tensor]
        norm = norm_before(value)
        low, high = self.bounds(site.tensor)
        variance = self.stats.channels[site.tensor].variance
        if norm is not None:
            shift = (low + high) / 2
            choice = choose_factor(
                (high - low) / 2,
                variance,
                self.products(norm.linears),
                self.levels,
                records=self.records(site.tensor),
            )
            if self.target.all_codes:
                choice = replace(choice, factor=norm.on_grid(choice.factor, BYTE_STEPS))
            norm.apply(self.model.graph, shift, choice.factor)
            self.note(site, "LayerNormalization", choice)
            for other in self.same_norm(site, norm.linears):
                self.move_statistics(other, shift, choice.factor)
                self.exponents[other] = choice.exponent
            return
        linears = readers_of(value)
        if linears is None or len(site.channel_axes) != 1 or len(low) < 2:
            return
        hidden = hidden_channels(value, linears)
        choice = choose_hidden_factor(
            hidden,
            (low, high),
            variance,
            self.products(linears),
            self.levels,
            self.records(site.tensor),
        )
        if self.target.symmetric:
            halves = self.unshifted(low, high, symmetric=True)
            ones = np.ones(len(halves))
            plain = output_noise(ones, halves, variance, self.products(linears), self.levels)
            choice = replace(choice, plain=plain)
        if choice.gain_db >= WORTH_A_MUL and not self.target.all_codes:
            self.insert(site, value, linears, hidden, choice)

    def insert(
        self,
        site: Site,
        value: ir.Value,
        linears: tuple[ir.Node, ...],
        hidden: Hidden | None,
        choice: Choice,
    ) -> None:
        """(value - shift) / factor in front of linears, as Mul and Add.

        Where codes have a sign, the range is put around zero and kept (``signed_range.py``).
        """
        factor, index = with_copies(self.model.graph, hidden, choice)
        stats = self.stats.channels[site.tensor]
        if len(index) != len(choice.factor):
            stats = self.stats.channels[site.tensor] = stats.take(index)
        shift, fixed = np.zeros(len(factor)), None
        if self.target.symmetric:
            moved = stats.moved(shift, factor)
            shift, fixed = signed_range(moved, linears, factor, self.levels, choice.exponent)
        with new_nodes_as(self.model.graph, Role(site.block, site.role), self.roles):
            made = insert_affine(self.model.graph, value, shift, factor, "equalized")
        for linear in linears:
            move_rows(self.model.graph, linear, factor, shift)
        self.note(site, "Mul, Add" if shift.any() else "Mul", choice)
        self.move_statistics(site.tensor, shift, factor, str(made.name))
        self.exponents[str(made.name)] = choice.exponent
        if fixed is not None:
            self.fixed[str(made.name)] = fixed

    def same_norm(self, site: Site, linears: tuple[ir.Node, ...]) -> list[str]:
        """Tensors with statistics that the same norm makes (all that those linears read)."""
        read = {str(v.name) for n in linears if (v := n.inputs[0]) is not None}
        return [t for t in {site.tensor, *read} if t in self.stats.channels]

    def queries(self, q: Site, k: Site | None) -> None:
        """q / f and (k - t) f; f is one where something else reads q."""
        if k is None or k.tensor not in self.stats.channels:
            return
        stats_q, stats_k = self.stats.channels[q.tensor], self.stats.channels[k.tensor]
        left = columns_behind(self.values[q.tensor], stats_q.shape)
        right = columns_behind(self.values[k.tensor], stats_k.shape)
        if right is None or len(stats_q.power) != len(stats_k.power):
            return
        uses = {use.node for use in self.values[k.tensor].uses()}
        reads = {use.node for use in self.values[q.tensor].uses()}
        if len(uses) != 1 or uses != reads or not is_product(next(iter(uses))):
            return
        low, high = self.bounds(k.tensor)
        shift = np.zeros(len(low))
        shared = len(np.unique(right.columns)) != right.columns.size
        if keys_may_shift(next(iter(uses))) and not shared:
            shift = (low + high) / 2
        sign = self.target.symmetric_attention
        half_k = self.unshifted(low - shift, high - shift, sign)
        half_q = self.unshifted(*self.bounds(q.tensor), sign)
        factor = np.ones(len(low))
        choice = Choice(factor, 1.0, 1.0)
        if left is not None and not shared:
            moved = stats_k.moved(shift, factor)
            choice = balance(
                half_q, half_k, stats_q.second_moment, moved.second_moment, self.levels
            )
        zero = np.zeros(len(low))
        if left is not None:
            left.apply(self.model.graph, zero, choice.factor)
        right.apply(self.model.graph, shift, 1 / choice.factor)
        self.move_statistics(q.tensor, zero, choice.factor)
        self.move_statistics(k.tensor, shift, 1 / choice.factor)
        self.note(q, "k", choice)

    def attended(self, v: Site, av: Site | None) -> None:
        """(v - t) / f, which A·V passes on, into the rows of proj."""
        value = self.values[v.tensor]
        path = value_path(value)
        if av is None or path is None or av.tensor not in self.stats.channels:
            return
        product, linear = path
        stats, behind = self.stats.channels[v.tensor], self.stats.channels[av.tensor]
        columns = columns_behind(value, stats.shape)
        read = linear.inputs[0]
        if columns is None or stats.shape != behind.shape or read is None:
            return
        if str(product.outputs[0].name) != av.tensor:
            return
        index = np.arange(stats.power.size, dtype=np.float32).reshape(stats.shape)
        rows = rows_of(product.outputs[0], read, index)
        if rows is None or not np.array_equal(np.sort(rows), index.ravel()):
            return
        if len(np.unique(columns.columns)) != columns.columns.size:
            return
        order = rows.astype(np.int64)
        mean = stats.mean
        centred = v.tensor + SUFFIX in self.stats.channels
        low, high = self.bounds(v.tensor + SUFFIX if centred else v.tensor)
        shift = np.zeros(len(mean)) if centred else mean
        own = self.unshifted(low - shift, high - shift, self.target.symmetric_attention)
        low, high = self.bounds(av.tensor)
        attended = self.unshifted(low - mean, high - mean, self.target.symmetric)
        weight = self.products([linear])[0].magnitude
        inverse = np.argsort(order)
        ordered = Product(weight[inverse], self.weight_bits)
        choice = choose_factor(
            attended,
            behind.variance,
            [ordered],
            self.levels,
            [(own, AVERAGED)],
            records=self.records(av.tensor),
        )
        columns.apply(self.model.graph, mean, choice.factor)
        move_rows(self.model.graph, linear, choice.factor[order], mean[order])
        name = v.tensor + SUFFIX if centred else v.tensor
        self.move_statistics(name, shift, choice.factor)
        self.move_statistics(av.tensor, mean, choice.factor)
        self.exponents.update({v.tensor: choice.exponent, av.tensor: choice.exponent})
        self.note(v, "proj", choice)


def equalise(plan: Plan, batches: Iterable[Any]) -> Plan:
    """A plan for the equalised copy of the plan's model, with its statistics.

    The plan's own model is left as it is. ``batches`` [B, C, H, W] are run once.
    """
    return equalise_in_place(replace(plan, model=plan.model.clone()), batches)


def equalise_in_place(plan: Plan, batches: Iterable[Any]) -> Plan:
    """As :func:`equalise`, on the plan's own model: each weight goes as a new one comes."""
    target = plan.config.runtime
    moves = not code_named(plan.config.code).floating  # see the module's text
    form = take_form(plan, pixels=moves)
    model, blocks, sites, wanted = form.model, form.blocks, form.sites, form.measured
    report = plan.progress or untold
    values = {str(v.name): v for n in model.graph for v in n.outputs}
    centred = [
        s
        for s in wanted
        if plan.config.centre_values and s.role == "v" and takes_centring(values[s.tensor])
    ]
    stats = collect_centred(
        model,
        wanted,
        centred,
        batches,
        threads=plan.config.threads,
        workers=plan.config.workers,
        progress=report(stages.EQUALISING),
    )
    widths = plan.config.widths
    state = _Equalizer(model, blocks, sites, stats, 1 << widths.activations, target, widths.weights)
    if moves and not plan.config.weight_only:  # factors do not help weights alone (measured)
        state.run()
        state.convolutions(regions_of(model, plan.config))
    blocks = replace(blocks, roles={**blocks.roles, **state.roles})
    return replace(
        plan,
        model=model,
        blocks=blocks,
        sites=sites_of(model, blocks, plan.config),
        statistics=stats,
        moves=tuple(state.moves),
        exponents=state.exponents,
        forms=form.counts,
        fixed={**form.fixed, **state.fixed},
    )
