"""The files of a run: the quantized model, the float one that it was made from, the report."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.names import INTEGER, VNNI
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ModelError
from ptq_onnx.files.result_names import FLOAT, FORMED, PAGE, QUANTIZED, REPORT
from ptq_onnx.pipeline.analysing import Analysed
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.rewriting import EQUALISATION, Rewritten
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.runtime.processor import sums_saturate

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import SiteQuantizer

SEEN_IMAGES = 2
"""Images on which the ranges of an integer file's tensors are seen, beside those proved."""


def quantized_model(job: Job, made: Rewritten, quantizer: SiteQuantizer) -> ir.Model:
    """The model of the target's file, not yet written. Raises ModelError."""
    from ptq_onnx.preparation.batch import with_batch
    from ptq_onnx.qdq.four_bits import store_in_four_bits
    from ptq_onnx.qdq.half import to_float16
    from ptq_onnx.qdq.kernel_forms import suit_kernels
    from ptq_onnx.qdq.lowering import lower
    from ptq_onnx.qdq.turned_codes import turn_behind_codes
    from ptq_onnx.qdq.units import complete

    config = made.plan.config
    if config.target == INTEGER:
        return integer_file(config, made, quantizer)
    lowered = lower(quantizer.model, quantizer.specs)
    if config.runtime.kernel_forms:
        suit_kernels(lowered, signed=config.cpu == VNNI)
    if config.runtime.turned_codes:
        turn_behind_codes(lowered)
    if config.runtime.widens_weights:
        store_in_four_bits(lowered)
    if config.runtime.fixed_batch:
        shape = job.inputs.preprocess.shape
        job.notes.extend(notes_on_sizes(lowered, shape, config.target))
        lowered = with_batch(lowered, job.fixed or config.batch_size, shape)
    if config.runtime.all_codes:
        job.notes.extend(notes_on_floats(complete(lowered), config.target))
    if not config.float16:
        return lowered
    job.notes.append(
        "--float16: quantized.onnx computes its float part in 16 bits; the analysis computes in 32."
    )
    return to_float16(lowered)


def notes_on_sizes(model: ir.Model, shape: tuple[int, int, int], target: str) -> list[str]:
    """What the file takes alone, where the model takes images of several sizes."""
    dims = list(image_input(model).shape or ())[1:]
    if len(dims) != len(shape) or all(isinstance(d, int) for d in dims):
        return []
    return [
        f"--target {target}: the file takes images of {shape[1]}x{shape[2]} alone, all sizes in it"
        " are fixed; --size HxW gives another."
    ]


def notes_on_floats(left: list[str], target: str) -> list[str]:
    """What an NPU's file computes in float, though all of it should be codes."""
    if not left:
        return []
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(left).most_common())
    return [
        f"--target {target}: no codes are known for what these make: {kinds}; `check` tells"
        " what the runtime makes of them."
    ]


def formed(job: Job, made: Rewritten, quantizer: SiteQuantizer) -> str:
    """The file of the float model whose tensors the report names: equalised, in the target's
    form, its weights rounded and biases corrected. Not written where nothing was changed."""
    turned = made.turns is not None and made.turns.changed
    equalised = job.config.equalizes and EQUALISATION not in made.parity.undone
    rewritten = made.pieces or made.tokens
    changed = turned or bool(rewritten) or equalised or any(made.plan.forms.values())
    if not changed and quantizer.model is made.plan.model:
        return FLOAT
    graphs.save(job.as_taken(quantizer.model), job.work / FORMED)
    return FORMED


def integer_file(config: QuantizeConfig, made: Rewritten, quantizer: SiteQuantizer) -> ir.Model:
    """The integer file, checked against its own rules. Raises ModelError."""
    from ptq_onnx.targets.integer.lowering import lower_integer
    from ptq_onnx.targets.integer.rules import violations

    lowered = lower_integer(
        made.prepared.model, quantizer.specs, config.multiplier_bits, config.gelu
    )
    broken = violations(lowered)
    if broken:
        raise ModelError(f"Node '{broken[0].node}' ({broken[0].rule}): {broken[0].text}")
    return lowered


def integer_costs(
    job: Job, made: Rewritten, quantizer: SiteQuantizer, lowered: ir.Model
) -> dict[str, Any]:
    """Widths, operations and traffic of an integer file, with ranges seen on images."""
    from ptq_onnx.analysis.integer_costs import integer_report

    first = next(iter(job.batches(size=SEEN_IMAGES)))
    return integer_report(made.prepared.model, quantizer.specs, lowered, [first])


def coverage(
    job: Job, made: Rewritten, quantizer: SiteQuantizer
) -> tuple[dict[str, Any], str | None]:
    """What of the written file runs in integers, and a warning where that is too little."""
    from ptq_onnx.analysis.coverage import float_reasons, measure_coverage, whole_coverage

    config, sites = job.config, made.prepared.sites
    if config.target == INTEGER:
        return whole_coverage(made.prepared.model).to_json(), None
    consumers = {tensor: site.consumers for tensor, site in sites.items()}
    reasons = {**float_reasons(quantizer.floats, consumers), **quantizer.float_nodes}
    found = measure_coverage(job.work / QUANTIZED, config.target, reasons)
    return found.to_json(), found.warning


def on_this_processor(config: QuantizeConfig) -> list[str]:
    """A note where this machine's int8 kernels add up in less than the file is made for."""
    exposed = config.runtime.sixteen_bit_sums and config.cpu == VNNI
    if not exposed or config.widths.weights < BYTE or config.weight_only or not sums_saturate():
        return []
    return [
        "This processor has no VNNI: ONNX Runtime's int8 kernels add up in 16 bits here, which"
        " saturate, so that the file is less accurate than on others; --cpu older makes one that"
        " is the same on both."
    ]


def optimised_ops(job: Job) -> dict[str, int]:
    """How often each op stands in the graph that ONNX Runtime makes of the quantized file."""
    from ptq_onnx.targets.checking.optimised import optimised_histogram

    return optimised_histogram(job.work / QUANTIZED)


def write_report(job: Job, report: dict[str, Any], analysed: Analysed) -> None:
    """``report.json``, and the page that is drawn from it where one was asked for."""
    text = json.dumps(report, indent=1, allow_nan=False, default=float)
    (job.work / REPORT).write_text(text, encoding="utf-8")
    if not job.config.report:
        return
    from ptq_onnx.analysis.results import OpError
    from ptq_onnx.report.page import render
    from ptq_onnx.report.plots import snr_over_blocks

    ops = [OpError(**op) for op in report["analysis"]["ops"]]
    narrow = snr_over_blocks(ops, narrow=True)
    page = render(
        report,
        snr_over_blocks(ops),
        [],
        analysed.picture,
        narrow=narrow,
        sheets=list(analysed.sheets),
    )
    (job.work / PAGE).write_text(page, encoding="utf-8")
