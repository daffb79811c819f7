"""What files for ONNX Runtime lose on x86 CPUs without VNNI, whose int8 sums saturate.

    python benchmarks/saturation.py --data ../shared [--models vit,deit] [--tested 48]

Each file runs twice in ONNX Runtime: as it is, on a CPU with VNNI, and with every product of uint8
by int8 in plain ops that add two products up in 16 bits and saturate, as the kernels without VNNI
do. A second or two for an image.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from accuracy import MODELS
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import Evaluation, evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize

ROWS: dict[str, dict[str, Any]] = {
    "deploy 8/8/8": {},
    "deploy 7/8/8": {"bits": "7/8/8"},
    "deploy 8/8/8, older": {"cpu": "older"},
    "deploy 8/8/8, older, gptq": {"cpu": "older", "rounding": "gptq"},
    "fqvit 8/8/8": {"quantizer": "fqvit"},
    "fqvit 8/8/8, older": {"quantizer": "fqvit", "cpu": "older"},
}


def saturating(file: Path) -> tuple[bytes, int]:
    """The file with those products in plain ops, and how many there are."""
    model = ir.load(file)
    found = [node for node in list(model.graph) if node.op_type in ("MatMul", "Gemm")]
    count = sum(_replaced(model.graph, node) for node in found)
    return ir.to_proto(model).SerializeToString(), count


def _replaced(graph: ir.Graph, node: ir.Node) -> bool:
    makers = [v.producer() if v is not None else None for v in node.inputs[:2]]
    if any(m is None or m.op_type != "DequantizeLinear" for m in makers):
        return False
    first, second = (m for m in makers if m is not None)
    if _zero(first).dtype != np.uint8 or _zero(second).dtype != np.int8:
        return False
    if any(np.ptp(_zero(m)) for m in (first, second)):
        raise SystemExit(f"'{node.name}' has several zero points.")
    made: list[ir.Node] = []

    def const(array: Any) -> ir.Value:
        name = f"{node.name}_constant_{len(graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        value.type = ir.TensorType(ir.DataType.from_numpy(np.asarray(array).dtype))
        value.shape = ir.Shape(np.shape(array))
        graph.register_initializer(value)
        return value

    def op(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        made.append(ir.node(kind, list(inputs), attributes))
        made[-1].name = f"{node.name}_{len(made)}"
        made[-1].outputs[0].name = f"{node.name}_{len(made)}_output"
        return made[-1].outputs[0]

    depth = _depth(node)
    x, w = (op("Cast", m.inputs[0], to=int(ir.DataType.INT32)) for m in (first, second))
    parts = []
    for start in (0, 1):
        index = np.minimum(np.arange(start, depth + depth % 2, 2), depth - 1)
        there = np.arange(start, depth + depth % 2, 2) < depth  # the last of an odd number
        rows = op("Mul", op("Gather", x, const(index), axis=-1), const(there.astype(np.int32)))
        rows = op("Unsqueeze", rows, const(np.array([-1])))
        columns = op("Unsqueeze", op("Gather", w, const(index), axis=-2), const(np.array([-3])))
        parts.append(op("Mul", rows, columns))
    ends = np.iinfo(np.int16)
    pairs = op("Clip", op("Add", *parts), const(np.int32(ends.min)), const(np.int32(ends.max)))
    sums = op("ReduceSum", pairs, const(np.array([-2])), keepdims=0)
    zeros = [int(_zero(m).flat[0]) for m in (first, second)]
    for value, axis, zero in ((w, -2, zeros[0]), (x, -1, zeros[1])):
        total = op("ReduceSum", value, const(np.array([axis])), keepdims=1)
        sums = op("Sub", sums, op("Mul", total, const(np.int32(zero))))
    sums = op("Add", sums, const(np.int32(depth * zeros[0] * zeros[1])))
    scale = _number(first, 1) * _number(second, 1)
    output = op("Mul", op("Cast", sums, to=int(ir.DataType.FLOAT)), const(scale))
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        output = op("Add", output, node.inputs[2])
    graph.insert_after(node, made)
    node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _depth(node: ir.Node) -> int:
    """How many products a sum has."""
    for value, axis in ((node.inputs[1], -2), (node.inputs[0], -1)):
        size = None if value is None or value.shape is None else value.shape[axis]
        if isinstance(size, int):
            return size
    raise SystemExit(f"'{node.name}' has sums of an unknown length.")


def _zero(node: ir.Node) -> NDArray[Any]:
    return _number(node, 2) if len(node.inputs) > 2 else np.zeros((), np.uint8)


def _number(node: ir.Node, index: int) -> NDArray[Any]:
    value = node.inputs[index]
    if value is None or not is_constant(value) or value.const_value is None:
        raise SystemExit(f"'{node.name}' finds its scale at run time.")
    return np.asarray(value.const_value.numpy())


def measured(path: Path, options: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The cells of a row: how many products, top-1 and dB with VNNI and without."""
    data = arguments.data / "imagenet"
    config = QuantizeConfig(images=arguments.images, report=False, **options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantize(path, config=config, output=out, calib=data / "calib")
        source = open_images(data / "val", resolve_preprocess(path, config), limit=arguments.tested)
        truth = labels_for(source, data / "val.txt")
        slow, count = saturating(out / "quantized.onnx")

        def run(model: Path | bytes) -> Evaluation:
            return evaluate(model, source, truth, reference=path, batch_size=1)

        found = [run(out / "quantized.onnx"), run(slow)]
    cells = [f"{one.top1 or 0:.1f} ({one.sqnr_db or 0:.1f})" for one in found]
    return f"{count} | {cells[0]} | {cells[1]}"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="vit,deit")
    parser.add_argument("--rows", default=None, help="only these rows, with ; between")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--tested", type=int, default=48)
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        file, preprocess = MODELS[name]
        print(f"\n| {name} | products | with VNNI | without |\n|---|---|---|---|", flush=True)
        for title, options in ROWS.items():
            if arguments.rows is None or title in arguments.rows.split(";"):
                given = {"preprocess": preprocess, **options}
                cells = measured(arguments.data / "models" / file, given, arguments)
                print(f"| {title} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
