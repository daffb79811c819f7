"""Checks whether a quantized ONNX file is what a runtime takes as it is.

Each target's folder has a module ``rules`` with a ``TARGET``: its rules in order. A new one is that
file, and its name in ``TARGETS``. Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ptq_onnx.errors import ConfigError
from ptq_onnx.targets.checking.result import Finding, Report, Skipped, Violation

if TYPE_CHECKING:
    import onnx_ir as ir

    from ptq_onnx.targets.checking.target import Target

__all__ = ["TARGETS", "Finding", "Report", "Skipped", "Violation", "check", "explain"]

TARGETS = (
    "tensorrt",
    "onnxruntime",
    "openvino",
    "integer",
    "qnn",
)


def check(
    model: str | Path | ir.Model, target: str, device: Mapping[str, str] | None = None
) -> Report:
    """Check a file, or a model in memory, against every rule of ``target``.

    ``device``: what the file is compiled for, where the target's rules compile it; for ``qnn``
    ``soc`` and ``htp_arch``.

    Raises ModelError where the file is missing or is not ONNX, ConfigError for a target that
    does not exist.
    """
    from ptq_onnx.targets.checking.quantized_model import open_model
    from ptq_onnx.targets.checking.target import rule_name

    rules = _target(target).rules
    subject = open_model(model)
    subject.device.update(device or {})
    violations: list[Violation] = []
    checked: list[str] = []
    skipped: dict[str, str] = {}
    for rule in rules:
        name = rule_name(rule)
        try:
            found = list(rule(subject))
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        checked.append(name)
        violations += (Violation(name, f.node, f.text, f.severity) for f in found)
    return Report(
        target,
        tuple(checked),
        tuple(violations),
        skipped,
        facts=_target(target).facts(subject),
        **subject.counts(sixteen_bits=_target(target).sixteen_bits),
    )


def explain(target: str) -> dict[str, str]:
    """What each rule of a target demands, and where the runtime's makers say so."""
    from ptq_onnx.targets.checking.target import rule_name, rule_text

    return {rule_name(rule): rule_text(rule) for rule in _target(target).rules}


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ConfigError(f"Target '{name}' is unknown; expected one of {', '.join(TARGETS)}.")
    target: Target = import_module(f"ptq_onnx.targets.{name}.rules").TARGET
    return target
