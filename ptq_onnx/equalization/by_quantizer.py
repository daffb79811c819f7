"""What the quantizers do to the float model before they quantize it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ptq_onnx.equalization.equalize import equalise_in_place
from ptq_onnx.equalization.low_bits import step_in_place
from ptq_onnx.quantizers.base import Plan


def rewrite_in_place(plan: Plan, batches: Iterable[Any]) -> Plan:
    """The plan for its own model, equalised for its quantizer; batches [B, C, H, W]."""
    way = step_in_place if plan.config.quantizer == "lowbit" else equalise_in_place
    return way(plan, batches)


def rewritten(plan: Plan, batches: Iterable[Any]) -> Plan:
    """The same for a copy of the model."""
    return rewrite_in_place(replace(plan, model=plan.model.clone()), batches)
