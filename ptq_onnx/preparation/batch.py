"""A model for a batch and images of one size: no shape in it is computed any more."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.graph.codings import is_coding
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.graph.shape_folding import simplify_layout
from ptq_onnx.graph.symbolic_shapes import fold_shapes
from ptq_onnx.preparation.cleaning import FOLD_LIMIT, ROUNDS, infer_shapes


def with_batch(model: ir.Model, size: int, image_shape: Sequence[int] = ()) -> ir.Model:
    """A copy that takes ``size`` images at a time; codes stay codes. ``image_shape``: an image's
    sizes, for those that the model leaves open."""
    copy = model.clone()
    graph = copy.graph
    image = image_input(copy)
    if image.shape is None:
        return copy
    rest = list(image.shape)[1:]
    if len(image_shape) == len(rest):
        rest = [d if isinstance(d, int) else n for d, n in zip(rest, image_shape, strict=True)]
    image.shape = ir.Shape([size, *rest])
    for _ in range(ROUNDS):
        before = len(graph)
        _infer(copy)
        fold_shapes(graph)
        simplify_layout(graph)
        optimizer.fold_constants_ir(
            copy,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=lambda node: False if is_coding(node) else None,
        )
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
        common.RemoveUnusedNodesPass()(copy)
        if len(graph) == before:
            break
    _infer(copy)
    return copy


def _infer(model: ir.Model) -> None:
    """Shapes anew, those of our fused ops by what they stand for."""
    standard = to_standard(model)
    for value in (v for node in standard.graph for v in node.outputs):
        value.shape = None
    infer_shapes(standard)
    found = {str(v.name): v for node in standard.graph for v in node.outputs}
    for value in (v for node in model.graph for v in node.outputs):
        same = found.get(str(value.name))
        if same is not None and same.shape is not None:
            value.shape, value.type = same.shape, same.type
