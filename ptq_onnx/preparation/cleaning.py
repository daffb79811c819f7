"""Cleans a loaded graph: one opset, known shapes, no shape arithmetic, no dead weight.

Everything here works in place on the ``onnx_ir`` graph. Weights never travel through the
C++ passes of onnx: those see a skeleton in which large initializers are graph inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import _no_op

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.fusion.rule import rule_set
from ptq_onnx.graph.attention_opset23 import WRITTEN_OUT, write_out
from ptq_onnx.graph.branches import has_branches, inline_branches, refuse_branches
from ptq_onnx.graph.formula import constant, scalar, sizes
from ptq_onnx.graph.onnxruntime_ops import RUNTIME, read_back
from ptq_onnx.graph.shape_folding import simplify_layout
from ptq_onnx.graph.symbolic_shapes import fold_shapes
from ptq_onnx.preparation.symbolic_inference import symbolic_inference
from ptq_onnx.preparation.validation import refuse_unknown

logger = logging.getLogger(__name__)

SMALL = 1024
"""Initializers of at most this many elements stay in the skeleton: they may be shapes or axes."""

FOLD_LIMIT = 1 << 30
"""Constant folding may read and write tensors up to this size: a transposed weight is a weight."""

ROUNDS = 4
"""How often shapes are folded at most; each round can make the next one see further."""

IR_VERSION = 10
"""The first that has opset 21; older runtimes refuse newer ones."""

GENERAL_RULES = rule_set(
    [
        *(r for r in rewriter._DEFAULT_REWRITE_RULES if r not in list(_no_op.rules)),
        _no_op.dropout_zero_rule,
        _no_op.dropout_inference_rule,
    ]
)
"""onnxscript's, but for those for x + 0 and the like: they take 1e-9 for 0, and LayerNorm's ε with
it. Ours, in ``_drop_no_ops``, takes 0."""

OTHER_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
DTYPE_ATTRIBUTES = frozenset(("to", "dtype", "stash_type", "output_dtype"))


@dataclass(frozen=True)
class CleanReport:
    """What cleaning did to a model."""

    nodes_before: int
    nodes_after: int
    opset_before: int
    opset: int
    notes: tuple[str, ...] = ()


def clean(model: ir.Model, opset: int = 21) -> CleanReport:
    """Bring the graph to ``opset``, infer all shapes and fold what is constant, in place.

    The batch stays dynamic where it is; names and metadata of all kept tensors and nodes
    stay as they are. Half, bfloat16 and double models become float32.
    """
    notes: list[str] = []
    nodes_before, opset_before = len(model.graph), model.graph.opset_imports[""]
    outputs = [str(v.name) for v in model.graph.outputs]
    notes.extend(flatten(model))
    refuse_branches(model)
    converted = _to_float32(model.graph)
    if converted:
        notes.append(f"converted {', '.join(converted)} to float32")
    if any(node.domain == "" and node.op_type in WRITTEN_OUT for node in model.graph):
        infer_shapes(model)
        notes.extend(write_out(model))
    _convert_opset(model, opset, notes)
    if model.graph.opset_imports[""] <= opset:
        model.ir_version = IR_VERSION
    infer_shapes(model)
    if any(node.domain == RUNTIME for node in model.graph):
        notes.extend(read_back(model))
        infer_shapes(model)
    for _ in range(ROUNDS):
        before = len(model.graph)
        fold_shapes(model.graph)
        simplify_layout(model.graph)
        _tidy(model)
        _fold(model)
        if len(model.graph) == before:
            break
    infer_shapes(model)
    before_last = _structure(model.graph)
    fold_shapes(model.graph)
    simplify_layout(model.graph)
    _tidy(model)
    if not _is_same(_structure(model.graph), before_last):
        infer_shapes(model)
        fold_shapes(model.graph)
    _name_outputs(model.graph, outputs)
    return CleanReport(
        nodes_before=nodes_before,
        nodes_after=len(model.graph),
        opset_before=opset_before,
        opset=model.graph.opset_imports[""],
        notes=tuple(notes),
    )


def _structure(graph: ir.Graph) -> list[object]:
    """All that shapes follow from, as the very objects: nodes with what they read and their
    attributes, inputs, outputs and constants."""
    found: list[object] = [*graph.inputs, *graph.outputs]
    for value in graph.initializers.values():
        found += (value, value.const_value)
    for node in graph:
        found += (node, *node.inputs, *node.attributes.values())
    return found


def _is_same(one: list[object], other: list[object]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    """Outputs of those names again: one tensor that is several of them has one name, the others
    are copies of it."""
    for position, name in enumerate(names):
        value = graph.outputs[position]
        if value.name == name:
            continue
        node = ir.node("Identity", [value], name=f"{name}_output")
        copy = node.outputs[0]
        copy.name, copy.type, copy.shape = name, value.type, value.shape
        graph.append(node)
        graph.outputs[position] = copy


def flatten(model: ir.Model) -> list[str]:
    """One graph without functions, and without the branches that can be decided, in place.

    Axes of the inputs without a name get one. Returns notes; a second call changes nothing.
    """
    if model.functions:
        common.InlinePass()(model)
    _name_axes(model.graph)
    if not has_branches(model):
        return []
    count = inline_branches(model)
    if has_branches(model):  # the runtime's inference knows more ops
        infer_shapes(model)
        count += inline_branches(model, inferred=True)
    refuse_unknown(model)
    return [f"{count} If nodes inlined, which shapes or constants decide"] if count else []


def _to_float32(graph: ir.Graph) -> list[str]:
    """Compute in float32 throughout; returns the names of the types that went."""
    found: set[str] = set()
    for value in _values(graph):
        if value.dtype in OTHER_FLOATS:
            found.add(value.dtype.name.lower())
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype in OTHER_FLOATS:
            found.add(value.const_value.dtype.name.lower())
            value.const_value = _float32_tensor(value.const_value)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype in OTHER_FLOATS:
                    node.attributes[name] = ir.AttrTensor(name, _float32_tensor(tensor))
            elif (
                name in DTYPE_ATTRIBUTES
                and attribute.type == ir.AttributeType.INT
                and attribute.as_int() in OTHER_FLOATS
            ):
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return sorted(found)


def _float32_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32; finite values beyond its range become its largest."""
    array = tensor.numpy()
    limit = np.finfo(np.float32).max
    if tensor.dtype == ir.DataType.DOUBLE:
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    return ir.tensor(array.astype(np.float32), name=tensor.name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and the outputs of all nodes."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


CHANNELS_FIRST = ("batch", "channels", "height", "width")
CHANNELS_LAST = ("batch", "height", "width", "channels")


def _name_axes(graph: ir.Graph) -> None:
    """An axis of an input without a name gets one, so that shapes can be tied: the first is
    ``batch``, the others of an image are what they are."""
    for value in graph.inputs:
        if value.shape is None:
            continue
        names: tuple[str, ...] = CHANNELS_FIRST[:1]
        if len(value.shape) == len(CHANNELS_FIRST):
            names = CHANNELS_LAST if value.shape[-1] in (1, 3) else CHANNELS_FIRST
        taken = {d.value for d in value.shape if not isinstance(d, int)}
        for axis, name in enumerate(names[: len(value.shape)]):
            dim = value.shape[axis]
            if not isinstance(dim, int) and not dim.value and name not in taken:
                value.shape = ir.Shape([*value.shape[:axis], name, *value.shape[axis + 1 :]])


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf with its large initializers as graph inputs, without their data."""
    bare = model.clone()
    for name, value in list(bare.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > SMALL:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.const_value = None
            del bare.graph.initializers[name]
            if value not in bare.graph.inputs:
                bare.graph.inputs.append(value)
    return ir.to_proto(bare)


def _convert_opset(model: ir.Model, opset: int, notes: list[str]) -> None:
    """Convert the graph to ``opset``; names, metadata and weights are carried over."""
    old = model.graph
    current = old.opset_imports[""]
    if current == opset:
        return
    try:
        proto = onnx.version_converter.convert_version(skeleton(model), opset)
    except Exception as error:
        if current > opset:
            logger.debug("opset %d is kept: %s", current, one_line(error))
            notes.append(f"kept opset {current}: some of its ops do not exist in opset {opset}")
            return
        raise ModelError(
            f"Model of opset {current} cannot be converted to opset {opset}: {one_line(error)}."
            f" Export it again with opset {opset} or a newer exporter."
        ) from error
    graph = ir.from_proto(proto).graph
    _restore(old, graph)
    model.graph = graph


def _restore(old: ir.Graph, new: ir.Graph) -> None:
    """Weights, node names, metadata and dimension names of ``old`` back onto ``new``."""
    inputs = {value.name for value in old.inputs}
    for value in list(new.inputs):
        if value.name not in inputs:
            new.inputs.remove(value)
            value.const_value = old.initializers[str(value.name)].const_value
            new.register_initializer(value)
    for name, value in old.initializers.items():
        if name in new.initializers:
            new.initializers[name].metadata_props.update(value.metadata_props)
    by_output = {node.outputs[0].name: node for node in old if node.outputs}
    for node in new:
        before = by_output.get(node.outputs[0].name)
        if before is not None:
            node.name = before.name
            node.doc_string = before.doc_string
            node.metadata_props.update(before.metadata_props)
    new.metadata_props.update(old.metadata_props)
    for domain, version in old.opset_imports.items():
        new.opset_imports.setdefault(domain, version)


def infer_shapes(model: ir.Model) -> None:
    """Set type and shape of every value; ONNX Runtime's inference keeps symbols like ``batch``."""
    proto = skeleton(model)
    try:
        inferred = symbolic_inference(proto)
    except Exception as error:  # it asserts on operators it does not know
        logger.debug("symbolic shape inference failed (%s); using onnx's", one_line(error))
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    graph = inferred.graph
    known = {info.name: info for info in (*graph.value_info, *graph.output)}
    for node in model.graph:
        for value in node.outputs:
            info = known.get(str(value.name))
            if info is None or not info.type.HasField("tensor_type"):
                continue
            tensor = info.type.tensor_type
            if tensor.elem_type:
                value.type = ir.TensorType(ir.DataType(tensor.elem_type))
            if tensor.HasField("shape"):
                value.shape = ir.Shape(
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None
                    for d in tensor.shape.dim
                )
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())


def _fold(model: ir.Model) -> None:
    """Constant folding and the general rewrite rules of onnxscript."""
    optimizer.fold_constants_ir(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    rewriter.rewrite(model, GENERAL_RULES)
    common.RemoveUnusedNodesPass()(model)


NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}


def _drop_no_ops(graph: ir.Graph) -> None:
    """x + 0, x - 0, x · 1 and x / 1 are x, where the constant is exactly that and one number."""
    for node in list(graph):
        neutral = NEUTRAL.get(node.op_type) if node.domain == "" else None
        if neutral is None:
            continue
        pairs = [(node.inputs[0], node.inputs[1])]
        if node.op_type in ("Add", "Mul"):
            pairs.append((node.inputs[1], node.inputs[0]))
        for data, other in pairs:
            number, dims, array = scalar(other), sizes(data), constant(other)
            if number != neutral or dims is None or array is None or data is None:
                continue
            output = node.outputs[0]
            if array.ndim > len(dims) or output.is_graph_output() or constant(data) is not None:
                continue
            output.replace_all_uses_with(data)
            graph.remove(node, safe=True)
            break


def _tidy(model: ir.Model) -> None:
    """No Constant nodes, Identities, repeated or dead nodes; constants as second operands."""
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    for node in model.graph:
        if node.op_type in ("Add", "Mul"):
            first, second = node.inputs
            if constant(first) is not None and constant(second) is None:
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
    _drop_no_ops(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
