"""What convolutions cost in ONNX Runtime, in floats and on codes: the figures of `region_costs.py`.

    python benchmarks/convolutions.py [--seconds 1]

Four equal convolutions with Relu behind each, one thread, the float and the Q/DQ model in turns;
nanoseconds per element of the output of one. Then what HardSwish takes in place of Relu behind an
integer convolution, in floats between its codes, on codes, and on codes with factors per channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
import onnxruntime as ort

from ptq_onnx.targets.timing.interleaving import interleave

COUNT, STEP = 4, 0.03
KINDS = {
    "pointwise": [(c, s, 1, 1) for c, s in ((16, 56), (64, 56), (128, 28), (256, 14), (512, 7))],
    "dense 3x3": [(c, s, 3, 1) for c, s in ((16, 56), (64, 56), (256, 14))],
    "depthwise": [(c, s, k, c) for c, s, k in ((64, 56, 3), (256, 14, 3), (256, 14, 5))],
    "grouped": [(64, 56, 3, 4), (64, 56, 3, 16), (256, 14, 3, 8), (256, 14, 3, 64)],
}


SWISHES = ("floats", "codes", "factors")


def network(
    channels: int, side: int, kernel: int, groups: int, codes: bool, swish: str = ""
) -> bytes:
    """The chain as a file, with Q/DQ or without, with Relu or one of ``SWISHES``."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(array, f"c{len(constants)}"))
        return constants[-1].name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def coded(value: str, zero: int) -> str:
        numbers = constant(np.float32(STEP)), constant(np.uint8(zero))
        return op("DequantizeLinear", op("QuantizeLinear", value, *numbers), *numbers)

    def swished(value: str, form: str) -> str:
        value = coded(value, 128)
        if form == "floats":
            return op("HardSwish", value)
        read, two = value, constant(np.float32(2))
        if form == "factors":
            factors = coded(
                constant(np.linspace(0.5, 2, channels, dtype=np.float32)[:, None, None]), 0
            )
            read = coded(op("Mul", value, factors), 128)
        moved = op("Add", read, coded(two, 0))
        return op("Mul", value, coded(op("Clip", moved, constant(np.float32(0)), two), 0))

    value = coded("x", 128) if codes else "x"
    for _ in range(COUNT):
        inside = channels // groups
        weight = rng.normal(size=(channels, inside, kernel, kernel)) / (kernel * np.sqrt(inside))
        held = constant(weight.astype(np.float32))
        if codes:
            step = np.abs(weight).max(axis=(1, 2, 3)) / 127
            whole = np.round(weight / step.reshape(-1, 1, 1, 1)).astype(np.int8)
            zero = np.zeros(channels, np.int8)
            numbers = (constant(whole), constant(step.astype(np.float32)), constant(zero))
            held = op("DequantizeLinear", *numbers, axis=0)
        bias = constant(np.zeros(channels, np.float32))
        pads = [kernel // 2] * 4
        value = op("Conv", value, held, bias, group=groups, pads=pads)
        value = swished(value, swish) if swish else op("Relu", value)
        value = coded(value, 0) if codes else value
    shape = [1, channels, side, side]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "chain", [image], [output], constants)
    opset = helper.make_opsetid("", 21)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def runner(file: bytes, image: np.ndarray) -> Callable[[], None]:
    """A session on one thread, as something that can be timed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": image})  # type: ignore[func-returns-value]


def nanoseconds(files: list[bytes], image: np.ndarray, seconds: float) -> list[float]:
    """The median of each file, in turns, for an element of the output of one convolution."""
    times = interleave([runner(file, image) for file in files], seconds)
    medians = [np.median(np.concatenate([np.array(r) for r in t])) for t in times]
    return [1e9 * float(m) / (COUNT * image.size) for m in medians]


def main() -> None:
    """Print a row for each kind and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1)
    seconds = parser.parse_args().seconds
    for kind, sizes in KINDS.items():
        for channels, side, kernel, groups in sizes:
            image = np.zeros((1, channels, side, side), np.float32)
            files = [network(channels, side, kernel, groups, codes) for codes in (False, True)]
            each = nanoseconds(files, image, seconds)
            print(
                f"{kind} {channels} x {side} x {side}, kernel {kernel}, {groups} groups: float"
                f" {each[0]:.2f} ns, codes {each[1]:.2f} ns, {each[0] / each[1]:.2f}x",
                flush=True,
            )
    for channels, side, kernel, groups in KINDS["pointwise"]:
        image = np.zeros((1, channels, side, side), np.float32)
        files = [network(channels, side, kernel, groups, True, swish) for swish in ("", *SWISHES)]
        relu, *more = nanoseconds(files, image, seconds)
        parts = [f"{m - relu:.2f} ns in {name}" for name, m in zip(SWISHES, more, strict=True)]
        print(f"HardSwish {channels} x {side} x {side}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
