"""The whole job: a float ONNX file and images in, a quantized file with its report out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ptq_onnx.analysis.decibels import plain
from ptq_onnx.blocks.selectors import selectable
from ptq_onnx.calibration.class_output import feature_outputs
from ptq_onnx.config import stages
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import ONNXRUNTIME
from ptq_onnx.errors import PtqError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.files.publishing import workshop
from ptq_onnx.files.result_names import CONFIG, FLOAT, QUANTIZED
from ptq_onnx.files.stopped_runs import forget_stopped, left_by_stopped
from ptq_onnx.images.opening import Images
from ptq_onnx.numerics.scales_file import read_scales
from ptq_onnx.pipeline.analysing import Analysed, analyse, measure
from ptq_onnx.pipeline.deciding import check_normalisation, decide_floats, resolve_auto
from ptq_onnx.pipeline.description import describe, validation
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.lossy_regions import lossy, without_regions
from ptq_onnx.pipeline.made_images import are_unmade, with_made_images
from ptq_onnx.pipeline.preprocess_input import Given
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.reading import Inputs, read_inputs, without_images
from ptq_onnx.pipeline.request import Request
from ptq_onnx.pipeline.result import Result
from ptq_onnx.pipeline.rewriting import Rewritten, rewrite, tell_copies
from ptq_onnx.pipeline.sharing import with_workers_that_pay
from ptq_onnx.pipeline.writing import (
    coverage,
    formed,
    integer_costs,
    on_this_processor,
    optimised_ops,
    quantized_model,
    write_report,
)
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import own_faults
from ptq_onnx.progress import Progress, Stages
from ptq_onnx.runtime.devices import on_device
from ptq_onnx.runtime.processes import kept_processes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ptq_onnx.analysis.comparison_results import Automatic
    from ptq_onnx.analysis.results import Analysis
    from ptq_onnx.evaluation.recorded import Record
    from ptq_onnx.quantizers.base import Plan, SiteQuantizer

__all__ = ["Progress", "Result", "quantize", "read_scales", "resolve_preprocess"]


def quantize(
    model: str | Path,
    *,
    config: QuantizeConfig | None = None,
    output: str | Path = "output",
    calib: Images | None = None,
    val: Images | None = None,
    labels: str | Path | None = None,
    targets: str | Path | None = None,
    scales: str | Path | None = None,
    progress: Progress | None = None,
    keep_models: bool = True,
    given: Given | None = None,
) -> Result:
    """Quantize ``model`` with calibration images and write everything to ``output``.

    ``calib``: what :func:`open_images` takes; ``noise``: standard Gaussian ones; None is for the
    embedded model, which has images of its own, and for ``scales``. ``val`` and ``labels``: images
    to measure accuracy on; ``targets``: the truth of the config's metric. ``scales``: the
    report.json of an earlier run, whose numbers are used instead of calibrating. ``output``
    ``x.onnx`` is the quantized file, the folder ``x`` beside it gets the rest; any other name is a
    folder of everything, the model in it ``quantized.onnx``: ``fused.onnx``, ``formed.onnx`` where
    the model was changed before it was quantized, ``config.yaml``, ``report.json``, ``report.html``
    and ``attention/``; it is written beside and renamed, so a failure leaves nothing
    but blocks that were trained (``--reconstruct``), for the next run into the same folder.
    ``keep_models=False``: without the models. ``given``: a preprocessing that no option can name.
    Raises PtqError.
    """
    begin = Stages(progress)
    begin(stages.READING, 1)
    config = config or QuantizeConfig()
    request = Request(
        model=model,
        config=config,
        place=Output.at(output) if keep_models else Output.of_reports(output),
        calib=calib,
        val=val,
        labels=labels,
        targets=targets,
        scales=scales,
        given=given or Given(),
        keep_models=keep_models,
    )
    with on_device(config.device):
        request = without_images(request)
        return quantize_read(request, read_inputs(request), begin)


def quantize_read(request: Request, inputs: Inputs, begin: Stages) -> Result:
    """The same from what was read. Raises PtqError."""
    request, notes = with_workers_that_pay(request, inputs)
    load(request, inputs, begin)
    inputs = with_made_images(request, inputs, begin)
    with kept_processes(), workshop(request.place.folder) as work:
        job = Job(request, inputs, work, begin, [*inputs.notes, *notes])
        with faults_of(job):
            finished = run_stages(job)
        return published(job, finished)


def load(request: Request, inputs: Inputs, begin: Stages) -> None:
    """PPQ and torch, before anything is written: seconds, in which they swallow an interrupt."""
    made = len(inputs.images) if are_unmade(inputs.images) else 0
    begin.plan(stages.planned(request.config, len(inputs.tested or ()), made))
    begin(stages.LOADING, 1)
    importlib.import_module("ptq_onnx.engine.simulator")


def published(job: Job, finished: Finished) -> Result:
    """The result, its files in their place. Raises ConfigError."""
    request, place = job.request, job.request.place
    if not request.keep_models:
        _remove_models(job.work)
    files = place.publish(job.work)
    forget_stopped(place.folder)
    job.progress.done()
    model = place.model if request.keep_models else None
    return Result(finished.report, place.folder, files, finished.analysis, model)


@contextmanager
def faults_of(job: Job) -> Iterator[None]:
    """Let errors name the folder that was asked for, the one worked in being gone by then; those
    that nobody foresaw are a ModelError of one line."""
    output, work = str(job.request.place.folder), str(job.work)
    try:
        with own_faults(job.inputs.prepared.path, "quantized"):
            yield
    except PtqError as error:
        text = str(error).replace(work, output)
        if text == str(error):
            raise
        raise type(error)(text) from error


def _remove_models(work: Path) -> None:
    for name in ("quantized", "fused", "formed"):
        for path in work.glob(f"{name}.onnx*"):
            path.unlink()


@dataclass(frozen=True)
class Finished:
    """What ``report.json`` says, and the analysis as dataclasses, where there is one."""

    report: dict[str, Any]
    analysis: Analysis | None


@dataclass(frozen=True)
class Unmeasured:
    """What there is before the file runs: the report so far, the analysis, the outputs that are no
    classes, and a warning that leads the notes."""

    report: dict[str, Any]
    analysed: Analysed
    features: tuple[str, ...]
    warning: str | None


def run_stages(job: Job) -> Finished:
    """Every stage in turn, each on what those before it made; the files go to ``job.work``."""
    return measured(job, unmeasured(job))


def unmeasured(job: Job) -> Unmeasured:
    """The stages up to the quantized file and its analysis."""
    checked = None if job.request.scales is not None else check_normalisation(job)
    config = resolve_auto(job)
    graphs.save(job.as_taken(job.inputs.prepared.model), job.work / FLOAT)
    notes = list(job.notes)
    made, decided, quantizer, lowered = quantized(job, config)
    left = lossy(job, config, quantizer)
    if left is not None:
        job.notes[:] = notes
        job, config = without_regions(job, left), replace(config, convolutions=False)
        made, decided, quantizer, lowered = quantized(job, config)
    job.notes.extend(on_this_processor(config))
    report = describe(job, made, quantizer, lowered)
    report |= rewrites(made)
    report["trained"] = [asdict(one) for one in quantizer.trained]
    report["formed"] = formed(job, made, quantizer)
    report["validation"] = validation(job.inputs.tested, job.request.labels)
    report["invocation"] = asdict(job.request.invocation)
    report["auto"] = _as_dict(decided)
    report["preprocess_check"] = _as_dict(checked)
    if config.target == INTEGER and config.report:
        report["integer"] = integer_costs(job, made, quantizer, lowered)
    report["coverage"], warning = coverage(job, made, quantizer)
    if config.target == ONNXRUNTIME.name and config.report:
        report["optimised"] = optimised_ops(job)
    analysed = analyse(job, made, quantizer) if config.report else Analysed()
    report["analysis"] = None if analysed.analysis is None else analysed.analysis.to_json()
    features = tuple(feature_outputs(made.prepared.model))
    return Unmeasured(report, analysed, features, warning)


def measured(job: Job, made: Unmeasured, kept: Record | None = None) -> Finished:
    """The stages behind: the file in its runtime, and the report. ``kept``: its outputs, where it
    has run in parts."""
    report, warning = made.report, made.warning
    report |= measure(job, made.features, kept)
    report["notes"] = job.notes if warning is None else [warning, *job.notes]
    job.stage(stages.REPORTING, 1)
    finished = Finished(plain(report), made.analysed.analysis)
    write_report(job, finished.report, made.analysed)
    return finished


def quantized(
    job: Job, config: QuantizeConfig
) -> tuple[Rewritten, Automatic | None, SiteQuantizer, ir.Model]:
    """What is quantized, what ``--auto`` decided, by which numbers, and the model in its file."""
    made, decided = planned(job, config)
    quantizer = calibrated(job, made.plan)
    return made, decided, quantizer, written(job, made, quantizer)


def planned(job: Job, config: QuantizeConfig) -> tuple[Rewritten, Automatic | None]:
    """What is quantized: the rewritten model, its sites, and what ``--auto`` decides."""
    from ptq_onnx.quantizers.base import Plan

    tell_copies(job)
    prepared = job.inputs.prepared
    plan = Plan(prepared.model, prepared.blocks, prepared.sites, config, job.stage)
    plan = replace(plan, named=selectable(prepared.blocks, prepared.sites))
    if config.reconstruct:
        plan = replace(plan, kept=left_by_stopped(job.request.place.folder))
    made = rewrite(job, plan)
    if not config.auto:
        return made, None
    plan, decided = decide_floats(job, made.plan)
    return replace(made, plan=plan), decided


def calibrated(job: Job, plan: Plan) -> SiteQuantizer:
    """The quantizer of the plan, its numbers from the images or from an earlier run's report."""
    from ptq_onnx.equalization.experts import left_in_float
    from ptq_onnx.quantizers.by_name import make_quantizer
    from ptq_onnx.quantizers.idle_options import idle_options

    quantizer, scales = make_quantizer(plan), job.request.scales
    job.notes.extend(idle_options(job.request.config, quantizer))
    if scales is not None:
        quantizer.reuse(read_scales(scales), str(scales))
    images = job.inputs.images
    job.calibrate(quantizer, images)
    job.notes.extend(quantizer.notes)
    stacks = [f"'{value.name}' {reason}" for value, _, reason in left_in_float(plan.model)]
    if stacks:
        more = f" (and {len(stacks) - 1} more)" if len(stacks) > 1 else ""
        job.notes.append(f"The constant {stacks[0]}{more}.")
    if images.skipped:
        job.notes.append(
            f"{len(images.skipped)} calibration images could not be read and were"
            f" skipped, the first: {images.skipped[0]}."
        )
    return quantizer


def written(job: Job, made: Rewritten, quantizer: SiteQuantizer) -> ir.Model:
    """The quantized model, which is in its file by then, as are the options decided on."""
    job.stage(stages.WRITING, 1)
    lowered = quantized_model(job, made, quantizer)
    own = job.config.runtime.fixed_batch  # the file's batch is the target's
    graphs.save(lowered if own else job.as_taken(lowered), job.work / QUANTIZED)
    (job.work / CONFIG).write_text(made.plan.config.to_yaml(), encoding="utf-8")
    return lowered


def rewrites(made: Rewritten) -> dict[str, Any]:
    """What the report says of the float rewrites, and how far they are off the original."""
    return {
        "equalization": {
            "forms": dict(made.plan.forms),
            "moves": [asdict(move) for move in made.plan.moves],
        },
        "rotation": None if made.turns is None else made.turns.to_json(),
        "tokens": [asdict(one) for one in made.tokens],
        "pieces": [asdict(one) for one in made.pieces],
        "mixed": _as_dict(made.mixed),
        "parity": asdict(made.parity),
    }


def _as_dict(found: DataclassInstance | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
