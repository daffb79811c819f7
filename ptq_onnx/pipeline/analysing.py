"""What a run measures: every op, attention in pictures, the file in its runtime."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptq_onnx.config import stages
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.files.file_names import short_stem
from ptq_onnx.files.result_names import FLOAT, PICTURES, QUANTIZED
from ptq_onnx.images.source import NOISE
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.rewriting import Rewritten

if TYPE_CHECKING:
    from ptq_onnx.analysis.results import Analysis
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.evaluation.recorded import Record
    from ptq_onnx.quantizers.base import SiteQuantizer
    from ptq_onnx.report.attention_page import Sheet

BESIDE_IMAGES = 8
"""Images that the quantizer whose attention is drawn beside is calibrated on, at most."""


@dataclass(frozen=True)
class Analysed:
    """What the analysis found; nothing where none was asked for."""

    analysis: Analysis | None = None
    sheets: tuple[Sheet, ...] = ()
    """Attention pictures."""
    picture: Path | None = None
    """The image whose attention is drawn, as the model sees it."""


def analyse(job: Job, made: Rewritten, quantizer: SiteQuantizer) -> Analysed:
    """All analyses on images held out from calibration, and attention pictures."""
    from ptq_onnx.analysis.analyse import Subject, analyse_quantized
    from ptq_onnx.engine.simulator import Simulator

    prepared, config = made.prepared, job.config
    source, apart = job.held_apart
    simulator = simulator_of(job, made, quantizer)
    # Quantizers may correct constants in a copy of the prepared model.
    model = quantizer.model
    analysis = analyse_quantized(
        Subject(model, quantizer, prepared.blocks, prepared.sites, simulator, prepared.model),
        source,
        held_apart=apart,
        full=config.sensitivity,
        fixed=job.fixed,
        batch=config.batch,
        threads=config.threads,
        workers=config.workers,
        stage=job.stage,
    )
    if not (config.pictures and prepared.blocks.count):
        return Analysed(analysis)
    reference = Simulator(prepared.model, None, threads=config.threads)
    sheets, picture = draw_attention_pictures(job, made, simulator, reference)
    return Analysed(analysis, sheets, picture)


def simulator_of(job: Job, made: Rewritten, quantizer: SiteQuantizer) -> Simulator:
    """The exact simulator, in integer arithmetic where asked for."""
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.targets.integer.simulated_steps import integer_overrides

    overrides: dict[str, Any] = {}
    left: list[str] = []
    if job.config.arithmetic == "integer":
        overrides, left = integer_overrides(
            made.prepared.model,
            quantizer.specs,
            job.config.multiplier_bits,
            job.config.gelu,
        )
        if job.config.target != INTEGER:
            job.notes.append(
                "The analysis simulates integer arithmetic, that of --target integer;"
                " quantized.onnx, as any file for onnxruntime, computes LayerNorm and softmax"
                " in float between quantized codes, and so does the module-by-module part of"
                " the analysis."
            )
    if left:
        job.notes.append(
            f"{len(left)} ops stay in float arithmetic, because a tensor around them does or"
            f" they have no integer form; the first: {left[0]}."
        )
    return Simulator(quantizer.model, quantizer, threads=job.config.threads, overrides=overrides)


def draw_attention_pictures(
    job: Job, made: Rewritten, simulator: Simulator, reference: Simulator
) -> tuple[tuple[Sheet, ...], Path | None]:
    """Attention pictures of the last block: float, vanilla and the chosen quantizer; and the image
    that they are of, as a file."""
    from PIL import Image

    from ptq_onnx.analysis.attention import attention_maps, code_runs
    from ptq_onnx.report.attention_map import draw_attention
    from ptq_onnx.report.attention_page import sheet

    prepared, config = made.prepared, job.config
    advance = job.stage(stages.DRAWING, 3)
    simulators = {"float": reference}
    if config.quantizer != "vanilla":
        simulators["vanilla"] = vanilla_beside(job, made)
    advance(1)
    simulators[config.quantizer] = simulator
    names, batch = next(job.held_apart[0].named_batches(1))
    repeated = np.repeat(batch, job.fixed or 1, axis=0)
    chosen = config.attention_blocks or None
    picture = repeated, names[0], job.inputs.preprocess, chosen
    maps = attention_maps(prepared.model, prepared.blocks, simulators, *picture)
    if not maps:
        job.notes.append("No attention pictures: no attention over all patches of an image.")
        return (), None
    folder = job.work / PICTURES
    folder.mkdir()
    image = folder / f"picture_{short_stem(maps[0].image_name)}.png"
    Image.fromarray(maps[0].image).save(image)
    advance(1)
    rounded = attention_maps(prepared.model, prepared.blocks, code_runs(reference), *picture)
    sheets = []
    for kind, found in [*(("", m) for m in maps), *(("codes_", m) for m in rounded)]:
        name = f"{kind}block_{found.block:02d}_{short_stem(found.image_name)}.png"
        draw_attention(found, folder / name, config.attention_heads)
        what = ", maps of the float model in 8 and 4 bits" if kind else ""
        title = f"Block {found.block}, {found.image_name}{what}"
        sheets.append(sheet(found, title, config.attention_heads))
    return tuple(sheets), image


def vanilla_beside(job: Job, made: Rewritten) -> Simulator:
    """The simulator of the original model under the quantizer vanilla, which pictures compare."""
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.quantizers.base import Plan
    from ptq_onnx.quantizers.by_name import make_quantizer

    config = job.config
    plain = QuantizeConfig(quantizer="vanilla", bits=config.bits, threads=config.threads)
    whole = made.original or made.prepared
    vanilla = make_quantizer(Plan(whole.model, whole.blocks, whole.sites, plain))
    job.calibrate(vanilla, job.inputs.images.reopened(min(BESIDE_IMAGES, config.images)))
    return Simulator(whole.model, vanilla, threads=config.threads)


def measure(job: Job, features: Collection[str], kept: Record | None = None) -> dict[str, Any]:
    """The files in ONNX Runtime: on ``--val``, else on images held out. ``features``: outputs that
    are no classes. ``kept``: the quantized file's outputs, where it has run on ``--val`` in parts.
    """
    from ptq_onnx.pipeline.measurement import measured

    source, kind = job.inputs.tested, "val"
    if source is None:
        source, apart = job.held_apart
        kind = "held apart" if apart else "calibration"
        if not job.request.calibrated:
            kind = NOISE
    found, notes = measured(
        job.work / QUANTIZED,
        job.work / FLOAT,
        source,
        job.inputs.truth,
        kind,
        threads=job.config.threads,
        workers=job.config.workers,
        features=features,
        stage=job.stage,
        metric=job.metric(source),
        floats=job.request.shared.floats if kind == "val" else None,
        kept=kept,
    )
    job.notes.extend(notes)
    return found
