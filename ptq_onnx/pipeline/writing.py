"""The files of a run: the quantized model, the float one that it was made from, the report."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ModelError
from ptq_onnx.files.result_names import FLOAT, FORMED, PAGE, QUANTIZED, REPORT
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.rewriting import EQUALISATION
from ptq_onnx.preparation import model_files as graphs

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import Plan, SiteQuantizer
    from ptq_onnx.report.attention_page import Sheet

SEEN_IMAGES = 2
"""Images on which the ranges of an integer file's tensors are seen, beside those proved."""


def quantized_model(job: Job, quantizer: SiteQuantizer, config: QuantizeConfig) -> ir.Model:
    """The model of the target's file, not yet written. Raises ModelError."""
    from ptq_onnx.preparation.batch import with_batch
    from ptq_onnx.qdq.half import to_float16
    from ptq_onnx.qdq.lowering import lower
    from ptq_onnx.qdq.units import complete

    if config.target == INTEGER:
        return integer_file(job, quantizer)
    lowered = lower(quantizer.model, quantizer.specs)
    if config.runtime.fixed_batch:
        lowered = with_batch(lowered, config.batch_size)
    if config.runtime.all_codes:
        job.notes.extend(notes_on_floats(complete(lowered), config.target))
    if not config.float16:
        return lowered
    job.notes.append(
        "--float16: quantized.onnx computes its float part in 16 bits; the analysis computes in 32."
    )
    return to_float16(lowered)


def notes_on_floats(left: list[str], target: str) -> list[str]:
    """What an NPU's file computes in float, though all of it should be codes."""
    if not left:
        return []
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(left).most_common())
    return [
        f"--target {target}: no codes are known for what these make: {kinds}; `check` tells"
        " what the runtime makes of them."
    ]


def formed(job: Job, plan: Plan, quantizer: SiteQuantizer) -> str:
    """The file of the float model whose tensors the report names: equalised, in the target's
    form, its weights rounded and biases corrected. Not written where nothing was changed."""
    turned = job.turns is not None and job.turns.changed
    undone = () if job.parity is None else job.parity.undone
    equalised = job.config.equalizes and EQUALISATION not in undone
    changed = turned or equalised or any(plan.forms.values())
    if not changed and quantizer.model is plan.model:
        return FLOAT
    graphs.save(job.as_taken(quantizer.model), job.work / FORMED)
    return FORMED


def integer_file(job: Job, quantizer: SiteQuantizer) -> ir.Model:
    """The integer file, checked against its own rules. Raises ModelError."""
    from ptq_onnx.targets.integer.lowering import lower_integer
    from ptq_onnx.targets.integer.rules import violations

    config = job.config
    lowered = lower_integer(
        job.prepared.model, quantizer.specs, config.multiplier_bits, config.gelu
    )
    broken = violations(lowered)
    if broken:
        raise ModelError(f"Node '{broken[0].node}' ({broken[0].rule}): {broken[0].text}")
    return lowered


def integer_costs(job: Job, quantizer: SiteQuantizer, lowered: ir.Model) -> dict[str, Any]:
    """Widths, operations and traffic of an integer file, with ranges seen on images."""
    from ptq_onnx.analysis.integer_costs import integer_report

    first = next(iter(job.batches(job.images, SEEN_IMAGES)))
    return integer_report(job.prepared.model, quantizer.specs, lowered, [first])


def coverage(job: Job, quantizer: SiteQuantizer) -> dict[str, Any]:
    """What of the written file runs in integers; a warning stands before all other notes."""
    from ptq_onnx.analysis.coverage import float_reasons, measure_coverage, whole_coverage

    config, sites = job.config, job.prepared.sites
    if config.target == INTEGER:
        return whole_coverage(job.prepared.model).to_json()
    consumers = {tensor: site.consumers for tensor, site in sites.items()}
    reasons = float_reasons(quantizer.floats, consumers)
    found = measure_coverage(job.work / QUANTIZED, config.target, reasons)
    if found.warning is not None:
        job.notes.insert(0, found.warning)
    return found.to_json()


def write_report(job: Job, report: dict[str, Any], pictures: list[Sheet]) -> None:
    text = json.dumps(report, indent=1, allow_nan=False, default=float)
    (job.work / REPORT).write_text(text, encoding="utf-8")
    if not job.config.report:
        return
    from ptq_onnx.analysis.results import OpError
    from ptq_onnx.report.page import render
    from ptq_onnx.report.plots import snr_over_blocks

    ops = [OpError(**op) for op in report["analysis"]["ops"]]
    narrow = snr_over_blocks(ops, narrow=True)
    page = render(report, snr_over_blocks(ops), [], job.picture, narrow=narrow, sheets=pictures)
    (job.work / PAGE).write_text(page, encoding="utf-8")
