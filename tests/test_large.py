"""A model beyond 2 GB: loaded, fused, quantized and saved in bounded memory.

    python -m pytest -m large tests/test_large.py

Slow (minutes), 3 GB on disk twice over: not run by default, skipped where the disk is too small.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

WIDTH, BLOCKS, HEADS, PATCH = 4096, 3, 32, 16
LIMIT = 2.5
"""Peak memory over the bytes of the float weights."""

JOB = """
import json, resource, sys
import numpy as np
from pathlib import Path
from ptq_onnx import graph
from ptq_onnx.config import QuantizeConfig
from ptq_onnx.pipeline import quantize

path, output = Path(sys.argv[1]), Path(sys.argv[2])
images = list(np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32))
config = QuantizeConfig(quantizer="deploy", report=False, batch=2, threads=1, preprocess="imagenet")
result = quantize(path, config=config, output=output, calib=images)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "blocks": result.report["blocks"]}))
"""


def build(folder: Path) -> tuple[Path, int]:
    """Three wide blocks with random weights in a file of their own; the bytes of all weights."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    data = (folder / "large.onnx.data").open("wb")
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> str:
        array = generator.standard_normal(shape, dtype=np.float32)
        array *= 0.5 / np.sqrt(shape[-2] if len(shape) > 1 else 1)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        items = {"location": "large.onnx.data", "offset": data.tell(), "length": array.nbytes}
        for key, value in items.items():
            tensor.external_data.add(key=key, value=str(value))
        data.write(array.tobytes())
        tensors.append(tensor)
        return name

    def constant(name: str, values: list[int]) -> str:
        tensors.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def linear(x: str, name: str, rows: int, columns: int) -> str:
        return add(
            "Add",
            add("MatMul", x, weight(f"{name}.w", rows, columns)),
            weight(f"{name}.b", columns),
        )

    def norm(x: str, name: str) -> str:
        return add(
            "LayerNormalization", x, weight(f"{name}.g", WIDTH), weight(f"{name}.b", WIDTH), axis=-1
        )

    rows = constant("rows", [0, WIDTH, -1])
    heads = constant("heads", [0, 0, HEADS, WIDTH // HEADS])
    joined = constant("joined", [0, 0, WIDTH])
    thirds = constant("thirds", [WIDTH] * 3)
    x = add("Conv", "input", weight("patch", WIDTH, 3, PATCH, PATCH), strides=[PATCH, PATCH])
    x = add("Transpose", add("Reshape", x, rows), perm=[0, 2, 1])
    for block in range(BLOCKS):
        packed = linear(norm(x, f"{block}.norm1"), f"{block}.qkv", WIDTH, 3 * WIDTH)
        parts = [f"{block}.{letter}" for letter in "qkv"]
        nodes.append(helper.make_node("Split", [packed, thirds], parts, f"{block}.split", axis=2))
        q, k, v = (
            add("Transpose", add("Reshape", part, heads), perm=[0, 2, 1, 3]) for part in parts
        )
        attention = add(
            "Softmax", add("MatMul", q, add("Transpose", k, perm=[0, 1, 3, 2])), axis=-1
        )
        out = add("Transpose", add("MatMul", attention, v), perm=[0, 2, 1, 3])
        x = add("Add", x, linear(add("Reshape", out, joined), f"{block}.proj", WIDTH, WIDTH))
        y = linear(norm(x, f"{block}.norm2"), f"{block}.fc1", WIDTH, 4 * WIDTH)
        x = add("Add", x, linear(add("Gelu", y), f"{block}.fc2", 4 * WIDTH, WIDTH))
    pooled = add("ReduceMean", norm(x, "norm"), constant("axes", [1]), keepdims=0)
    logits = linear(pooled, "head", WIDTH, 10)
    size = data.tell()
    data.close()
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", 10])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path, size


@pytest.mark.large
def test_beyond_two_gigabytes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("needs 10 GB of disk")
    path, size = build(tmp_path)
    assert size > 2**31
    found = subprocess.run(
        [sys.executable, "-c", JOB, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    told = json.loads(found.stdout.splitlines()[-1])
    print(f"peak {told['peak'] / size:.2f} x the {size / 1e9:.2f} GB of weights")
    assert told["blocks"] == BLOCKS
    assert (tmp_path / "out/fused.onnx.data").stat().st_size > 2**31
    assert (tmp_path / "out/quantized.onnx").stat().st_size < 0.3 * size
    assert told["peak"] <= LIMIT * size
