"""Widths of single modules, chosen before the model is rewritten for them (``auto/mixing.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ptq_onnx.config import stages
from ptq_onnx.pipeline.job import Job

if TYPE_CHECKING:
    from ptq_onnx.analysis.mixed_results import Mixed
    from ptq_onnx.numerics.spec import TensorSpec
    from ptq_onnx.quantizers.base import Plan, SiteQuantizer

IMAGES = 16
"""Calibration images that the noise of modules is measured on, at most."""


def with_mixed_widths(job: Job, plan: Plan, rewritten: Plan) -> tuple[Plan, Mixed]:
    """The plan with a config that names the width of each module. ``rewritten``: the plan for a
    copy of its model, equalised for the widths of ``--bits``. Raises ConfigError."""
    from ptq_onnx.analysis.sensitivity import load
    from ptq_onnx.auto.mixing import mix
    from ptq_onnx.quantizers.by_name import make_quantizer

    quantizer = make_quantizer(replace(rewritten, progress=None))
    specs = quantizer.solve(quantizer.measure(job.batches()))
    few = load(job.inputs.images.reopened(IMAGES), job.fixed, job.config.batch)
    config, mixed = mix(
        quantizer,
        specs,
        few,
        lambda: megabytes(quantizer, specs),
        lambda groups: job.stage(stages.MIXING, groups),
    )
    job.notes.append(told(mixed))
    return replace(plan, config=config), mixed


def megabytes(quantizer: SiteQuantizer, specs: Mapping[str, TensorSpec]) -> float:
    """Million bytes of the file with these specs."""
    from ptq_onnx.numerics.multiples import WIDEST, beside_codes
    from ptq_onnx.preparation import sizes
    from ptq_onnx.preparation.model_files import serialize, to_standard
    from ptq_onnx.qdq.four_bits import store_in_four_bits
    from ptq_onnx.qdq.lowering import lower

    lowered = lower(quantizer.model, specs)
    more = 0
    if quantizer.plan.config.runtime.widens_weights:
        store_in_four_bits(lowered)
        few = (quantizer.plan.sites[t] for t, s in specs.items() if s.rule.bits <= WIDEST)
        more = sum(beside_codes(s.shape) for s in few if s.is_parameter and len(s.shape) == 2)
    constants = sizes.serialized_size(to_standard(lowered))
    held = constants if constants > sizes.EXTERNAL_LIMIT else len(serialize(lowered))
    return (held + more) / 1e6


def told(mixed: Mixed) -> str:
    """What was mixed, in a sentence."""
    widths = sorted({m.bits for m in mixed.modules})
    return (
        f"Mixed: {len(mixed.modules)} groups of weights or activations have"
        f" {widths[0]} to {widths[-1]} bits, {mixed.weights[1]:.2f} in the mean of weights and"
        f" {mixed.activations[1]:.2f} of activations (--bits: {mixed.weights[0]:.2f} and"
        f" {mixed.activations[0]:.2f}), by {mixed.by}."
    )
