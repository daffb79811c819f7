"""Deploy: only what the runtime computes in int8 is quantized.

The inputs and weights of the products (patch embedding, linears, QKᵀ, A·V), and, where the
runtime's integer convolution gives codes, convolutions and what stands between them
(``code_regions.py``); LayerNorm,
softmax, GELU and the residual stream stay float, and so does every product's output, so
that ONNX Runtime fuses each product to one MatMulIntegerToFloat. Weights int8 per output
channel, activations 8 bits with one scale per tensor, with or without a sign as the target
takes them (``targets.py``): what differs between channels is the
business of equalisation (``equalization/``), which goes before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.region_ops import clipped_to
from ptq_onnx.blocks.regions import Regions
from ptq_onnx.blocks.roles import RESIDUALS
from ptq_onnx.blocks.walking import is_product
from ptq_onnx.calibration.mean_centred import SUFFIX, collect_centred, takes_centring
from ptq_onnx.calibration.methods import FROM_HISTOGRAM, ChannelStatistics, Statistics
from ptq_onnx.calibration.robust import shared_range
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.selector import Selector
from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.run_time import SkewedToken
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.by_name import code_named
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.progress import Advance
from ptq_onnx.quantizers.base import Array, Plan, SiteQuantizer
from ptq_onnx.quantizers.code_regions import (
    DEAD,
    known_range,
    least,
    number_spec,
    regions_with,
    row_power,
    with_moved_numbers,
    with_same_numbers,
)
from ptq_onnx.quantizers.convolution_walk import corrected_convolutions
from ptq_onnx.quantizers.correction import corrected_biases, start_of
from ptq_onnx.quantizers.mixed import NARROW, SECOND, narrowed, widened
from ptq_onnx.quantizers.rounded_weights import rounded_weights
from ptq_onnx.quantizers.run_time_rules import run_time_rule
from ptq_onnx.quantizers.solved_specs import tensor_spec

PRODUCTS = ("Linear", "MatMul")
STREAM = (*RESIDUALS, "residual", "embed", "patch_embed", None)
"""What makes the residual stream; None: it is the model's input."""
SHARES = frozenset(("Softmax", "Sigmoid", "HardSigmoid"))
"""Ops that make nothing below 0 or above 1, however far the tail of what was seen may reach."""
SEARCHED = "pearson"
"""How the one step of an attention map is found where its rows are not scaled: most of its weights
lie far below the largest, so that a finer step pays though it clips."""
BETWEEN = "mse"
"""How ranges between convolutions are found: no outlier there is worth a step (PP-OCRv4: 1 to 4 dB
over ``robust``)."""
ALONE = "stays float: another input of the product that reads it does"
WITH_ITS_OP = "gets codes of the type that the op which reads it computes in (see qdq/units.py)"
MIXED = "stays float: its heads are mixed before a product reads it, and its rows have no one scale"
FLOAT = "stays float: the runtime computes it in float, only products take integers"


class Deploy(SiteQuantizer):
    """Quantizes what products read; see the module's text."""

    name: ClassVar[str] = "deploy"

    def __init__(self, plan: Plan) -> None:
        self._values: dict[str, ir.Value] = {}
        self.regions = Regions()
        self._numbers = self._on_codes = frozenset[str]()
        super().__init__(plan)

    def rule(self, site: Site) -> Rule | str:
        """Codes for what products read, by the target's rules; all else, with the reason, in
        float."""
        if site.tensor in self._on_codes:
            return self._region_rule(site)
        if self._skips(site):
            target, bits = self.plan.config.runtime, self.plan.config.widths.activations
            code, method = code_named(self.plan.config.code), self.plan.config.effective_method
            return Rule(bits, code=code, method=method, stored=target.stored(True))
        if site.role == "pos_embed":
            return self._constant()
        if not site.is_parameter and not self._read_by_product(site) and not self._whole:
            return FLOAT
        widths = self.plan.config.widths
        code = code_named(self.plan.config.code)
        if site.is_parameter:
            if not self._read_by_product(site):
                return self._constant()
            return Rule(widths.weights, True, True, PerChannel(), code=code, method="minmax")
        method = self.plan.config.effective_method
        target = self.plan.config.runtime
        if site.role == "softmax":
            if target.rows and not all(is_product(self.nodes[name]) for name in site.consumers):
                return MIXED
            sign = target.signed_attention
            rows = (RowMaximum(),) if target.rows else ()
            stored = target.stored(sign)
            method = "fixed" if target.rows or code.floating else SEARCHED
            return Rule(
                widths.attention, sign, sign, code=code, method=method, around=rows, stored=stored
            )
        if self.plan.config.at_run_time and site.tensor not in self.plan.fixed:
            made = None if site.producer is None else self._value(site)
            return run_time_rule(self.plan.config, site, self.nodes, made)
        products = [self.nodes[name].op_type for name in site.consumers]
        sign = target.symmetric
        if "MatMul" in products:
            sign = target.symmetric_attention
        stored = target.stored(sign)
        centred = self._centred(site)
        if centred and method in FROM_HISTOGRAM:
            method = "robust"  # histograms are of the tensor with its mean
        bits = widths.activations
        if target.narrow_second and site.role in SECOND:
            bits = min(bits, BYTE)
        around = (TokenMean(),) if centred else ()
        return Rule(bits, sign, sign, code=code, method=method, stored=stored, around=around)

    def _region_rule(self, site: Site) -> Rule:
        """Codes of what convolutions read and give, and of what stands between them."""
        config = self.plan.config
        if site.tensor in self._numbers:
            return Rule(BYTE, False, False, method="minmax")
        if site.is_parameter:
            return Rule(config.widths.weights, True, True, PerChannel(), method="minmax")
        method, sign = config.method or BETWEEN, config.runtime.symmetric
        return Rule(
            config.widths.activations, sign, sign, method=method, stored=config.runtime.stored(sign)
        )

    def _draw_regions(self) -> None:
        """Decide what convolutions are on codes, without what is kept in float by request."""
        self.regions = Regions()
        self._numbers = self._on_codes = frozenset[str]()
        if not self.plan.config.regions:
            return
        kept = [Selector.parse(text) for text in self.plan.config.keep_float]
        sites = self.plan.sites
        floats = {s.tensor for s in sites.values() if any(self._concerns(k, s) for k in kept)}
        self.regions = regions_with(self.plan.model, sites, floats)
        weights = {str(n.inputs[1].name) for n in self.regions.convolutions if n.inputs[1]}
        self._numbers = frozenset(str(v.name) for v in self.regions.constants)
        self._on_codes = self.regions.tensors | weights | self._numbers

    @property
    def float_nodes(self) -> dict[str, str]:
        """Why convolutions stay float, by name."""
        return {name: f"stays float: {why}" for name, why in self.regions.floats.items()}

    def _dispatch(self) -> dict[str, Rule]:
        """Rules of tensors whose products are in integers: with all inputs, or not at all."""
        self._draw_regions()
        rules = super()._dispatch()
        sites = self.plan.sites
        narrow = narrowed(rules, sites) if self.plan.config.runtime.narrow_second else {}
        rules |= narrow
        self.notes += [NARROW] if narrow else []
        while not self._whole:
            inputs = Counter(
                name
                for tensor in rules
                for name in sites[tensor].consumers
                if not sites[tensor].is_parameter
            )
            for name in inputs:  # a weight that several linears share is one site
                read = self.nodes[name].inputs
                weight = read[1] if len(read) > 1 else None
                tensor = "" if weight is None else str(weight.name)
                inputs[name] += tensor in rules and sites[tensor].is_parameter
            whole = {name for name, count in inputs.items() if count == 2}
            lost = [
                t
                for t in rules
                if t not in self._on_codes
                and not whole.issuperset(sites[t].consumers)
                and not self._skips(sites[t])
            ]
            if not lost:
                return rules
            for tensor in lost:
                del rules[tensor]
                self.floats[tensor] = ALONE
        return rules

    def bounds(self, site: Site, rule: Rule, stats: Statistics) -> tuple[Array, Array]:
        """The range of what is read, without values that an activation function makes zero."""
        low, high = self._range(site, rule, stats)
        if site.tensor in self._on_codes:
            value = self._value(site)
            bottom, top = clipped_to(value) or (-np.inf, np.inf)
            low = np.maximum(low, np.float32(max(bottom, least(value))))
            return low, np.minimum(high, np.float32(top))
        readers = {self.nodes[name].op_type for name in site.consumers}
        if readers and readers <= DEAD.keys():
            low = np.maximum(low, np.float32(min(DEAD[kind] for kind in readers)))
        return low, high

    def _range(self, site: Site, rule: Rule, stats: Statistics) -> tuple[Array, Array]:
        """With ``robust``: one range for all channels, by the weights that read them."""
        # A floating grid has the same relative precision everywhere: its range need not be small.
        if rule.method != "robust" or not rule.per_tensor or rule.code.floating:
            name = site.tensor + SUFFIX if TokenMean() in rule.around else site.tensor
            return super().bounds(replace(site, tensor=name), rule, stats)
        found = stats.channels[site.tensor + SUFFIX if TokenMean() in rule.around else site.tensor]
        power = self._row_power(site, found)
        smallest, largest = rule.limits
        low, high = shared_range(
            found,
            power,
            largest - smallest + 1,
            symmetric=rule.symmetric,
            exponent=self.plan.exponents.get(site.tensor, 0.0),
        )
        made = None if site.producer is None else self.nodes[site.producer].op_type
        if self._whole and made in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        return np.array([low], np.float32), np.array([high], np.float32)

    def _value(self, site: Site) -> ir.Value:
        """The tensor of a site that is no parameter."""
        if site.producer is None:
            return next(v for v in self.plan.model.graph.inputs if v.name == site.tensor)
        if not self._values:
            graph = self.plan.model.graph
            self._values.update((str(v.name), v) for n in graph for v in n.outputs)
        return self._values[site.tensor]

    def activation(self, site: Site, rule: Rule, stats: Statistics) -> TensorSpec:
        """As of any quantizer; what gates make has a known range."""
        if site.tensor in self._on_codes and site.producer is not None:
            known = known_range(self._value(site))
            if known is not None:
                return tensor_spec(site, rule, *known)
        if SkewedToken() in rule.around:
            return tensor_spec(site, rule, SkewedToken.least(1 << rule.bits), 1.0)
        return super().activation(site, rule, stats)

    def parameter(self, site: Site, rule: Rule, factor: Array | None = None) -> TensorSpec:
        """As of any quantizer; a number beside codes is one of them."""
        if site.tensor in self._numbers:
            return number_spec(site, rule, self.constant(site.tensor))
        return super().parameter(site, rule, factor)

    def solve(self, stats: Statistics) -> dict[str, TensorSpec]:
        """As of any quantizer; ops that pick numbers keep the codes."""
        specs = with_same_numbers(self.regions, super().solve(stats))
        return with_moved_numbers(self.plan.model.graph, specs) if self._whole else specs

    @property
    def _whole(self) -> bool:
        """True where the target's ops all take codes."""
        return self.plan.config.runtime.all_codes

    def _constant(self) -> str:
        """Why a constant beside activations has no rule."""
        return WITH_ITS_OP if self._whole else FLOAT

    def _skips(self, site: Site) -> bool:
        """True for what a residual add passes by its branch, where that is to be quantized.

        The branch itself keeps the product's float output, so that product and add fuse to one
        kernel, whose output is quantized in turn as the next add's skip input.
        """
        if not self.plan.config.quantize_residual or site.is_parameter:
            return False
        roles = self.plan.blocks.roles
        adds = [n for n in site.consumers if roles[n].name in RESIDUALS]
        made = None if site.producer is None else roles[site.producer].name
        return bool(adds) and made in STREAM

    def _centred(self, site: Site) -> bool:
        """True for a v that is quantized without the mean of its image."""
        if site.role != "v" or not self.plan.config.centre_values:
            return False
        read = self.nodes[site.consumers[0]].inputs[1]
        return read is not None and read.name == site.tensor and takes_centring(read)

    def collect(
        self, sites: Sequence[Site], batches: Iterable[Any], advance: Advance
    ) -> Statistics:
        """Statistics of the sites; of values without their mean over the tokens where that is what
        gets codes."""
        centred = [s for s in sites if TokenMean() in self.rules[s.tensor].around]
        config = self.plan.config
        return collect_centred(
            self.plan.model,
            sites,
            centred,
            batches,
            threads=config.threads,
            workers=config.workers,
            progress=advance,
        )

    def _row_power(self, site: Site, stats: ChannelStatistics) -> NDArray[np.float64]:
        """Σ_n W² of the weights behind each channel; ones where channels are not their rows, and
        for an output of the model."""
        if not site.consumers:
            return np.ones(stats.power.size)
        total = np.zeros(stats.power.size)
        for name in site.consumers:
            node = self.nodes[name]
            if node.op_type == "Conv" and site.tensor in self._on_codes:
                behind = row_power(node)
                if behind is None or len(behind) != len(total):
                    return np.ones(stats.power.size)
                total += behind
                continue
            weight = constant(node.inputs[1]) if node.op_type == "Linear" else None
            read = node.inputs[0]
            if weight is None or read is None:
                return np.ones(stats.power.size)
            start = start_of(read, site.tensor)
            index = np.arange(stats.power.size, dtype=np.float32).reshape(stats.shape)
            rows = None if start is None else rows_of(start, read, index)
            if rows is None or len(rows) != len(weight):
                return np.ones(stats.power.size)
            power = np.sum(weight.astype(np.float64) ** 2, axis=1)
            np.add.at(total, rows.astype(np.int64), power)
        return total

    def calibrate(self, batches: Iterable[Any]) -> dict[str, TensorSpec]:
        """Specs; then the weights are rounded, and the biases corrected for what that left."""
        if self._given is not None:
            return super().calibrate(batches)
        stats = self.measure(batches)
        if self.plan.config.mixes:
            self._mix(stats)
        specs = self.searched(self.solve(stats), batches)
        plan, found = self.plan, rounded_weights(self.plan, specs, stats, batches)
        self.notes.extend(found.notes)
        constants, means = dict(found.weights), found.means
        if plan.config.bias_correction:
            constants |= corrected_biases(plan.model, plan.sites, specs, stats, constants, means)
        self.set_constants(constants)
        if plan.config.bias_correction and self.regions.convolutions:
            self.set_constants(corrected_convolutions(plan, self.model, specs, batches))
        return specs

    def measure(self, batches: Iterable[Any]) -> Statistics:
        """As of any quantizer; nothing where every range is found at run time and nothing else asks
        for the images."""
        config, sites = self.plan.config, self.plan.sites
        asked = [t for t in self.rules if not sites[t].is_parameter and t not in self.plan.fixed]
        kinds = {self.rules[t].method for t in asked}
        if kinds <= {"fixed"} and not config.bias_correction and not config.rounds_weights:
            return Statistics()
        return super().measure(batches)

    def _mix(self, stats: Statistics) -> None:
        """Give 16 bits to what 8 hold worst (``mixed.py``) by the ranges seen: one that was
        searched for 8 bits clips, and is given up where there are 16."""
        clipped, self.plan = self.plan.searched, replace(self.plan, searched={})
        wide, note = widened(self.rules, self.solve(stats), self.plan.sites, stats)
        self.rules = {**self.rules, **wide}
        kept = {t: ends for t, ends in clipped.items() if t not in wide}
        self.plan = replace(self.plan, searched=kept)
        self.notes.append(note)

    def reuse(self, specs: dict[str, TensorSpec], where: str) -> None:
        """As of any quantizer; refuses numbers of an earlier run where weights or biases are
        changed by the images. Raises ConfigError."""
        config = self.plan.config
        for option, used, without in (
            (f"--rounding {config.rounding}", config.rounding != "nearest", "--rounding nearest"),
            ("bias correction", config.bias_correction, "--no-bias-correction"),
        ):
            if used:
                raise ConfigError(
                    f"--scales {where}: {option} needs the images; calibrate anew, or use"
                    f" {without}."
                )
        if config.mixes:
            bits = {t: s.rule.bits for t, s in specs.items()}
            self.rules = {t: replace(r, bits=bits.get(t, r.bits)) for t, r in self.rules.items()}
        super().reuse(specs, where)

    def _read_by_product(self, site: Site) -> bool:
        others = ["Conv"] * self.plan.config.runtime.convolutions + ["ConvTranspose"] * self._whole
        kinds = {self.nodes[name].op_type for name in site.consumers}
        return bool(kinds) and kinds <= {*PRODUCTS, *others}
