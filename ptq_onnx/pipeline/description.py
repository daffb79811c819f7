"""What report.json says of a run besides what was measured: model, config, tensors, sizes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ptq_onnx.config.names import INTEGER
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.files.result_names import FLOAT, QUANTIZED
from ptq_onnx.images.items import PictureSource
from ptq_onnx.images.opening import FolderSource
from ptq_onnx.images.packed_source import PackedSource
from ptq_onnx.images.source import ImageSource, NoiseSource
from ptq_onnx.numerics.spec import Site
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.request_checks import shown
from ptq_onnx.pipeline.rewriting import Rewritten
from ptq_onnx.preparation.prepare import Prepared
from ptq_onnx.preparation.signature import signature
from ptq_onnx.version import __version__

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import SiteQuantizer

BIAS, GAMMA, BETA = "bias", "gamma", "beta"
REASONS = {
    False: {
        BIAS: "bias: float here, int32 at scale s_x·s_w on integer hardware",
        GAMMA: "LayerNorm γ: folded into integer M/2^N on integer hardware",
        BETA: "LayerNorm β: folded into an integer offset on integer hardware",
    },
    True: {
        BIAS: "bias: in the integer constant of the requantization",
        GAMMA: "LayerNorm γ: in the integer multipliers of the requantization",
        BETA: "LayerNorm β: in the integer constant of the requantization",
    },
}
"""Why parameters have no codes: for files with float arithmetic, and for integer files."""


def describe(
    job: Job, made: Rewritten, quantizer: SiteQuantizer, lowered: ir.Model
) -> dict[str, Any]:
    """All of the report that does not need running the model. ``lowered``: the one in its file."""
    prepared, config = made.prepared, made.plan.config
    sites, images = prepared.sites, job.inputs.images
    reused, used = job.request.scales is not None, job.request.calibrated
    calibrated_on = "scales of an earlier run" if reused else source_name(images)
    if not used:
        calibrated_on = "none"
    signed = _signed_codes(lowered)
    model = prepared.model if prepared.fixed is None else prepared.fixed.restore(prepared.model)
    return {
        "ptq_onnx": _version(),
        "model": {
            "path": prepared.path.name,
            "bytes": model_bytes(prepared.path),
            "opset": prepared.cleaned.opset_before,
            "producer": model.producer_name,
            "inputs": _inputs(model),
            "outputs": [shown(v) for v in model.graph.outputs],
        },
        "config": json.loads(json.dumps(asdict(config))),
        "preprocess": json.loads(job.inputs.preprocess.to_json()),
        "cleaned": asdict(prepared.cleaned),
        "fusions": prepared.fusions,
        "blocks": prepared.blocks.count,
        "roles": {n: {"role": r.name, "block": r.block} for n, r in prepared.blocks.roles.items()},
        "unrecognised": list(prepared.blocks.unrecognised),
        "calibration": {
            "source": calibrated_on,
            "images": len(images) if used and not reused else 0,
            "skipped": list(images.skipped),
            "method": config.effective_method,
        },
        "arithmetic": config.arithmetic,
        "tensors": [
            {
                "tensor": tensor,
                "role": sites[tensor].role,
                "block": sites[tensor].block,
                "parameter": sites[tensor].is_parameter,
                **spec.to_json(),
                **_stored(signed, tensor),
            }
            for tensor, spec in quantizer.specs.items()
        ],
        "floats": _floats(prepared, quantizer, REASONS[config.target == INTEGER]),
        "sizes": {
            "float": model_bytes(job.work / FLOAT),
            "quantized": model_bytes(job.work / QUANTIZED),
        },
    }


def _signed_codes(lowered: ir.Model) -> set[str]:
    """The names of int8 codes that the file computes."""
    values = (value for node in lowered.graph for value in node.outputs)
    return {str(value.name) for value in values if value.dtype == ir.DataType.INT8}


def _stored(signed: set[str], tensor: str) -> dict[str, str]:
    """The type of a tensor's codes where the file has them in int8, whatever they were in."""
    return {"stored": "int8"} if f"{tensor}_quantized" in signed else {}


def _floats(
    prepared: Prepared, quantizer: SiteQuantizer, why: dict[str, str]
) -> list[dict[str, Any]]:
    """Every tensor without codes, with the reason."""
    from ptq_onnx.equalization.experts import left_in_float

    listed = [_float(prepared.sites[t], reason) for t, reason in quantizer.floats.items()]
    for stack, node, reason in left_in_float(prepared.model):
        role = prepared.blocks.roles[node.name or str(node.outputs[0].name)]
        listed.append(
            {"tensor": stack.name, "role": role.name, "block": role.block, "reason": reason}
        )
    for node in prepared.model.graph:
        role = prepared.blocks.roles[node.name or str(node.outputs[0].name)]
        reasons: list[tuple[int, str]] = []
        if node.op_type in ("Linear", "Conv"):
            reasons = [(2, why[BIAS])]
        elif node.op_type == "LayerNormalization":
            reasons = [(1, why[GAMMA]), (2, why[BETA])]
        for index, reason in reasons:
            value = node.inputs[index] if len(node.inputs) > index else None
            if value is not None and value.name:
                listed.append(
                    {"tensor": value.name, "role": role.name, "block": role.block, "reason": reason}
                )
    return listed


def _float(site: Site, reason: str) -> dict[str, Any]:
    return {"tensor": site.tensor, "role": site.role, "block": site.block, "reason": reason}


def _inputs(model: ir.Model) -> list[dict[str, Any]]:
    """The inputs of the file."""
    own = signature(model)
    return [
        {"name": own.name, "shape": list(own.shape)}
        if own is not None and v.name == own.inner
        else shown(v)
        for v in model.graph.inputs
        if not v.is_initializer()
    ]


def validation(tested: ImageSource | None, labels: str | Path | None) -> dict[str, Any] | None:
    """What ``--val`` and ``--labels`` name, without their folders."""
    if tested is None:
        return None
    return {
        "source": source_name(tested),
        "labels": None if labels is None else Path(labels).name,
    }


def source_name(images: ImageSource) -> str:
    """What the report calls the images: a folder by its name, never by its path."""
    if isinstance(images, PackedSource):
        images = images.pictures_of or images
    if isinstance(images, NoiseSource):
        return images.kind
    if isinstance(images, FolderSource):
        return "a list of files" if images.listed else str(images.root.name)
    return "pictures" if isinstance(images, PictureSource) else "arrays"


def _version() -> str:
    try:
        return version("ptq-onnx")
    except PackageNotFoundError:
        return __version__
