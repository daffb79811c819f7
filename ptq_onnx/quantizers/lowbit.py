"""Lowbit: products of few bits, without training.

What is quantized is what ``deploy`` quantizes. Other than there, every channel has a range of its
own (``equalization/low_bits.py``); attention maps and what an activation function gives have
logarithmic codes below 8 bits; weights are rounded on what the linear reads of the quantized model
(``stream_weights.py``), those of up to 4 bits in blocks of rows (``numerics/multiples.py``); patch
embedding and head have 8 bits, unless ``--no-wide-ends``.

Sources: RepQ-ViT (arXiv 2212.08254) for a range per channel that ends up in the weights, AdaLog
(arXiv 2407.12951) for logarithms of free base, GPTQ (arXiv 2210.17323) for the rounding, QServe
(arXiv 2405.04532) for steps that are whole multiples of others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

from ptq_onnx.blocks.walking import ACTIVATIONS
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.selector import Selector
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.quantizers.deploy import Deploy
from ptq_onnx.quantizers.stream_weights import rounded_on_stream

LOGARITHMIC = Logarithmic()
ENDS = ("patch_embed", "head")
"""Roles that have 8 bits."""


class LowBit(Deploy):
    """See the module's text."""

    name: ClassVar[str] = "lowbit"
    map_code: ClassVar[Code] = LOGARITHMIC
    """Of attention maps below 8 bits."""
    hidden_code: ClassVar[Code] = LOGARITHMIC
    """Of what an activation function gives, below 8 bits."""

    def rule(self, site: Site) -> Rule | str:
        """Deploy's rule, with logarithmic codes and 8 bits where the module's text says."""
        rule = super().rule(site)
        if isinstance(rule, str):
            return rule
        rule = replace(rule, bits=self.width(site, rule.bits))
        wide = ENDS if self.plan.config.wide_ends else ()
        if site.role == "input" or any(self._concerns(Selector(role), site) for role in wide):
            return replace(rule, bits=max(rule.bits, BYTE))
        if rule.bits >= BYTE:
            return rule
        if site.is_parameter:
            return replace(rule, symmetric=False)
        if site.role == "softmax":
            around = (RowMaximum(), RowSums())
            if self.map_code == LOGARITHMIC:
                return replace(rule, signed=False, symmetric=False, code=LOGARITHMIC, around=around)
        made = None if site.producer is None else self.nodes[site.producer].op_type
        if made in ACTIVATIONS and self.hidden_code == LOGARITHMIC:
            return replace(rule, signed=False, symmetric=False, code=LOGARITHMIC)
        return rule

    def width(self, site: Site, bits: int) -> int:
        """Just as many as were named last, at most 8 of weights."""
        found = [number for s, number in self._named if self._concerns(s, site)]
        if not found:
            return bits
        return min(found[-1], BYTE) if site.is_parameter else found[-1]

    def calibrate(self, batches: Iterable[Any]) -> dict[str, TensorSpec]:
        """Specs; then weights and biases from a walk through the quantized model."""
        specs = self.solve(self.measure(batches))
        found = rounded_on_stream(self.plan, specs, batches)
        self.set_constants(found.constants)
        self.trained = found.trained
        self.notes += found.notes
        config = self.plan.config
        if config.method is not None and config.few_bits:
            self.notes.append(
                f"--method {config.method} counts for what has 8 bits; the ranges of fewer are"
                " searched on a sample (lowbit)."
            )
        return found.specs

    def reuse(self, specs: dict[str, TensorSpec], where: str) -> None:
        """Refused: the weights' rounding is in no report."""
        raise ConfigError(f"--scales {where}: lowbit rounds weights on images; calibrate anew.")
