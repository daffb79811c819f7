"""What a target is to the checker: its rules, in order, and its own counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Facts, Finding

Rule = Callable[[QuantizedModel], Iterator[Finding]]
Count = Callable[[QuantizedModel], Facts]


def no_facts(_: QuantizedModel) -> Facts:
    """A target that counts nothing of its own."""
    return {}


@dataclass(frozen=True)
class Target:
    """``rules`` run in order; ``facts`` counts what only this target has; ``sixteen_bits``: its
    products are of codes of up to those."""

    rules: tuple[Rule, ...]
    facts: Count = no_facts
    sixteen_bits: bool = False


def rule_name(rule: Rule) -> str:
    """``zero_point_zero`` is the rule ``zero-point-zero``."""
    return rule.__name__.replace("_", "-")


def rule_text(rule: Rule) -> str:
    """What the runtime demands and where that is written, on one line."""
    return " ".join((inspect.getdoc(rule) or "").split())
