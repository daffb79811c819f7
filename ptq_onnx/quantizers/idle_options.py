"""Options that name roles and change no tensor of the model: what to say of them."""

from __future__ import annotations

from dataclasses import replace

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.quantizers.base import SiteQuantizer

WHY = {
    "keep_float": "are in float by themselves",
    "more_bits": "are in float, or have as many",
    "per_channel": "are in float, have such scales already, or can have none",
}
"""Options, and what holds for the tensors that one names and does not change."""


def idle_options(asked: QuantizeConfig, quantizer: SiteQuantizer) -> list[str]:
    """A note for each option of ``asked`` some of whose words could be left out: every tensor would
    have the same rule. The last of two words that name one tensor alone counts as changing it."""
    config, notes = quantizer.plan.config, []
    for option, why in WHY.items():
        given, idle = getattr(config, option), []
        for text in dict.fromkeys(getattr(asked, option)):
            if text not in given:
                continue  # replaced by what it stands for
            others = tuple(t for t in given if t != text)
            without = replace(config, **{option: others})  # type: ignore[arg-type]
            if quantizer.rules_under(without) == quantizer.rules:
                idle.append(text)
        if idle:
            verb = "changes" if len(idle) == 1 else "change"
            whose = "it names" if len(idle) == 1 else "they name"
            notes.append(
                f"--{option.replace('_', '-')} {', '.join(idle)} {verb} nothing: the tensors that"
                f" {whose} {why}."
            )
    return notes
