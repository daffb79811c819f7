"""Equalisation for few bits: every channel has a range of its own, in plain per-tensor Q/DQ.

    x̂ = s_c (clip(round((x - m_c) / s_c) + z, 0, 2^b - 1) - z) + m_c

With s_c and m_c moved into what makes the tensor and what reads it, all channels have one scale.
The ranges are those of the least squared error on a sample of rows (``numerics/range_search.py``),
each drawn as often as its position counts (``quantizers/importance.py``).

* a norm's output → γ, β and the linears behind it; the input of proj: a Mul and an Add;
* v R, with the same R, and its ranges → proj, which the rows of A pass on: they sum to one;
* q R and k R, R being orthogonal and even, so that QKᵀ is the same and no channel of a head stands
  out (in late blocks of ViT-Ti the channels that stand out in q do so in k too, and a factor from
  one to the other helps neither); each head with a scale of its own, the product of both a Mul on
  QKᵀ; and k without the mean of its channels, which no softmax sees;
* what an activation function gives, and attention maps: only the numbers of their codes are found;
  of 8 bits and more the former has a Mul → fc2, by the ranges of all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import ACTIVATIONS, is_product, name_of
from ptq_onnx.calibration.methods import collect
from ptq_onnx.calibration.product_samples import Wanted, collect_samples
from ptq_onnx.calibration.robust import robust_range
from ptq_onnx.calibration.row_samples import collect_rows
from ptq_onnx.config import stages
from ptq_onnx.config.bits import BYTE
from ptq_onnx.equalization.attention_steps import AttentionSteps
from ptq_onnx.equalization.channel_steps import Array
from ptq_onnx.equalization.form import take_form
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.spec import Rule, Site
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.quantizers.importance import find_importance

LOGARITHMIC = Logarithmic()


class _LowBits(AttentionSteps):
    """All sites of one model."""

    def take(self, samples: dict[str, Array]) -> None:
        """Decide for all tensors of which rows are given; q goes with k, v with A·V."""
        self.samples = samples
        for tensor in samples:
            site = self.form.sites[tensor]
            if self.rules[tensor].code == LOGARITHMIC:
                self.activated(site)
            elif tensor in self.ranges:
                self.hidden(site)
            elif site.role == "q":
                self.queries(site, self.places.get(("k", site.block)))
            elif site.role == "v":
                self.attended(site)
            elif site.role == "av":
                self.product(site)
            elif site.role != "k":
                self.linear_input(site)


def _wide_hidden(sites: Iterable[Site], rules: Mapping[str, Rule], graph: ir.Graph) -> list[Site]:
    """What activation functions give, in 8 bits or more."""
    ops = {name_of(node): node.op_type for node in graph}
    wide = [s for s in sites if rules[s.tensor].bits >= BYTE and s.producer is not None]
    return [s for s in wide if ops[str(s.producer)] in ACTIVATIONS]


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
    report = plan.progress or untold
    threads = plan.config.threads
    formed = replace(plan, model=form.model, blocks=form.blocks, sites=form.sites, fixed=form.fixed)
    rules = dict(make_quantizer(formed).rules)
    state = _LowBits(form, rules)
    wanted = [
        s
        for s in form.read_by_products
        if s.tensor in rules
        and s.role not in ("softmax", "input")
        and (s.tensor not in form.fixed or rules[s.tensor].code == LOGARITHMIC)
    ]
    pairs = _map_products(form.model.graph, rules)
    # Both read the model as it is: nothing is moved before.
    float_model = form.model.clone()
    if pairs:
        _, found = collect_samples(
            float_model, Wanted({}, pairs), batches, threads=threads, progress=report(stages.SCALES)
        )
        state.maps(found)
    wide = _wide_hidden(wanted, rules, form.model.graph)
    if wide:
        advance = report(stages.CHANNELS)
        stats = collect(float_model, wide, batches, threads=threads, progress=advance)
        for site in wide:
            low, high = robust_range(stats.channels[site.tensor])
            state.ranges[site.tensor] = low.astype(np.float64), high.astype(np.float64)
    axes = {s.tensor: s.channel_axes for s in wanted}
    importance = find_importance(float_model, axes, batches, report(stages.POSITIONS))
    for samples in collect_rows(
        float_model,
        wanted,
        batches,
        counting=importance.rows,
        threads=threads,
        progress=report(stages.EQUALISING),
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
