"""Rules of activations whose ranges are found at run time."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ptq_onnx.blocks.reach import reaches_up
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.numerics.around.run_time import (
    ColumnMaximum,
    RunTimeRange,
    SkewedToken,
    TokenMaximum,
)
from ptq_onnx.numerics.spec import Rule, Site


def run_time_rule(
    config: QuantizeConfig, site: Site, nodes: Mapping[str, ir.Node], value: ir.Value | None
) -> Rule:
    """One range for the whole tensor, or one for each vector that products sum over, where all read
    it alike; skewed for tokens that reach up. ``value``: the tensor, where a node makes it."""
    read = {
        index
        for name in site.consumers
        for index, data in enumerate(nodes[name].inputs[:2])
        if data is not None and data.name == site.tensor
    }
    if config.activations == "dynamic" or len(read) != 1:
        return Rule(BYTE, False, False, method="fixed", around=(RunTimeRange(),))
    bits = config.widths.activations
    if read == {0} and value is not None and reaches_up(value):
        skewed = (SkewedToken(),)
        stored = config.runtime.stored(False)
        return Rule(bits, False, False, method="fixed", around=skewed, stored=stored)
    vector = TokenMaximum() if read == {0} else ColumnMaximum()
    return Rule(bits, method="fixed", around=(vector,), stored=config.runtime.stored(True))
