"""Channelwise: vanilla, with per-channel scales where the channels differ most.

Source: PTQ2TheMoon: LayerNorm inputs and outputs, residual adds, and fc2 (activations and
weights), whose outlier channels in a few blocks cost the most. Attention maps are uint8 with
zero point 0: as int8 they would leave half of the codes unused. Their channels, under
``--per-channel softmax`` or ``all``, are the heads. A per-channel scale on the
inner axis of a product cannot leave an integer product as it is: ONNX Runtime computes such
a product in float, between quantized values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.config.selector import AUTO, Selector
from ptq_onnx.numerics.spec import Rule, Site
from ptq_onnx.quantizers.vanilla import Vanilla

ROLES = ("embed", "pre_norm", "norm1", "norm2", "norm", "residual1", "residual2")
AUTO_RATIO = 3.0
"""``auto`` takes the blocks whose channel spread at fc2 is this many times the median's."""


class Channelwise(Vanilla):
    """Per-channel scales on ``ROLES`` and on fc2, or on what ``--per-channel`` names."""

    name: ClassVar[str] = "channelwise"

    def rule(self, site: Site) -> Rule | str:
        """Vanilla's rule; attention maps, which are never negative, without a sign."""
        rule = super().rule(site)
        if site.role == "softmax" and isinstance(rule, Rule):
            return replace(rule, signed=False)
        return rule

    def per_channel(self) -> tuple[Selector, ...]:
        """What the quantizer has per channel by itself, and what was asked for; blocks of fc2 that
        were named take the place of all."""
        asked = super().per_channel()
        roles = tuple(Selector(role) for role in (*ROLES, "pos_embed") if self._has(role))
        chosen = {s.role for s in asked}
        fc2 = () if "fc2" in chosen or not self._has("fc2") else (Selector("fc2"),)
        return (*roles, *fc2, *asked)

    def _has(self, role: str) -> bool:
        return any(site.role == role for site in self.plan.sites.values())


def widest_blocks(
    statistics: Statistics, sites: dict[str, Site], blocks: Blocks
) -> tuple[Selector, str]:
    """fc2 of the blocks with the largest channel ranges, and a sentence that says which.

    A block's spread is the widest channel of fc2's input and output over the median channel.
    """
    spread = np.zeros(blocks.count)
    for site in sites.values():
        if site.block is None or site.role not in ("gelu", "fc2"):
            continue
        if site.tensor not in statistics.channels:
            continue
        stats = statistics.channels[site.tensor]
        width = stats.highest[0] - stats.lowest[0]
        ratio = float(width.max() / max(float(np.median(width)), 1e-12))
        spread[site.block] = max(spread[site.block], ratio)
    usual = float(np.median(spread))
    picked = tuple(int(i) for i in np.flatnonzero(spread > AUTO_RATIO * usual))
    if not picked:
        picked = (int(np.argmax(spread)),)
    parts = ", ".join(f"{i} ({spread[i]:.0f}x)" for i in picked)
    text = (
        f"--per-channel {AUTO}: fc2 of block {parts}; widest channel over the median one,"
        f" {usual:.1f}x in the median block."
    )
    return Selector("fc2", picked), text
