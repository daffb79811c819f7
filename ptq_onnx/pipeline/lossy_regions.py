"""Convolutions on codes are kept where the outputs bear them: else all is made again without."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.files.result_names import FLOAT, QUANTIZED
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.reading import prepared_anew

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import SiteQuantizer

FLOOR = 15.0
"""SQNR of the outputs in dB that convolutions on codes must leave: from here on top classes stay as
they are (``fqvit`` keeps ViT-Ti's with 12)."""
IMAGES = 16
"""Calibration images that it is measured on."""


def lossy(job: Job, config: QuantizeConfig, quantizer: SiteQuantizer) -> float | None:
    """SQNR of the written file's worst output in dB, where convolutions are on codes by themselves
    and it is below ``FLOOR``."""
    from ptq_onnx.evaluation.evaluate import evaluate
    from ptq_onnx.quantizers.deploy import Deploy

    if config.convolutions is not None or config.auto or job.request.scales is not None:
        return None
    if not isinstance(quantizer, Deploy) or not quantizer.regions.convolutions:
        return None
    found = evaluate(
        job.work / QUANTIZED,
        job.inputs.images.reopened(IMAGES),
        reference=job.work / FLOAT,
        threads=config.threads,
        batch_size=config.batch,
    )
    lost = found.sqnr_db is not None and found.sqnr_db < FLOOR
    return found.sqnr_db if lost else None


def without_regions(job: Job, left: float) -> Job:
    """The job anew, its convolutions in float, with a note."""
    job.notes.append(
        f"Convolutions on codes leave {left:.1f} dB of the outputs on {IMAGES} calibration images,"
        f" less than {FLOOR:g}: they stay in float. --convolutions keeps them on codes."
    )
    config = replace(job.request.config, convolutions=False)
    prepared = prepared_anew(job.request)
    prepared.model.metadata_props.update(job.inputs.prepared.model.metadata_props)
    inputs = replace(job.inputs, prepared=prepared)
    return replace(job, request=replace(job.request, config=config), inputs=inputs)
