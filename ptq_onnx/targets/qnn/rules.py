"""Rules of Qualcomm's NPU (HTP) for ONNX files with Q/DQ, run by ONNX Runtime's QNN provider.

Sources: ONNX Runtime, "QNN Execution Provider" (Running a model with QNN EP's HTP backend;
Supported ONNX operators); Qualcomm AI Engine Direct, the page of the HTP backend ("QNN HTP
Supported Operations") and its supplement to the op definitions; what onnxruntime-qnn 2.7.0 makes of
files, measured; and its compiler, which has the last word where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_constant, is_layout, name_of
from ptq_onnx.errors import PtqError
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE, is_coding
from ptq_onnx.qdq.unit_numbers import is_float
from ptq_onnx.targets.checking import common
from ptq_onnx.targets.checking.coding import (
    FOUR_BITS,
    INT8,
    INT32,
    SIXTEEN_BITS,
    UINT8,
    Coding,
)
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding, Skipped
from ptq_onnx.targets.checking.target import Rule, Target
from ptq_onnx.targets.qnn.compiling import Compiled, Compiler
from ptq_onnx.targets.qnn.session import MISSING, Device

NAME = "QNN"
OPSETS = 13, 23
"""From the axis attribute of Q/DQ to the last opset that 2.7.0 was given here."""
SIXTEEN_BITS_FROM = 21
CODES = (INT8, UINT8, *SIXTEEN_BITS, *FOUR_BITS, INT32)
ACTIVATIONS = (UINT8, ir.DataType.UINT16, INT8, ir.DataType.INT16)


def opset_in_range(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel need opset 13, 16-bit codes opset 21 (ONNX operator specification,
    QuantizeLinear)."""
    yield from common.opset_outside(model, *OPSETS, NAME)
    wide = any(coding.dtype in SIXTEEN_BITS for coding in model.codings)
    if wide and model.opset < SIXTEEN_BITS_FROM:
        yield Finding(
            "",
            f"16-bit codes need opset {SIXTEEN_BITS_FROM}, found {model.opset}; export with"
            " --opset, or convert the file.",
        )


def batch_fixed(model: QuantizedModel) -> Iterator[Finding]:
    """All shapes are fixed: the provider takes no dynamic ones (QNN Execution Provider, "Running a
    model with QNN EP's HTP backend")."""
    for value in model.graph.inputs:
        shape = value.shape
        if value.is_initializer() or shape is None:
            continue
        loose = [str(d) for d in shape if not isinstance(d, int)]
        if loose:
            yield Finding(
                "",
                f"expected fixed sizes of the input '{value.name}', found {', '.join(loose)};"
                " export with a fixed batch, or quantize with --target qnn.",
            )


def code_type(model: QuantizedModel) -> Iterator[Finding]:
    """Codes have 8 or 16 bits, of weights 4 or 8, of biases 32 (HTP backend, "QNN HTP
    Supported Operations")."""
    for coding in common.other_codings(model, CODES):
        yield Finding(
            coding.name,
            f"expected integer codes of 4, 8, 16 or 32 bits, found {common.dtype_name(coding)};"
            " quantize to 8 or 16 bits.",
        )


def zero_point_type(model: QuantizedModel) -> Iterator[Finding]:
    """A zero point has the type of the codes (ONNX operator specification, DequantizeLinear)."""
    yield from common.unlike_zero_points(model)


def scale_constant(model: QuantizedModel) -> Iterator[Finding]:
    """Scales and zero points are initializers: the graph is compiled ahead (QNN Execution
    Provider)."""
    yield from common.computed_parameters(model)


def scale_positive(model: QuantizedModel) -> Iterator[Finding]:
    """Scales are positive numbers (ONNX operator specification, QuantizeLinear)."""
    yield from common.bad_scales(model)


def activation_per_tensor(model: QuantizedModel) -> Iterator[Finding]:
    """Activations have one scale: scales per axis are for weights (HTP backend, "QNN HTP Supported
    Operations")."""
    yield from common.once(common.per_axis_activations(model))


def weight_axis(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel lie on the output channels (HTP backend, "QNN HTP Supported
    Operations")."""
    yield from common.once(common.wrong_weight_axes(model))


def four_bits_per_channel(model: QuantizedModel) -> Iterator[Finding]:
    """Weights of 4 bits have a scale per output channel: with one for all, 2.7.0 reads their codes
    wrongly (measured)."""
    for coding in model.codings:
        if coding.dtype in FOUR_BITS and is_constant(coding.node.inputs[0]) and coding.per_tensor:
            yield Finding(
                coding.name,
                "expected a scale per output channel of 4-bit codes, found one for all; give the"
                " weight one per channel, or 8 bits.",
            )


def whole_units(model: QuantizedModel) -> Iterator[Finding]:
    """Every op has DequantizeLinear on its inputs and QuantizeLinear on its output, else HTP
    computes it in float, or not at all (QNN Execution Provider, "Running a model with QNN EP's HTP
    backend")."""
    for node in model.graph:
        if not _computes(node):
            continue
        bare = [v for v in node.inputs if v is not None and is_float(v) and not _is_coded(v)]
        if bare:
            yield Finding(
                name_of(node),
                f"expected codes on all inputs of {node.op_type}, found floats in"
                f" '{bare[0].name}'; quantize it.",
            )
            continue
        loose = [v for v in node.outputs if v.uses() and is_float(v) and not _is_quantized(v)]
        if loose or any(v.is_graph_output() and is_float(v) for v in node.outputs):
            yield Finding(
                name_of(node),
                f"expected codes behind {node.op_type}, found floats; quantize what it makes.",
            )


def one_type(model: QuantizedModel) -> Iterator[Finding]:
    """All activations of an op have codes of one type, but for the second factor of a product: else
    HTP computes in float between conversions, or refuses it (measured, 2.7.0)."""
    for node in model.graph:
        if not _computes(node):
            continue
        data = [_type_of(v) for v in node.inputs if v is not None and _reads_activation(v)]
        if node.op_type == "MatMul":
            data = data[:1]
        made = [
            Coding(use.node).dtype
            for v in node.outputs
            for use in v.uses()
            if use.node.op_type == QUANTIZE
        ]
        found = {t for t in (*data, *made) if t is not None}
        if len(found) > 1:
            names = " and ".join(sorted(t.name.lower() for t in found))
            yield Finding(
                name_of(node),
                f"expected one type of codes around {node.op_type}, found {names}; convert with a"
                " Q/DQ pair of its own in front of it or behind.",
            )


def norm_constants(model: QuantizedModel) -> Iterator[Finding]:
    """γ of LayerNormalization has uint8 codes and β int32, else HTP refuses it or computes it in
    float (HTP's supplement to the op definitions, LayerNorm; measured, 2.7.0)."""
    for node in model.graph:
        if node.op_type != "LayerNormalization":
            continue
        for index, name, wanted in ((1, "γ", (UINT8, INT8)), (2, "β", (INT32,))):
            value = node.inputs[index] if len(node.inputs) > index else None
            found = None if value is None else _type_of(value)
            if found is not None and found not in wanted:
                yield Finding(
                    name_of(node),
                    f"expected {wanted[0].name.lower()} codes for {name}, found"
                    f" {found.name.lower()}; quantize it to that.",
                )


def compiles(model: QuantizedModel) -> Iterator[Finding]:
    """The compiler takes every node, with the fallback to the CPU switched off."""
    compiled = _compiled(model)
    for one in compiled.refused:
        yield Finding(one.node, f"{one.op_type} is refused: {one.reason or 'no reason is given'}.")
    if compiled.error and not compiled.refused:
        yield Finding("", f"The compiler refuses the file: {compiled.error}")


def in_integers(model: QuantizedModel) -> Iterator[Finding]:
    """The compiler takes every op with its Q/DQ as one unit: one that stands alone runs in 16-bit
    floats, on an NPU that has them (measured, 2.7.0)."""
    for node, kind in _compiled(model).floats.items():
        yield Finding(
            node,
            f"{kind} runs in float between conversions: its inputs and outputs are no unit; give"
            " them codes of one type.",
        )


def _computes(node: ir.Node) -> bool:
    return (
        not is_coding(node)
        and node.op_type not in ("Constant", "Shape")
        and any(is_float(v) for v in node.outputs)
    )


def _is_coded(value: ir.Value) -> bool:
    """Behind DequantizeLinear; a MatMul whose bias an Add adds is one op with it."""
    node = value.producer()
    if node is not None and node.op_type == DEQUANTIZE:
        return True
    if node is None and is_constant(value):
        return not (value.uses() and any(_is_parameter(use.node, use.idx) for use in value.uses()))
    return node is not None and node.op_type == "MatMul" and len(value.uses()) == 1


def _is_parameter(node: ir.Node, index: int) -> bool:
    """True for a constant that the op computes with, and not one that says how."""
    return not is_layout(node) and node.op_type not in ("Clip", "Resize", "Pad") and index < 3


def _is_quantized(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    if all(node.op_type == QUANTIZE for node in readers):
        return True
    made = value.producer()
    return made is not None and made.op_type == "MatMul" and [n.op_type for n in readers] == ["Add"]


def _reads_activation(value: ir.Value) -> bool:
    """Behind DequantizeLinear of codes that are computed."""
    node = value.producer()
    return node is not None and node.op_type == DEQUANTIZE and not is_constant(node.inputs[0])


def _type_of(value: ir.Value) -> ir.DataType | None:
    node = value.producer()
    return Coding(node).dtype if node is not None and node.op_type == DEQUANTIZE else None


def _compiled(model: QuantizedModel) -> Compiled:
    """Raises Skipped."""
    found = model.derived(
        Compiler(Device(model.device.get("soc", ""), model.device.get("htp_arch", "")))
    )
    if found is None:
        raise Skipped(f"Qualcomm's compiler is not installed: {MISSING}.")
    return found


def _facts(model: QuantizedModel) -> Mapping[str, Mapping[str, int]]:
    try:
        compiled = _compiled(model)
    except (Skipped, PtqError):
        return {}
    return {"units on the NPU": dict(sorted(compiled.units.items(), key=lambda one: -one[1]))}


STATIC: tuple[Rule, ...] = (
    opset_in_range,
    batch_fixed,
    code_type,
    zero_point_type,
    scale_constant,
    scale_positive,
    activation_per_tensor,
    weight_axis,
    four_bits_per_channel,
    whole_units,
    one_type,
    norm_constants,
)
"""Rules about the file as it is written."""

TARGET = Target(rules=(*STATIC, compiles, in_integers), facts=_facts, sixteen_bits=True)
