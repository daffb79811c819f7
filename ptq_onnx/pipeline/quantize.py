"""The whole job: a float ONNX file and images in, a quantized file with its report out."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq_onnx.blocks.selectors import check_selectors, known_roles
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.config import stages
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, PtqError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.files.publishing import workshop
from ptq_onnx.files.result_names import CONFIG, FLOAT, QUANTIZED
from ptq_onnx.images.opening import METADATA_KEY, Images, open_images
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.scales_file import read_scales
from ptq_onnx.pipeline import embedded
from ptq_onnx.pipeline.analysing import analyse, measure
from ptq_onnx.pipeline.calibration_images import calibration_images
from ptq_onnx.pipeline.deciding import check_normalisation, decide_floats, resolve_auto
from ptq_onnx.pipeline.description import describe, validation
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.preprocess_input import Given
from ptq_onnx.pipeline.preprocessing import preprocess_notes, resolve_preprocess
from ptq_onnx.pipeline.request_checks import check_attention_blocks, check_blocks, labels_of
from ptq_onnx.pipeline.result import Result
from ptq_onnx.pipeline.rewriting import rewrite, tell_copies
from ptq_onnx.pipeline.writing import coverage, formed, integer_costs, quantized_model, write_report
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.input_size import try_size
from ptq_onnx.preparation.model_input import typed_name
from ptq_onnx.preparation.prepare import own_faults, prepare
from ptq_onnx.preparation.signature import signature
from ptq_onnx.progress import Progress, Stages
from ptq_onnx.report.reproduce import Invocation, named

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ptq_onnx.analysis.comparison_results import Automatic
    from ptq_onnx.quantizers.base import Plan, SiteQuantizer
    from ptq_onnx.report.attention_page import Sheet

__all__ = ["Progress", "Result", "quantize", "read_scales", "resolve_preprocess"]


def quantize(
    model: str | Path,
    *,
    config: QuantizeConfig | None = None,
    output: str | Path = "output",
    calib: Images | None = None,
    val: Images | None = None,
    labels: str | Path | None = None,
    scales: str | Path | None = None,
    progress: Progress | None = None,
    keep_models: bool = True,
    given: Given | None = None,
) -> Result:
    """Quantize ``model`` with calibration images and write everything to ``output``.

    ``calib``: what :func:`open_images` takes; ``noise``: standard Gaussian ones; None is for the
    embedded model, which has images of its own, and for ``scales``. ``val`` and ``labels``: images
    to measure accuracy on. ``scales``: the report.json of an earlier run, whose numbers are used
    instead of calibrating. ``output`` ``x.onnx`` is the quantized file, the folder ``x`` beside it
    gets the rest; any other name is a folder of everything, the model in it ``quantized.onnx``:
    ``fused.onnx``, ``formed.onnx`` where the model was changed before it was quantized,
    ``config.yaml``, ``report.json``, ``report.html`` and ``attention/``; it is written beside and
    renamed, so a failure leaves nothing. ``keep_models=False``: without the models. ``given``: a
    preprocessing that no option can name. Raises PtqError.
    """
    config = config or QuantizeConfig()
    begin = Stages(progress)
    begin(stages.READING, 1)
    place = Output.at(output) if keep_models else Output.of_reports(output)
    place.keep(model=model, calib=calib, val=val, labels=labels, scales=scales)
    output = place.folder
    if not keep_models and place.model.exists():
        raise ConfigError(
            f"--output {output} holds a quantized model, which the analysis would replace;"
            " name another folder."
        )
    asked = calib
    if calib is None:
        calib = val if scales is not None and val is not None else embedded.images_for(model)
    prepared = prepare(model, config.opset, config.size, free=True)
    check_selectors(config, prepared.blocks, prepared.sites)
    notes = list(prepared.cleaned.notes)
    check_blocks(prepared, config)
    check_attention_blocks(prepared, config)
    if config.auto and scales is not None:
        raise ConfigError(
            f"--scales {scales}: --auto decides what is quantized, so that the scales of another"
            " run do not fit; leave one out."
        )
    given = given or Given()
    preprocess = resolve_preprocess(prepared.model, config, given, prepared.path)
    notes += preprocess_notes(prepared, config, given)
    try_size(prepared.model, prepared.path, image_input(prepared.model), preprocess.shape)
    if given.transform is None:
        prepared.model.metadata_props[METADATA_KEY] = preprocess.to_json()
    else:
        prepared.model.metadata_props.pop(METADATA_KEY, None)
    own = signature(prepared.model)
    name = image_input(prepared.model).name if own is None else own.name
    how: dict[str, Any] = {"transform": given.transform, "name": name}
    images = calibration_images(calib, preprocess, config, notes, how)
    if labels is not None and val is None:
        raise ConfigError("--labels without --val: name the folder of the labelled images too.")
    tested = None if val is None else open_images(val, preprocess, **how)
    truth = None if tested is None else labels_of(tested, labels, prepared, notes)
    if config.max_drop is not None and truth is None:
        raise ConfigError(
            "--max-drop: top-1 needs labelled images, --val DIR and --labels FILE; without,"
            " bound the logits with --min-sqnr."
        )
    begin.plan(stages.planned(config, 0 if tested is None else len(tested)))
    begin(stages.LOADING, 1)
    # PPQ and torch, before anything is written: seconds, in which they swallow an interrupt
    importlib.import_module("ptq_onnx.engine.simulator")

    with workshop(output) as work:
        job = Job(prepared, config, preprocess, images, notes, work, begin, labels=labels)
        job.again = lambda: prepare(prepared.path, config.opset, config.size, free=True)
        job.validation = validation(tested, labels)
        job.invocation = Invocation(
            command="quantize" if keep_models else "analyse",
            model=named(typed_name(model)) or str(model),
            calib=named(asked),
            val=named(val),
            labels=named(labels),
            scales=named(scales),
            folder=named(output) or str(output),
            written=named(place.model) if keep_models else None,
        )
        try:
            with own_faults(prepared.path, "quantized"):
                report = run_stages(job, tested, truth, scales)
        except PtqError as error:  # the folder that it may name is gone by then
            text = str(error).replace(str(work), str(output))
            if text == str(error):
                raise
            raise type(error)(text) from error
        if not keep_models:
            for name in ("quantized", "fused", "formed"):
                for path in work.glob(f"{name}.onnx*"):
                    path.unlink()
        files = place.publish(work)
        begin.done()
    return Result(report, output, files, job.analysis, place.model if keep_models else None)


def run_stages(
    job: Job, tested: ImageSource | None, truth: Any, scales: str | Path | None
) -> dict[str, Any]:
    """Every stage in turn; returns what ``report.json`` says."""
    from ptq_onnx.analysis.decibels import plain

    checked = None if scales is not None else check_normalisation(job)
    config = resolve_auto(job)
    graphs.save(job.as_taken(job.prepared.model), job.work / FLOAT)
    plan, decided = planned(job, config, tested, truth, scales)
    config = plan.config
    quantizer = calibrated(job, plan, scales)
    job.stage(stages.WRITING, 1)
    lowered = quantized_model(job, quantizer, config)
    quantized = job.work / QUANTIZED
    graphs.save(job.as_taken(lowered), quantized)
    (job.work / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    report = describe(
        job.prepared, quantizer, config, job.preprocess, job.images, job.work,
        reused=scales is not None,
    )  # fmt: skip
    report["equalization"] = {
        "forms": dict(plan.forms),
        "moves": [asdict(move) for move in plan.moves],
    }
    report["rotation"] = None if job.turns is None else job.turns.to_json()
    report["parity"] = _as_dict(job.parity)
    report["formed"] = formed(job, plan, quantizer)
    report["validation"] = job.validation
    report["invocation"] = _as_dict(job.invocation)
    report["auto"] = _as_dict(decided)
    report["preprocess_check"] = _as_dict(checked)
    if config.target == INTEGER and config.report:
        report["integer"] = integer_costs(job, quantizer, lowered)
    report["coverage"] = coverage(job, quantizer)
    if config.target == "onnxruntime" and config.report:
        from ptq_onnx.targets.checking.optimised import optimised_histogram

        report["optimised"] = optimised_histogram(quantized)
    analysed: dict[str, Any] = {"analysis": None, "accuracy": None, "fidelity": None}
    pictures: list[Sheet] = []
    if config.report:
        analysed, pictures = analyse(job, quantizer, tested)
    analysed.update(measure(job, tested, truth))
    report.update(analysed)
    report["notes"] = job.notes
    job.stage(stages.REPORTING, 1)
    written: dict[str, Any] = plain(report)
    write_report(job, written, pictures)
    return written


def planned(
    job: Job,
    config: QuantizeConfig,
    tested: ImageSource | None,
    truth: Any,
    scales: str | Path | None,
) -> tuple[Plan, Automatic | None]:
    """What is quantized: the rewritten model, its sites, and what ``--auto`` decides."""
    from ptq_onnx.quantizers.base import Plan

    tell_copies(job)
    prepared = job.prepared
    plan = Plan(prepared.model, prepared.blocks, prepared.sites, config, job.stage)
    plan = replace(plan, named=known_roles(prepared.blocks, prepared.sites))
    plan = rewrite(job, plan, scales)
    if not config.auto:
        return plan, None
    return decide_floats(job, plan, tested, labelled=truth is not None)


def calibrated(job: Job, plan: Plan, scales: str | Path | None) -> SiteQuantizer:
    """The quantizer of the plan, its numbers from the images or from an earlier run's report."""
    from ptq_onnx.equalization.experts import left_in_float
    from ptq_onnx.quantizers.by_name import make_quantizer

    quantizer = make_quantizer(plan)
    if scales is not None:
        quantizer.reuse(read_scales(scales), str(scales))
    job.calibrate(quantizer, job.images)
    job.notes.extend(quantizer.notes)
    stacks = [f"'{value.name}' {reason}" for value, _, reason in left_in_float(plan.model)]
    if stacks:
        more = f" (and {len(stacks) - 1} more)" if len(stacks) > 1 else ""
        job.notes.append(f"The constant {stacks[0]}{more}.")
    if job.images.skipped:
        job.notes.append(
            f"{len(job.images.skipped)} calibration images could not be read and were"
            f" skipped, the first: {job.images.skipped[0]}."
        )
    return quantizer


def _as_dict(found: DataclassInstance | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
