"""The quantizers, each a PPQ ``BaseQuantizer`` in a file of its own, by name.

Imported lazily: PPQ and torch take a second to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptq_onnx.errors import ConfigError

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import Plan, SiteQuantizer


def make_quantizer(plan: Plan) -> SiteQuantizer:
    """The quantizer that the plan's config names. Raises ConfigError for an unknown one."""
    from ptq_onnx.quantizers.channelwise import Channelwise
    from ptq_onnx.quantizers.deploy import Deploy
    from ptq_onnx.quantizers.fqvit import FqVit
    from ptq_onnx.quantizers.lowbit import LowBit
    from ptq_onnx.quantizers.ptq4vit import Ptq4Vit
    from ptq_onnx.quantizers.vanilla import Vanilla
    from ptq_onnx.quantizers.weight_only import WeightOnly

    known = {kind.name: kind for kind in (Vanilla, Channelwise, FqVit, Ptq4Vit, Deploy, LowBit)}
    name = plan.config.quantizer
    if name not in known:
        raise ConfigError(f"There is no quantizer '{name}'; choose one of {', '.join(known)}.")
    return (WeightOnly if plan.config.weight_only else known[name])(plan)
