"""What a run measures: every op, attention in pictures, the file in its runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptq_onnx.calibration.class_output import feature_outputs
from ptq_onnx.config import stages
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.files.file_names import short_stem
from ptq_onnx.files.result_names import FLOAT, PICTURES, QUANTIZED
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.job import Job

if TYPE_CHECKING:
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.quantizers.base import SiteQuantizer
    from ptq_onnx.report.attention_page import Sheet


def analyse(
    job: Job, quantizer: SiteQuantizer, tested: ImageSource | None
) -> tuple[dict[str, Any], list[Sheet]]:
    """All analyses on images held apart from calibration, and attention pictures."""
    from ptq_onnx.analysis.analyse import Subject, analyse_quantized
    from ptq_onnx.engine.simulator import Simulator

    prepared, config = job.prepared, job.config
    source, apart = job.held_apart(tested)
    simulator = simulator_of(job, quantizer)
    # Quantizers may correct constants in a copy of the prepared model.
    model = quantizer.model
    job.analysis = analyse_quantized(
        Subject(model, quantizer, prepared.blocks, prepared.sites, simulator, prepared.model),
        source,
        held_apart=apart,
        full=config.sensitivity,
        fixed=job.fixed,
        batch=config.batch,
        threads=config.threads,
        stage=job.stage,
    )
    reference = Simulator(prepared.model, None, threads=config.threads)
    pictures: list[Sheet] = []
    if config.pictures and prepared.blocks.count:
        pictures = draw_attention_pictures(job, quantizer, simulator, reference, source)
    return {"analysis": job.analysis.to_json()}, pictures


def simulator_of(job: Job, quantizer: SiteQuantizer) -> Simulator:
    """The exact simulator, in integer arithmetic where asked for."""
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.targets.integer.simulated_steps import integer_overrides

    overrides: dict[str, Any] = {}
    left: list[str] = []
    if job.config.arithmetic == "integer":
        overrides, left = integer_overrides(
            job.prepared.model,
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
    job: Job,
    quantizer: SiteQuantizer,
    simulator: Simulator,
    reference: Simulator,
    source: ImageSource,
) -> list[Sheet]:
    """Attention pictures of the last block: float, vanilla and the chosen quantizer."""
    from PIL import Image

    from ptq_onnx.analysis.attention import attention_maps, code_runs
    from ptq_onnx.engine.simulator import Simulator
    from ptq_onnx.quantizers.base import Plan
    from ptq_onnx.quantizers.by_name import make_quantizer
    from ptq_onnx.report.attention_map import draw_attention
    from ptq_onnx.report.attention_page import sheet

    prepared, config = job.prepared, job.config
    advance = job.stage(stages.DRAWING, 3)
    simulators = {"float": reference}
    if config.quantizer != "vanilla":
        plain = QuantizeConfig(quantizer="vanilla", bits=config.bits, threads=config.threads)
        whole = job.original or prepared
        plan = Plan(whole.model, whole.blocks, whole.sites, plain)
        vanilla = make_quantizer(plan)
        job.calibrate(vanilla, job.images.reopened(min(32, config.images)))
        simulators["vanilla"] = Simulator(whole.model, vanilla, threads=config.threads)
    advance(1)
    simulators[config.quantizer] = simulator
    names, batch = next(source.named_batches(1))
    repeated = np.repeat(batch, job.fixed or 1, axis=0)
    chosen = config.attention_blocks or None
    picture = repeated, names[0], job.preprocess, chosen
    maps = attention_maps(prepared.model, prepared.blocks, simulators, *picture)
    if not maps:
        job.notes.append("No attention pictures: no attention over all patches of an image.")
        return []
    folder = job.work / PICTURES
    folder.mkdir()
    job.picture = folder / f"picture_{short_stem(maps[0].image_name)}.png"
    Image.fromarray(maps[0].image).save(job.picture)
    advance(1)
    rounded = attention_maps(prepared.model, prepared.blocks, code_runs(reference), *picture)
    sheets = []
    for kind, found in [*(("", m) for m in maps), *(("codes_", m) for m in rounded)]:
        name = f"{kind}block_{found.block:02d}_{short_stem(found.image_name)}.png"
        path = folder / name
        draw_attention(found, path, config.attention_heads)
        what = ", maps of the float model in 8 and 4 bits" if kind else ""
        title = f"Block {found.block}, {found.image_name}{what}"
        sheets.append(sheet(found, title, config.attention_heads))
    return sheets


def measure(job: Job, tested: ImageSource | None, truth: Any) -> dict[str, Any]:
    """The files in ONNX Runtime: on ``--val``, else on images held apart."""
    from ptq_onnx.pipeline.measurement import measured

    source, kind = tested, "val"
    if source is None:
        source, apart = job.held_apart(None)
        kind = "held apart" if apart else "calibration"
    found, notes = measured(
        job.work / QUANTIZED,
        job.work / FLOAT,
        source,
        truth,
        kind,
        threads=job.config.threads,
        features=feature_outputs(job.prepared.model),
        stage=job.stage,
    )
    job.notes.extend(notes)
    return found
