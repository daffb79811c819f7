"""What an integer file asks of hardware: widths, operations and memory traffic per image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant, is_layout, is_linear
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.targets.integer.interpreter import Interpreter
from ptq_onnx.targets.integer.ranges import INTEGERS, integer_ranges, register_bits
from ptq_onnx.targets.integer.rules import histogram, widest

NAMES = {
    "Add": "additions",
    "Sub": "additions",
    "ReduceSum": "additions",
    "Mul": "multiplications",
    "Div": "divisions",
    "BitShift": "shifts",
    "Less": "comparisons",
    "Greater": "comparisons",
    "GreaterOrEqual": "comparisons",
    "Abs": "comparisons",
    "Max": "comparisons",
    "Min": "comparisons",
    "ReduceMax": "comparisons",
    "Clip": "comparisons",
}
"""Operations by op; each element counts once (of the input for reductions, two for Clip)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that ops read and write per image, each fused op reading its inputs and writing its
    output once, layout ops for free: activations and weights, in float and in integers."""

    float_activations: int
    float_weights: int
    integer_activations: int
    integer_weights: int

    @property
    def ratio(self) -> float:
        """Float bytes per integer byte."""
        integer = self.integer_activations + self.integer_weights
        return (self.float_activations + self.float_weights) / max(integer, 1)


def integer_report(
    fused: ir.Model,
    specs: Mapping[str, TensorSpec],
    file: ir.Model,
    images: Iterable[NDArray[Any]],
) -> dict[str, Any]:
    """The part of report.json on an integer file. ``images``: batches to see ranges on; the
    first image's elements are counted. Raises ModelError where an integer may overflow."""
    ranges = integer_ranges(file)
    if ranges.overflows:
        found = ranges.overflows[0]
        raise ModelError(f"Node '{found.node}' may overflow: {found.text}.")
    interpreter = Interpreter(ir.to_proto(file))
    sizes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, value: NDArray[Any]) -> None:
        sizes[name] = value.shape

    for batch in images:
        for image in batch:
            interpreter.run(image[None], keep)
    seen = interpreter.ranges
    columns = ["tensor", "op", "type", "low", "high", "bits", "proof", "seen_low", "seen_high"]
    rows = []
    for name, entry in ranges.tensors.items():
        proof = "argument" if entry.claimed else "intervals"
        row = [name, entry.op_type, entry.dtype, entry.low, entry.high, entry.bits, proof]
        rows.append([*row, *seen.get(name, (None, None))])
    traffic = memory_traffic(fused, specs)
    return {
        "ops": histogram(file),
        "widest": {
            kind: {
                "tensor": name,
                "bits": bits,
                "of": has,
                "seen_bits": register_bits(*seen[name]) if name in seen else None,
            }
            for kind, (name, bits, has) in widest(ranges).items()
        },
        "operations": operation_counts(interpreter.model, sizes),
        "traffic": {**asdict(traffic), "ratio": traffic.ratio},
        "ranges": {"columns": columns, "rows": rows},
    }


def operation_counts(
    model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Operations of one image, from the shapes of all tensors.

    ``macs`` are those of MatMulInteger and ConvInteger; ``power_of_two_macs`` those among them
    whose one factor is a power of two (A·V of log2 codes): shifts, in hardware.
    """
    constants = {t.name: tuple(t.dims) for t in model.graph.initializer}
    shape = {**constants, **sizes}
    makers = {o: n for n in model.graph.node for o in n.output}
    found = Counter[str](power_of_two_macs=0)
    for node in model.graph.node:
        out = math.prod(shape.get(node.output[0], ()))
        if node.op_type == "MatMulInteger":
            macs = out * shape[node.input[0]][-1]
            found["macs"] += macs
            if _powers_of_two(node.input[0], makers):
                found["power_of_two_macs"] += macs
        elif node.op_type == "ConvInteger":
            found["macs"] += out * math.prod(shape[node.input[1]][1:])
        elif node.op_type == "Gather" and node.input[0] in constants:
            found["look_ups"] += out
        elif node.op_type in NAMES:
            whole = node.op_type.startswith("Reduce")
            count = math.prod(shape.get(node.input[0], ())) if whole else out
            found[NAMES[node.op_type]] += count * (2 if node.op_type == "Clip" else 1)
    return dict(found)


def _powers_of_two(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """True for bytes cut out of 2^L ≫ code."""
    steps = []
    while name in makers and makers[name].op_type in ("Cast", "BitwiseAnd", "BitShift"):
        steps.append(makers[name].op_type)
        node = makers[name]
        amount = node.op_type == "BitShift" and node.input[0] not in makers
        name = node.input[1 if amount else 0]
    return "BitShift" in steps


def memory_traffic(fused: ir.Model, specs: Mapping[str, TensorSpec]) -> Traffic:
    """Traffic of the fused graph, for a batch of one.

    A code takes 1 byte (weights too), an accumulator 4, a bias or factor per channel 8. The
    scale of QKᵀ is part of the product's requantization: its accumulator is not stored.
    """
    floats, integers = Counter[str](), Counter[str]()
    for node in fused.graph:
        if is_layout(node):
            continue
        for value in (*node.inputs, *node.outputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, *INTEGERS):
                continue
            count = _elements(value)
            if not is_constant(value):
                floats["activations"] += 4 * count
                integers["activations"] += count * _code_bytes(value, specs)
                continue
            floats["weights"] += 4 * count
            coded = str(value.name) in specs
            integers["weights"] += count if coded else 8 * count
    return Traffic(
        floats["activations"], floats["weights"], integers["activations"], integers["weights"]
    )


def _code_bytes(value: ir.Value, specs: Mapping[str, TensorSpec]) -> int:
    """4 for a product's output that is not quantized before it is read, 0 where a scale alone
    reads it, else 1."""
    node = value.producer()
    product = node is not None and (is_linear(node) or node.op_type in ("MatMul", "Conv"))
    readers = [use.node for use in value.uses()]
    if not product or str(value.name) in specs or any(is_layout(n) for n in readers):
        return 1
    return 0 if all(reader.op_type in ("Mul", "Div") for reader in readers) else 4


def _elements(value: ir.Value) -> int:
    if value.const_value is not None:
        return int(value.const_value.size)
    shape = () if value.shape is None else value.shape
    return int(np.prod([d if isinstance(d, int) else 1 for d in shape], dtype=np.int64))
