"""Whether the processes of ``--workers`` save more than starting them takes."""

from __future__ import annotations

from dataclasses import replace

from ptq_onnx.config import stages
from ptq_onnx.evaluation.parts import PER_BYTE
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.pipeline.reading import Inputs
from ptq_onnx.pipeline.request import Request

STARTING = 1.5
"""Seconds of a core until a process of its own has a model open (measured: 1.3 s)."""


def with_workers_that_pay(request: Request, inputs: Inputs) -> tuple[Request, list[str]]:
    """The request by one process where the stages that several share take less than those need to
    begin, with a note that says so."""
    workers, tested = request.config.workers, len(inputs.tested or ())
    if workers == 1:
        return request, []
    plan = stages.planned(request.config, tested)
    images = sum(one.weight for one in plan if one.name in stages.SHARED)
    shared = images * PER_BYTE * model_bytes(request.model)
    if shared * (1 - 1 / workers) > STARTING:
        return request, []
    config = replace(request.config, workers=1)
    return replace(request, config=config), [
        f"--workers {workers}: what they share of this run would take one process about"
        f" {shared:.1f} s, and each {STARTING:.1f} s to begin, so it was done by one."
    ]
