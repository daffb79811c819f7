"""Whether the model has what the options name, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.class_output import class_outputs
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import QNN
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.packed_source import PackedSource
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.calibration_images import has_class_folders
from ptq_onnx.preparation.prepare import Prepared

if TYPE_CHECKING:
    from ptq_onnx.pipeline.request import Request


def labels_of(
    tested: ImageSource, labels: str | Path | None, prepared: Prepared, notes: list[str]
) -> NDArray[np.int64] | None:
    """The classes of images [N], from a file or from their folders; None where there are none, or,
    with a note, where they are of no use to the model. Raises ImageError, and ModelError for labels
    of a model without classes that were asked for."""
    if labels is None and not has_class_folders(tested):
        return None
    if class_outputs(prepared.model):
        return labels_for(tested, labels)
    made = ", ".join(f"{v['name']} {v['shape']}" for v in map(shown, prepared.model.graph.outputs))
    where = f"Model {prepared.path} has no output [batch, classes], only {made}"
    if labels is not None:
        raise ModelError(f"{where}: leave --labels out; SQNR is measured without.")
    notes.append(f"{where}: the class folders of --val are no labels here.")
    return None


def check_metric(request: Request, model: Path, images: ImageSource) -> None:
    """Make the metric once, before any work. Raises ConfigError, ImageError."""
    from ptq_onnx.evaluation.metrics.by_name import make_metric

    config = request.config
    if request.targets is not None and request.val is None:
        raise ConfigError("--targets without --val: name the images that they belong to too.")
    if request.targets is not None and config.metric is None:
        raise ConfigError("--targets without --metric: say what is measured with them.")
    given = request.targets, request.labels
    metric = make_metric(config.metric, config.metric_option, images, model, *given)
    if metric is not None:
        metric.begin()


def refuse_packed(config: QuantizeConfig, images: ImageSource) -> None:
    """Several inputs are for targets whose files may have them. Raises ConfigError."""
    if isinstance(images, PackedSource) and config.target in (INTEGER, QNN.name):
        raise ConfigError(
            f"--target {config.target}: its files take one image and nothing else; use --target"
            " onnxruntime, openvino or tensorrt."
        )


def shown(value: ir.Value) -> dict[str, Any]:
    """Name and shape of an input or output, as the report has them; open axes by their names."""
    shape = (
        []
        if value.shape is None
        else [d if isinstance(d, int) else str(d.value) for d in value.shape]
    )
    return {"name": value.name, "shape": shape}


def check_blocks(prepared: Prepared, config: QuantizeConfig) -> None:
    """Raises ModelError for a model without blocks where the quantizer works on them."""
    if prepared.blocks.count == 0 and config.quantizer != "vanilla":
        needs, instead = config.quantizer, "--quantizer vanilla"
        if config.target != "onnxruntime":  # others take no vanilla
            needs, instead = f"--target {config.target}", f"--target onnxruntime {instead}"
        raise ModelError(
            f"Model {prepared.path} has no transformer block (softmax between two products);"
            f" {needs} needs one, {instead} works without."
        )


def check_attention_blocks(prepared: Prepared, config: QuantizeConfig) -> None:
    """Raises ConfigError for blocks or heads that are to be drawn and that the model lacks."""
    beyond = [b for b in config.attention_blocks if b >= prepared.blocks.count]
    if beyond:
        raise ConfigError(
            f"--attention-blocks {beyond[0]}: the model has {prepared.blocks.count} blocks,"
            " counted from 0."
        )
    heads = [
        node.outputs[0].shape[1]
        for node in prepared.model.graph
        if prepared.blocks.roles[node.name or str(node.outputs[0].name)].name == "softmax"
        and node.outputs[0].shape is not None
        and len(node.outputs[0].shape) == 4
    ]
    most = max((h for h in heads if isinstance(h, int)), default=None)
    absent = [h for h in config.attention_heads if most is not None and h >= most]
    if absent:
        raise ConfigError(
            f"--attention-heads {absent[0]}: the model has {most} heads, counted from 0."
        )
