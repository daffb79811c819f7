"""What the measurements say should be done, in words; only options that the run's own allow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptq_onnx.analysis.attention_results import AttentionAnalysis
from ptq_onnx.analysis.results import Sensitivity, Switched
from ptq_onnx.analysis.variation_results import Outlier, TensorVariation, Variation
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import Site, TensorSpec

OUTLIER = 10.0
"""Channels whose extreme is this many times the median's call for a scale of their own."""
WEIGHT_OUTLIER = 6.0
CLIPPED_SHARE = 0.5
CLIPPED_DB = 25.0
"""Clipping is named where it makes at least that share of an error of at most that SNR."""
GAIN = 1.0
"""A module is named that gives back at least that many dB."""
NAMED = 3
LOST = 3.0
"""Below that many dB the logits no longer tell modules apart."""
NO_OPTION = "; no option of this run changes that"
"""What is found is told all the same: the page says that nothing stands out where no one is."""
WITHOUT_FACTORS = ("vanilla", "channelwise", "ptq4vit")
"""Quantizers whose channels have no factors, so that fqvit's help."""


@dataclass(frozen=True)
class _Open:
    """What may still be tried beside a run's own options."""

    config: QuantizeConfig

    def takes(self, **changes: Any) -> bool:
        """Whether a run may have them, too."""
        try:
            replace(self.config, **changes)
        except ConfigError:
            return False
        return True

    @property
    def factors(self) -> bool:
        """Whether fqvit is another quantizer, and one that helps."""
        return self.config.quantizer in WITHOUT_FACTORS and self.takes(quantizer="fqvit")

    @property
    def wider(self) -> bool:
        """Whether ranges that lose nothing may be asked for, and are not searched anyway."""
        return self.config.quantizer != "lowbit" and self.takes(method="robust")

    def per_channel(self, selector: str) -> bool:
        """Whether what is selected may have a scale for each channel."""
        return self.takes(per_channel=(*self.config.per_channel, selector))

    def more(self, selector: str, has: int) -> list[str]:
        """8 bits for what has fewer, else float, or 16: how to ask, where that may be."""
        few = has < BYTE
        bits, text = (BYTE, selector) if few else (2 * BYTE, f"{selector}={2 * BYTE}")
        if not few and self.takes(keep_float=(*self.config.keep_float, selector)):
            return [f"in float (--keep-float {selector})"]
        if self.takes(more_bits=(*self.config.more_bits, text)):
            return [f"{bits} bits (--more-bits {text})"]
        return []


def advise(
    config: QuantizeConfig,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
    variation: Variation | None,
    sensitivity: Sensitivity | None,
    attention: AttentionAnalysis | None,
) -> tuple[str, ...]:
    """Sentences, the most urgent first; none where nothing stands out. Options are named
    that may be had beside those of ``config``."""
    found: list[str] = []
    left = _Open(config)
    if sensitivity is not None:
        found += _gains(sensitivity, left)
    if variation is not None:
        found += _channels(variation, sites, specs, left)
        found += _clipping(variation, left)
        found += _weights(variation, specs, left)
        found += _massive(variation.outliers, specs, left)
    if attention is not None:
        found += _attention(attention, sites, specs) if left.takes(quantizer="fqvit") else []
    return tuple(found)


def _gains(sensitivity: Sensitivity, left: _Open) -> list[str]:
    """The kinds and ops that give back most when they stay in float.

    Judged by the features where the logits are lost.
    """
    lost = sensitivity.baseline.snr_db < LOST and sensitivity.baseline_features_db is not None
    before = sensitivity.baseline_features_db if lost else sensitivity.baseline.snr_db
    where = "last norm's output" if lost else "logits"
    option = " (--keep-float)" if left.takes(keep_float=("fc2",)) else ""

    def gain(one: Switched) -> float:
        return (one.features_gain_db if lost else one.gain_db) or 0.0

    out = []
    for scope, which in (("kind", "of all blocks"), ("op", "alone")):
        best = sorted(
            (s for s in sensitivity.leave_one_out if s.scope == scope and s.part == "all"),
            key=lambda s: -gain(s),
        )[:NAMED]
        named = [s for s in best if gain(s) >= GAIN]
        if named:
            parts = "; ".join(
                f"{s.module} {gain(s):+.1f} dB" if math.isfinite(gain(s)) else f"{s.module} all"
                for s in named
            )
            out.append(
                f"Left in float {which}, these give back most at the {where}"
                f" ({before:.1f} dB with everything quantized): {parts}{option}."
            )
    return out


def _channels(
    variation: Variation,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
    left: _Open,
) -> list[str]:
    """Tensors with one scale whose channels differ too much for it."""
    groups: dict[str, list[TensorVariation]] = defaultdict(list)
    for one in variation.tensors:
        spec = specs.get(one.tensor)
        wide = one.channel_ratio is not None and one.channel_ratio >= OUTLIER
        if wide and spec is not None and spec.rule.per_tensor and not one.parameter:
            groups[one.role].append(one)
    out = []
    for role, group in sorted(groups.items(), key=lambda g: -_widest(g[1])):
        where = _where(role, group)
        many = f"{_widest(group):.0f}× the median"
        selector = _selector(_reader(group[0], sites), group)
        tried = [f"per channel (--per-channel {selector})"] if left.per_channel(selector) else []
        tried += ["power-of-two factors (--quantizer fqvit)"] if left.factors else []
        tried = tried or left.more(selector, min(specs[t.tensor].rule.bits for t in group))
        what = f" → {' or '.join(tried)}" if tried else NO_OPTION
        out.append(f"{where}: one channel {many}{what}.")
    return out


def _widest(group: Iterable[TensorVariation]) -> float:
    return max(one.channel_ratio or 0.0 for one in group)


def _reader(one: TensorVariation, sites: Mapping[str, Site]) -> str:
    """The role to name on the command line: fc2 for what fc2 alone reads."""
    return "fc2" if one.role == "gelu" else sites[one.tensor].role


def _clipping(variation: Variation, left: _Open) -> list[str]:
    """Tensors whose error is mostly clipped values."""
    groups: dict[str, list[TensorVariation]] = defaultdict(list)
    for one in variation.tensors:
        bad = one.snr_db is not None and one.snr_db <= CLIPPED_DB
        if bad and (one.clip_noise or 0.0) >= CLIPPED_SHARE and not one.parameter:
            groups[one.role].append(one)
    out = []
    for role, group in sorted(groups.items(), key=lambda g: min(t.snr_db or 0 for t in g[1])):
        worst = min(group, key=lambda t: t.snr_db or 0)
        clip = worst.clip or (0.0, 0.0)
        around = " around their mean" if worst.clip_of == "centred" else ""
        out.append(
            f"{_where(role, group)}: {100 * (worst.clip_noise or 0):.0f} % of the error is"
            f" clipping (values {worst.low:.3g}…{worst.high:.3g}, range"
            f" {clip[0]:.3g}…{clip[1]:.3g}{around},"
            f" {100 * (worst.clipped or 0):.2g} % outside)"
            f"{' → a wider range (--method robust or minmax)' if left.wider else NO_OPTION}."
        )
    return out


def _weights(variation: Variation, specs: Mapping[str, TensorSpec], left: _Open) -> list[str]:
    groups: dict[str, list[TensorVariation]] = defaultdict(list)
    for one in variation.tensors:
        spec = specs.get(one.tensor)
        wide = one.channel_ratio is not None and one.channel_ratio >= WEIGHT_OUTLIER
        if one.parameter and wide and spec is not None and spec.rule.per_tensor:
            groups[one.role].append(one)
    return [
        f"{_where(role, group)}: one output channel {_widest(group):.0f}× the median"
        + (
            f" → weights per channel (--per-channel {name})"
            if left.per_channel(name)
            else NO_OPTION
        )
        + "."
        for role, group in sorted(groups.items(), key=lambda g: -_widest(g[1]))
        for name in (_selector(role, group),)
    ]


def _massive(
    outliers: Sequence[Outlier], specs: Mapping[str, TensorSpec], left: _Open
) -> list[str]:
    """The one token that stands out most, and where it appears; of tensors that are quantized
    with a range or a scale that could suit it better."""
    tokens = [o for o in outliers if o.kind == "token" and _remedies(specs.get(o.tensor), left)]
    if not tokens:
        return []
    worst = max(tokens, key=lambda o: o.ratio)
    blocks = [o.block for o in tokens if o.block is not None]
    since = f", from block {min(blocks)} on" if blocks else ""
    return [
        f"Massive tokens{since}: up to {worst.value:.4g} in {_label(worst.role, worst.block)},"
        f" token {worst.token}, channel {worst.channel}, {worst.ratio:.0f}× the median token"
        f" → {', or '.join(_remedies(specs.get(worst.tensor), left))}."
    ]


def _remedies(spec: TensorSpec | None, left: _Open) -> list[str]:
    """What is left to try for a massive token; nothing where the tensor stays in float."""
    if spec is None:
        return []
    found = []
    if spec.rule.method not in ("robust", "minmax") and left.wider:
        found.append("calibrate on many images and do not clip (--method robust)")
    if spec.rule.per_tensor and left.factors:
        found.append("give the channel a scale of its own (--quantizer fqvit)")
    return found


def _attention(
    attention: AttentionAnalysis, sites: Mapping[str, Site], specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Uniform codes of few bits where log2 codes keep more of the order of the rows."""
    maps = [specs[s.tensor] for s in sites.values() if s.role == "softmax" and s.tensor in specs]
    narrow = {s.rule.bits for s in maps if s.rule.code == Uniform() and s.rule.bits <= 4}
    out = []
    for bits in sorted(narrow):
        ranks = [
            (block.own.rank, log2.rank)
            for block in attention.blocks
            if block.own is not None and block.own.code == Uniform.name and block.own.bits == bits
            for log2 in block.codes
            if log2.code == Log2.name and log2.bits == bits
        ]
        if not ranks:
            continue
        uniform, log2_rank = (sum(one) / len(ranks) for one in zip(*ranks, strict=True))
        if log2_rank > uniform:
            out.append(
                f"Attention in {bits} uniform bits keeps little of the order of its rows (rank"
                f" correlation {uniform:.2f}; log2 codes of {bits} bits {log2_rank:.2f}) →"
                " --quantizer fqvit, whose codes are log2."
            )
    return out


def _where(role: str, group: Sequence[TensorVariation]) -> str:
    """``fc2 of blocks 5, 6`` or ``head``; for the input of fc2 it says so."""
    name = "gelu (read by fc2)" if role == "gelu" else role
    blocks = sorted(t.block for t in group if t.block is not None)
    if not blocks:
        return name
    return f"{name} of block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _selector(role: str, group: Sequence[TensorVariation]) -> str:
    blocks = sorted(t.block for t in group if t.block is not None)
    return role if not blocks else f"{role}@{','.join(map(str, blocks))}"


def _label(role: str, block: int | None) -> str:
    return role if block is None else f"blocks.{block}.{role}"
