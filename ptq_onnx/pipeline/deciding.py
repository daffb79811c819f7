"""What is decided before numbers are: whether the preprocessing fits, and what ``auto`` finds."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ptq_onnx.calibration.class_output import logits_output
from ptq_onnx.calibration.preprocess_check import MOST, PreprocessCheck, check_preprocess
from ptq_onnx.config import stages
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import AUTO
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.files.result_names import FLOAT
from ptq_onnx.images.opening import FolderSource
from ptq_onnx.pipeline import embedded
from ptq_onnx.pipeline.job import Job
from ptq_onnx.preparation.model_sessions import open_plain

if TYPE_CHECKING:
    from ptq_onnx.analysis.comparison_results import Automatic
    from ptq_onnx.quantizers.base import Plan

log = logging.getLogger(__name__)


def check_normalisation(job: Job) -> PreprocessCheck | None:
    """Whether another normalisation suits the model better; None where that cannot be told.

    It takes pictures of the user's own, and a transformer with an output of logits: features
    have no classes to be sure of.
    """
    source, prepared = job.inputs.images, job.inputs.prepared
    model = prepared.model
    logits = logits_output(model)
    if not (job.config.check_preprocess and logits and isinstance(source, FolderSource)):
        return None
    if source.root.resolve() == embedded.IMAGES or not source.pictures:
        return None
    if job.inputs.preprocess.raw:  # there is no normalisation to be wrong
        return None
    if prepared.blocks.count == 0:  # without LayerNorm, larger inputs alone make it surer
        return None
    from ptq_onnx.evaluation.network import Classifier

    job.stage(stages.CHECKING, 1)
    channels = job.inputs.preprocess.channels
    plain = replace(job.inputs.preprocess, mean=(0.0,) * channels, std=(1.0,) * channels)
    few = source.reopened(MOST, plain)  # however few calibration takes
    pictures = np.concatenate(list(few.batches(8)))
    try:
        opened = open_plain(model, job.config.threads)
        classifier = Classifier(opened, output=logits)
        found = check_preprocess(classifier, pictures, job.inputs.preprocess)
    except ModelError:  # no classifier after all
        return None
    if found.warning is not None:
        job.notes.append(found.warning)
        log.warning(found.warning)
    return found


def resolve_auto(job: Job) -> QuantizeConfig:
    """Replace ``--per-channel auto`` by the blocks that calibration picks."""
    config = job.config
    if AUTO not in config.per_channel:
        return config
    from ptq_onnx.calibration.methods import collect
    from ptq_onnx.quantizers.channelwise import widest_blocks

    sites = [s for s in job.inputs.prepared.sites.values() if s.role in ("gelu", "fc2")]
    if not sites:
        raise ConfigError("--per-channel auto: the model has no fc2 to choose from.")
    stats = collect(
        job.inputs.prepared.model,
        sites,
        job.batches(),
        threads=config.threads,
        progress=job.stage(stages.CHANNELS),
    )
    selector, text = widest_blocks(stats, job.inputs.prepared.sites, job.inputs.prepared.blocks)
    job.notes.append(text)
    others = tuple(t for t in config.per_channel if t != AUTO)
    return replace(config, per_channel=(*others, str(selector)))


def decide_floats(job: Job, plan: Plan) -> tuple[Plan, Automatic]:
    """The plan with what ``--auto`` decides, on ``--val`` or on images held out."""
    from ptq_onnx.analysis.sensitivity import load
    from ptq_onnx.auto.decide import Evidence, decide, notes_on
    from ptq_onnx.images.labels import labels_for

    few, apart = job.held_apart
    tested, labels = job.inputs.tested, job.request.labels
    labelled = job.inputs.truth is not None
    images = few if tested is None else tested
    evidence = Evidence(
        reference=job.work / FLOAT,
        images=images,
        labels_of=(lambda n: labels_for(images, labels, n)) if labelled else None,
        held_apart=apart or tested is not None,
        sample=load(few, job.fixed, job.config.batch),
        work=job.work,
        metric=job.metric(images),
    )
    plan, found = decide(plan, job.batches(), evidence, job.progress)
    job.notes.extend(notes_on(found))
    return plan, found
