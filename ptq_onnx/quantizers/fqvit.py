"""FQ-ViT: everything in integers, with Power-of-Two Factors and Log-Int-Softmax.

Source: Lin et al., arXiv 2111.13824. Weights per output channel, activations asymmetric
uint8 per tensor, PTF on LayerNorm's input, LIS on attention maps of few bits. Beyond the paper:

* K grows where the channels need it (AugReg ViTs need 7, not 3), and ranges are estimated
  to hold on unseen images (calibration/robust.py);
* PTF also wherever its factor moves at no run-time cost: LayerNorm's γ, β → the next
  weight; GELU's requantization → fc2; v → A·V → proj; q ↔ k;
* the outputs of proj and fc2 are not rounded by themselves: an integer machine adds the
  linear's 32-bit accumulator to the residual and requantizes once (where they are convolutions
  they are rounded for ONNX Runtime, whose only integer convolution gives codes);
* attention maps of 7 bits and more are uniform codes of each row's shares of its largest value:
  log2 codes are an octave apart, however many there are;
* the rows of a map so held, which do not sum to one, are divided by their sum after A·V;
* several linears or convolutions that read a tensor take its factor each into their weight; for
  the target integer, a tensor that several linears read has no factors instead (nor have the
  tokens that several heads read, which have one scale for all: ``shared_codes.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.channels import is_convolution, rows_in_weight
from ptq_onnx.blocks.walking import consumers, is_layout, is_linear, is_row_factors, name_of
from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.config.names import INTEGER
from ptq_onnx.numerics.around.around import Around
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.grain import Grain, PerChannel, PerTensor, PowersOfTwo
from ptq_onnx.numerics.ptf import MAX_K, Factors, Reader, find_factors, needed_step
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.quantizers.base import Array, SiteQuantizer
from ptq_onnx.quantizers.shared_codes import places_of_one, share_statistics, shared
from ptq_onnx.quantizers.solved_specs import clip_range, tensor_spec, trim

PER_TENSOR = frozenset(
    {"input", "qk", "bias", "mask", "head_mix", "softmax", "head", "head_mean", "other"}
)
"""Roles that keep one scale for the whole tensor."""
BRANCHES = frozenset({"proj", "fc2"})
BALANCE = np.linspace(0, 1, 9)
FIXED = "fixed"
"""The method of an attention map: its range is [0, 1] by nature."""


class FqVit(SiteQuantizer):
    """Fully quantized; see the module's text."""

    name: ClassVar[str] = "fqvit"

    def rule(self, site: Site) -> Rule | str:
        """Codes for every tensor that has a rounding of its own, powers of two per channel for the
        residual stream, log2 for attention maps."""
        config = self.plan.config
        widths, method = config.widths, config.effective_method
        made = None if site.producer is None else self.nodes[site.producer]
        scaled = made is not None and is_row_factors(made)
        if (site.role in BRANCHES or scaled) and self._only_added(site):
            return (
                "the 32-bit accumulator is added to the residual, which is then requantized"
                " once: no rounding of its own"
            )
        if site.is_parameter:
            if site.role == "pos_embed":
                wide = config.ptf and bool(site.channel_axes)
                grain: Grain = PowersOfTwo() if wide else PerTensor()
            else:
                grain = PerChannel()
            return Rule(widths.weights, True, True, grain, method="minmax")
        if site.role == "softmax":
            code: Code = Uniform()
            around: tuple[Around, ...] = ()
            if self._weighs_values(site):
                if config.log_maps:
                    code, around = Log2(), (RowSums(),)
                elif config.lis is None:
                    around = (RowMaximum(), RowSums())
            return Rule(widths.attention, False, False, code=code, method=FIXED, around=around)
        wide = config.ptf and site.role not in PER_TENSOR and bool(site.channel_axes)
        if config.target == INTEGER:
            wide = wide and not self._stays_in_product(site)
            wide = wide and all(site.tensor not in group for group in self._shared)
        wide = wide and site.tensor not in self.plan.searched
        grain = PowersOfTwo() if wide else PerTensor()
        return Rule(widths.activations, False, False, grain, method=method)

    @cached_property
    def _shared(self) -> tuple[tuple[str, ...], ...]:
        return places_of_one(self.plan.model.graph, self.plan.sites)

    def measure(self, batches: Iterable[Any]) -> Statistics:
        """Statistics of all activations with a rule; for the target integer those that must have
        the same codes have the same."""
        stats = super().measure(batches)
        if self.plan.config.target == INTEGER:
            share_statistics(stats, self._shared)
        return stats

    def _weighs_values(self, site: Site) -> bool:
        """True for a map that only products with values read, as their first factor."""
        readers = [self.nodes[name] for name in site.consumers]
        return bool(readers) and all(n.op_type == "MatMul" for n in readers)

    def _only_added(self, site: Site) -> bool:
        made = None if site.producer is None else self.nodes[site.producer]
        if made is not None and made.op_type == "Conv" and self.plan.config.target != INTEGER:
            return False
        roles = self.plan.blocks.roles
        readers = [n for name in site.consumers for n in self._behind_row_factors(name)]
        return all(roles[name].name in ("residual1", "residual2") for name in readers)

    def _behind_row_factors(self, name: str) -> list[str]:
        """What reads a tensor that a node reads: behind factors of its rows, their readers."""
        node = self.nodes[name]
        if not is_row_factors(node):
            return [name]
        return [name_of(reader) for reader, _ in consumers(node.outputs[0])]

    def _stays_in_product(self, site: Site) -> bool:
        """True where a linear or a convolution reads the tensor and others do too: its factor
        cannot move into one weight, and would stand inside an integer product."""
        nodes = [self.nodes[name] for name in site.consumers]
        return len(nodes) > 1 and any(is_linear(n) or n.op_type == "Conv" for n in nodes)

    def solve(self, stats: Statistics) -> dict[str, TensorSpec]:
        """Specs from statistics; the factor of an input is divided out of the weight that reads it
        before that is solved."""
        specs: dict[str, TensorSpec] = {}
        rows: dict[str, Array] = {}
        """Factor of the input per weight, in a shape to divide the weight by."""
        places = {(s.role, s.block): s for s in self.plan.sites.values() if s.tensor in self.rules}
        for site in self.plan.sites.values():
            rule = self.rules.get(site.tensor)
            if rule is None or site.tensor in specs:
                continue
            if site.is_parameter:
                specs[site.tensor] = self._parameter(site, rule, rows.get(site.tensor))
            elif rule.method == FIXED:
                specs[site.tensor] = tensor_spec(site, rule, 0.0, 1.0)
            elif rule.grain != PowersOfTwo():
                specs[site.tensor] = self.activation(site, rule, stats)
            elif site.role in ("q", "k"):
                pair = places.get(("q", site.block)), places.get(("k", site.block))
                specs.update(self._pair(site, pair, stats))
            elif site.role in ("v", "av"):
                pair = places.get(("v", site.block)), places.get(("av", site.block))
                specs.update(self._value(site, pair, stats, rows))
            else:
                specs[site.tensor] = self._ptf(site, rule, stats, rows)
        return specs if self.plan.config.target != INTEGER else shared(specs, self._shared)

    def _parameter(self, site: Site, rule: Rule, rows: Array | None) -> TensorSpec:
        if rule.grain == PowersOfTwo():
            value = self.constant(site.tensor)
            others = tuple(a for a in range(value.ndim) if a != site.channel_axes[0])
            low, high = value.min(axis=others), value.max(axis=others)
            found = find_factors(
                low, high, rule.limits, symmetric=True, max_k=self.plan.config.ptf_k
            )
            return ptf_spec(site, rule, found, found.alpha.shape)
        factor = None if rows is None else (1 / rows).astype(np.float32)
        return self.parameter(site, rule, factor)

    def _readers(self, site: Site, stats: Statistics) -> tuple[list[ir.Node], Reader] | None:
        """The linears and convolutions into whose weights the site's factor moves, if any."""
        alone = self.linear_behind(site)
        nodes = [self.nodes[name] for name in site.consumers]
        if self.plan.config.target == INTEGER and not (
            len(nodes) == 1 and is_convolution(nodes[0])
        ):
            nodes = [] if alone is None else [alone]
        moment = stats.channels[site.tensor].second_moment
        taking = [
            n for n in nodes if self._takes_factor(n, len(moment)) and self._reads(n, site.tensor)
        ]
        found: Reader | None = None
        for node in taking:
            name = str(node.inputs[1].name) if node.inputs[1] is not None else ""
            value, bits = self.constant(name), self.rules[name].bits
            if is_linear(node):
                one = Reader.of(value, moment, bits)
            else:
                groups = node.attributes.get_int("group", 1)
                one = Reader.of_convolution(value, groups, moment, bits)
            found = one if found is None else found.beside(one)
        if found is None:
            return None
        return taking, found if len(taking) == len(nodes) else found.passed_on()

    def _reads(self, node: ir.Node, tensor: str) -> bool:
        """True where nothing is quantized between the tensor and the node's first input."""
        value = node.inputs[0]
        while value is not None and str(value.name) not in self.rules:
            before = value.producer()
            value = None if before is None or not is_layout(before) else before.inputs[0]
        return value is not None and str(value.name) == tensor

    def _takes_factor(self, node: ir.Node, channels: int) -> bool:
        """True for a linear or convolution with a quantized weight and that many inputs."""
        weight = node.inputs[1] if is_linear(node) or is_convolution(node) else None
        if weight is None or str(weight.name) not in self.rules or weight.shape is None:
            return False
        groups = 1 if is_linear(node) else node.attributes.get_int("group", 1)
        inside = weight.shape[0 if is_linear(node) else 1]
        return len(list(weight.uses())) == 1 and inside == channels // groups

    def _ptf(self, site: Site, rule: Rule, stats: Statistics, rows: dict[str, Array]) -> TensorSpec:
        """PTF of one tensor; through the weights that read it where they take it."""
        shape = stats.channels[site.tensor].shape
        if site.tensor in self.plan.factors:
            return ptf_spec(site, rule, self.plan.factors[site.tensor], shape)
        low, high = self.bounds(site, rule, stats)
        readers = self._readers(site, stats)
        found = find_factors(
            low,
            high,
            rule.limits,
            max_k=self.plan.config.ptf_k,
            reader=None if readers is None else readers[1],
        )
        self._move(readers, np.exp2(found.alpha.astype(np.float32)), rows)
        return ptf_spec(site, rule, found, shape)

    @staticmethod
    def _move(
        readers: tuple[list[ir.Node], Reader] | None, factor: Array, rows: dict[str, Array]
    ) -> None:
        """Note the factor [C] that is to be divided out of the readers' weights."""
        for node in () if readers is None else readers[0]:
            if node.inputs[1] is not None:
                rows[str(node.inputs[1].name)] = rows_in_weight(node, factor)

    def _pair(
        self, site: Site, pair: tuple[Site | None, Site | None], stats: Statistics
    ) -> dict[str, TensorSpec]:
        """q and k: opposite exponents per channel, which cancel in QKᵀ.

        The exponents make the expected squared error of the product small: Σ_c s_q² 4^a_c
        E[k_c²] + s_k² 4^-a_c E[q_c²], the balance between the ranges being searched.
        """
        q, k = pair
        if q is None or k is None:  # the other one stays in float
            return {site.tensor: self._ptf(site, self.rules[site.tensor], stats, {})}
        bounds = {s.tensor: self.bounds(s, self.rules[s.tensor], stats) for s in (q, k)}
        moments = {s.tensor: stats.channels[s.tensor].second_moment for s in (q, k)}
        need_q, need_k = (
            needed_step(
                bounds[s.tensor][0].astype(np.float64),
                bounds[s.tensor][1].astype(np.float64),
                (limits[0] + limits[1] + 1) // 2,
                limits,
            )
            for s, limits in ((s, self.rules[s.tensor].limits) for s in (q, k))
        )
        if need_q.shape != need_k.shape:
            return {site.tensor: self._ptf(site, self.rules[site.tensor], stats, {})}
        bound = MAX_K if self.plan.config.ptf_k is None else self.plan.config.ptf_k
        best, best_noise = np.zeros(len(need_q)), np.inf
        for strength in BALANCE:
            a = np.clip(np.round(strength / 2 * np.log2(need_q / need_k)), -bound, bound)
            step_q = (need_q * 2.0**-a).max() * 2.0**a
            step_k = (need_k * 2.0**a).max() * 2.0**-a
            noise = float(np.sum(step_q**2 * moments[k.tensor] + step_k**2 * moments[q.tensor]))
            if noise < best_noise:
                best, best_noise = a, noise
        out: dict[str, TensorSpec] = {}
        for one, sign in ((q, 1.0), (k, -1.0)):
            factor = np.exp2(sign * best).astype(np.float32)
            low, high = bounds[one.tensor]
            shape = stats.channels[one.tensor].shape
            out[one.tensor] = tensor_spec(
                one,
                self.rules[one.tensor],
                float((low / factor).min()),
                float((high / factor).max()),
                trim(factor.reshape(shape)),
            )
        return out

    def _value(
        self,
        site: Site,
        pair: tuple[Site | None, Site | None],
        stats: Statistics,
        rows: dict[str, Array],
    ) -> dict[str, TensorSpec]:
        """v and A·V: one factor for both, which then passes into the rows of proj."""
        v, av = pair
        shapes = {None if s is None else stats.channels[s.tensor].shape for s in pair}
        if v is None or av is None or len(shapes) != 1:
            return {site.tensor: self._value_alone(site, stats, rows)}
        bounds = {s.tensor: self.bounds(s, self.rules[s.tensor], stats) for s in (v, av)}
        low = np.minimum(bounds[v.tensor][0], bounds[av.tensor][0])
        high = np.maximum(bounds[v.tensor][1], bounds[av.tensor][1])
        readers = self._readers(av, stats)
        if readers is None and self.linear_behind(av) is not None:
            # A factor that proj cannot take would keep it in float.
            return {
                s.tensor: tensor_spec(
                    s,
                    self.rules[s.tensor],
                    float(bounds[s.tensor][0].min()),
                    float(bounds[s.tensor][1].max()),
                )
                for s in (v, av)
            }
        found = find_factors(
            low,
            high,
            self.rules[v.tensor].limits,
            max_k=self.plan.config.ptf_k,
            reader=None if readers is None else readers[1],
        )
        factor = np.exp2(found.alpha.astype(np.float32))
        self._move(readers, factor, rows)
        shape = shapes.pop()
        return {
            one.tensor: tensor_spec(
                one,
                self.rules[one.tensor],
                float((bounds[one.tensor][0] / factor).min()),
                float((bounds[one.tensor][1] / factor).max()),
                trim(factor.reshape(shape)),
            )
            for one in (v, av)
        }

    def _value_alone(self, site: Site, stats: Statistics, rows: dict[str, Array]) -> TensorSpec:
        """v or A·V by itself. A convolution and A·V that both read v have no factor in common."""
        rule = self.rules[site.tensor]
        kinds = {self.nodes[name].op_type for name in site.consumers}
        if kinds >= {"Conv", "MatMul"}:
            low, high = self.bounds(site, rule, stats)
            return tensor_spec(site, rule, float(low.min()), float(high.max()))
        return self._ptf(site, rule, stats, rows if site.role == "av" else {})


def ptf_spec(site: Site, rule: Rule, found: Factors, shape: tuple[int, ...]) -> TensorSpec:
    """The spec of found factors; channels broadcast by ``shape``."""
    factor = np.exp2(found.alpha.astype(np.float32)).reshape(shape)
    scale = np.float32(found.scale)
    return TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.array(scale),
        zero_point=np.array(found.zero_point, np.int32),
        factor=trim(factor),
        clip=clip_range(float(scale), found.zero_point, rule),
    )
