"""What the quantizers share: sites → rules → statistics → specs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.selectors import check_roles, in_form, selectable
from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.calibration.methods import (
    FALLBACK,
    FROM_HISTOGRAM,
    FROM_PRODUCTS,
    Statistics,
    add_histograms,
    collect,
    ranges,
)
from ptq_onnx.calibration.range_growth import find_growth
from ptq_onnx.config import stages
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import ALL, MoreBits, Selector
from ptq_onnx.engine.vit_quantizer import VitQuantizer
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.codes.code import Solved
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.ptf import Factors
from ptq_onnx.numerics.scales_file import check_fit
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.progress import Advance, Report, untold
from ptq_onnx.quantizers.decided import Decided
from ptq_onnx.quantizers.learning import Trained
from ptq_onnx.quantizers.scale_search import is_searched, searched_scales
from ptq_onnx.quantizers.shared_codes import with_row_factors
from ptq_onnx.quantizers.solved_specs import (
    channel_spec,
    solved_spec,
    tensor_spec,
    weight_spec,
    with_room_for_biases,
)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Move:
    """What was moved at one site: how much of the expected noise of its readers it saves."""

    tensor: str
    role: str
    block: int | None
    into: str
    gain_db: float
    largest: float
    """The largest factor over the smallest."""
    copies: int = 0
    """Channels added by splitting."""


@dataclass(frozen=True)
class Plan:
    """What a quantizer works on: the fused float model, its blocks and sites, the options."""

    model: ir.Model
    blocks: Blocks
    sites: dict[str, Site]
    config: QuantizeConfig
    progress: Report | None = None
    """Given the name of a stage: what to call with the number of images done."""
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std of the normalisation, where the images are 8-bit pictures."""
    statistics: Statistics | None = None
    """Statistics of the sites, where an earlier step has collected them."""
    rounded: dict[tuple[str, int], tuple[Array, NDArray[np.float64]]] = field(default_factory=dict)
    """Weights that were rounded before, by name and bits, with the mean of what they read."""
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Ranges that are known and not to be calibrated, by tensor."""
    searched: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Ranges that were searched for one scale, by tensor, all of whose channels are alike."""
    solved: Mapping[str, Solved] = field(default_factory=dict)
    """Numbers of tensors that were found while the model was rewritten, each an array of one."""
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """Scales and powers of two per channel that were searched, by tensor."""
    moves: tuple[Move, ...] = ()
    """What equalisation moved."""
    exponents: Mapping[str, float] = field(default_factory=dict)
    """Power of a channel's range that equalisation divided it by, by tensor."""
    forms: Mapping[str, int] = field(default_factory=dict)
    """How often the model was brought into another form."""
    named: frozenset[str] = frozenset()
    """Roles that the model had before that: options may name them."""
    kept: Path | None = None
    """Where a run that is stopped leaves what it has trained; None: nowhere."""


class SiteQuantizer(VitQuantizer):
    """Gives each site a rule by role; solves the rules' numbers from statistics."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model = plan.model
        """The model whose products are quantized: the plan's, or a copy with new constants."""
        self.notes: list[str] = []
        self.nodes = {name_of(node): node for node in plan.model.graph}
        self.floats: dict[str, str] = {}
        self.trained: tuple[Trained, ...] = ()
        self._given: dict[str, TensorSpec] | None = None
        self.rules = self._dispatch()
        super().__init__(plan.model)

    @property
    def decided(self) -> Decided:
        """The rules by tensor, and the reasons for what stays in float."""
        return Decided(self.plan.sites, self.rules, self.floats)

    @property
    def float_nodes(self) -> Mapping[str, str]:
        """Why ops stay float, by name, where that is not for a tensor's sake."""
        return {}

    # --- dispatch -----------------------------------------------------------------------

    @abstractmethod
    def rule(self, site: Site) -> Rule | str:
        """The rule of a site, or the reason why it stays in float."""

    def per_channel(self) -> tuple[Selector, ...]:
        """Selectors of what is quantized per channel, on top of the rules."""
        return tuple(Selector.parse(t) for t in self.plan.config.per_channel)

    def rules_under(self, config: QuantizeConfig) -> Mapping[str, Rule]:
        """The rules that the same plan would get with another config; changes nothing."""
        other = copy.copy(self)
        other.plan, other.floats = replace(self.plan, config=config), {}
        other.notes = list(self.notes)
        return other._dispatch()

    def _dispatch(self) -> dict[str, Rule]:
        config = self.plan.config
        floats = self._checked(map(Selector.parse, config.keep_float), "--keep-float")
        self._named: list[tuple[Selector, int]] = []
        for one in map(MoreBits.parse, config.more_bits):
            self._named += [(s, one.bits) for s in self._checked([one.selector], "--more-bits")]
        channels = self._checked(self.per_channel(), "--per-channel")
        rules: dict[str, Rule] = {}
        for site in self.plan.sites.values():
            if any(self._concerns(s, site) for s in floats):
                self.floats[site.tensor] = "kept in float by request"
                continue
            rule = self.rule(site)
            if isinstance(rule, str):
                self.floats[site.tensor] = rule
                continue
            wide = any(self._concerns(s, site) for s in channels if self._by_channel(s, site))
            if wide and site.channel_axes and rule.per_tensor:
                rule = self._by_channels(site, rule)
            rule = replace(rule, bits=self.width(site, rule.bits))
            if rule.bits > rule.code.widest:
                raise ConfigError(
                    f"{site.label}: '{rule.code.name}' codes have at most {rule.code.widest} bits,"
                    f" not {rule.bits}; give it fewer with --bits or --more-bits"
                    f"{f', or {rule.code.wider}' if rule.code.wider else ''}."
                )
            if rule.method in FROM_PRODUCTS and not self._only_products_read(site):
                rule = replace(rule, method=FALLBACK)
            rules[site.tensor] = rule
        return rules

    def width(self, site: Site, bits: int) -> int:
        """The bits of a site that the rule gives ``bits``, with what ``--more-bits`` says."""
        found = [number for s, number in self._named if self._concerns(s, site)]
        return max([bits, *([BYTE] if found and site.is_parameter else found)])

    def _by_channels(self, site: Site, rule: Rule) -> Rule:
        """The rule with a step per channel, where its codes can have one."""
        if rule.code.per_channel:
            return replace(rule, grain=PerChannel())
        note = f"{site.label}: one step for all channels, '{rule.code.name}' codes have no more."
        if note not in self.notes:
            self.notes.append(note)
        return rule

    def _only_products_read(self, site: Site) -> bool:
        readers = [self.nodes[name] for name in site.consumers]
        return bool(readers) and all(map(is_searched, readers))

    @staticmethod
    def _by_channel(selector: Selector, site: Site) -> bool:
        """``all`` leaves the logits one scale: calibration images do not show every class, and
        a class that they do not show would be clipped just where it is right."""
        return selector.role != ALL or site.is_parameter or site.role != "head"

    def _concerns(self, selector: Selector, site: Site) -> bool:
        """True for the outputs, weights and own inputs of the selected ops.

        An input that other ops read too is not theirs alone, and is left out.
        """
        role = site.role.removesuffix(".weight")
        if selector.matches(role, site.block) or selector.matches(site.role, site.block):
            return True
        if selector.role == ALL or site.is_parameter or not site.consumers:
            return False
        roles = self.plan.blocks.roles
        readers = [roles.get(name) for name in site.consumers]
        linear = [self.nodes[n].op_type in ("Linear", "MatMul", "Conv") for n in site.consumers]
        return all(linear) and all(
            r is not None and selector.matches(r.name, r.block) for r in readers
        )

    def _checked(self, selectors: Iterable[Selector], option: str) -> list[Selector]:
        """The selectors in terms of the model as it is. Raises ConfigError, which names the roles,
        for one that selects nothing."""
        known, plan = selectable(self.plan.blocks, self.plan.sites), self.plan
        found = list(selectors)
        check_roles(found, option, known | plan.named, plan.blocks.count)
        return in_form(found, known)

    # --- calibration --------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Any]) -> dict[str, TensorSpec]:
        """Specs of all sites with a rule, from batches [B, C, H, W] that can be run twice."""
        if self._given is not None:
            return {t: self._given[t] for t in self.rules}
        return self.searched(self.solve(self.measure(batches)), batches)

    def searched(
        self, specs: dict[str, TensorSpec], batches: Iterable[Any]
    ) -> dict[str, TensorSpec]:
        """The specs, with the scales searched where the method asks for it."""
        plan = self.plan
        if any(rule.method in FROM_PRODUCTS for rule in self.rules.values()):
            report = plan.progress or untold
            specs = searched_scales(
                plan.model,
                specs,
                plan.fixed,
                batches,
                threads=plan.config.threads,
                progress=report(stages.SCALES),
            )
        return with_row_factors(plan.model.graph, specs)

    def reuse(self, specs: dict[str, TensorSpec], where: str) -> None:
        """Take the specs of an earlier run instead of calibrating. Raises ConfigError unless they
        are of the same tensors under the same rules."""
        for tensor, rule in self.rules.items():
            if tensor not in specs:
                raise ConfigError(
                    f"--scales {where} has no numbers for tensor '{tensor}': it comes from another"
                    " model or other options; calibrate anew."
                )
            if specs[tensor].rule != rule:
                raise ConfigError(
                    f"--scales {where}: tensor '{tensor}' was {specs[tensor].rule}, now it is"
                    f" {rule}; use the options of that run, or calibrate anew."
                )
            check_fit(specs[tensor], self.plan.sites[tensor], f"--scales {where}")
        self._given = specs

    def measure(self, batches: Iterable[Any]) -> Statistics:
        """Statistics of all activations with a rule, but for those whose numbers are known."""
        plan = self.plan
        wanted = self.rules.keys() - plan.solved.keys()
        sites = [s for s in plan.sites.values() if not s.is_parameter and s.tensor in wanted]
        report = plan.progress or untold
        threads = plan.config.threads
        known = plan.statistics
        if known is not None and all(s.tensor in known.channels for s in sites):
            stats = known
        else:
            advance = report(stages.CALIBRATING)
            stats = self.collect(sites, batches, advance)
        traces = {f"{s.tensor} ({s.label})": stats.channels[s.tensor].trace for s in sites}
        growth = find_growth(traces).warning
        if growth is not None:
            self.notes.append(growth)
        rows = [
            s
            for s in sites
            if self.rules[s.tensor].method in FROM_HISTOGRAM and s.tensor not in stats.histograms
        ]
        if rows:
            wide = {s.tensor for s in rows if self.rules[s.tensor].grain.per_channel}
            add_histograms(
                plan.model,
                stats,
                rows,
                wide,
                batches,
                threads=threads,
                workers=plan.config.workers,
                progress=report(stages.HISTOGRAMS),
            )
        return stats

    def collect(
        self, sites: Sequence[Site], batches: Iterable[Any], advance: Advance
    ) -> Statistics:
        """Statistics of the sites, from one run of the batches."""
        config = self.plan.config
        return collect(
            self.plan.model,
            sites,
            batches,
            threads=config.threads,
            workers=config.workers,
            progress=advance,
        )

    def solve(self, stats: Statistics) -> dict[str, TensorSpec]:
        """Specs from statistics; activations first, then weights."""
        specs: dict[str, TensorSpec] = {}
        for site in self.plan.sites.values():
            rule = self.rules.get(site.tensor)
            if rule is None:
                continue
            if site.is_parameter:
                specs[site.tensor] = self.parameter(site, rule)
            else:
                specs[site.tensor] = self.activation(site, rule, stats)
        return {**specs, **with_room_for_biases(self.plan.model.graph, specs)}

    def bounds(self, site: Site, rule: Rule, stats: Statistics) -> tuple[Array, Array]:
        """Lower and upper bound by the rule's method: [C] per channel, else [1]."""
        low, high = ranges(
            stats,
            site.tensor,
            rule.method,
            rule.limits,
            symmetric=rule.symmetric,
            per_channel=not rule.per_tensor,
        )
        if site.role == "softmax":
            return np.maximum(low, 0), np.minimum(high, 1)
        return low, high

    def activation(self, site: Site, rule: Rule, stats: Statistics) -> TensorSpec:
        """One scale per tensor, or a scale and a ratio per channel."""
        if site.tensor in self.plan.solved:
            return solved_spec(site, rule, self.plan.solved[site.tensor])
        if rule.method == "fixed":
            return tensor_spec(site, rule, 0.0, 1.0)
        if site.tensor in self.plan.fixed:
            return tensor_spec(site, rule, *self.plan.fixed[site.tensor])
        if site.tensor in self.plan.searched and rule.per_tensor:
            return tensor_spec(site, rule, *self.plan.searched[site.tensor])
        low, high = self.bounds(site, rule, stats)
        if rule.per_tensor:
            return tensor_spec(site, rule, float(low.min()), float(high.max()))
        return channel_spec(site, rule, low, high, stats.channels[site.tensor].shape)

    def parameter(self, site: Site, rule: Rule, factor: Array | None = None) -> TensorSpec:
        """Symmetric scale of a weight; ``factor`` is divided out before (rows of a linear)."""
        weight = self.constant(site.tensor)
        return weight_spec(site, rule, weight, factor, self.plan.config.cpu)

    def constant(self, name: str) -> Array:
        """The float value of an initializer."""
        value = self.plan.model.graph.initializers[name].const_value
        if value is None:
            raise ConfigError(f"Initializer '{name}' has no value.")
        return np.asarray(value.numpy(), np.float32)

    def set_constants(self, values: Mapping[str, Array]) -> None:
        """Give initializers new values, in a copy of the model and in PPQ's graph."""
        if not values:
            return
        if self.model is self.plan.model:
            self.model = self.plan.model.clone()
        for name, array in values.items():
            self.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        self.replace_parameters(values)

    def linear_behind(self, site: Site) -> ir.Node | None:
        """The one linear that reads the site, or None where there are others."""
        if len(site.consumers) != 1:
            return None
        node = self.nodes[site.consumers[0]]
        return node if is_linear(node) else None
