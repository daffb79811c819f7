"""Builds small ONNX models for the tests of loading, cleaning and fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ptq_onnx.preparation.model_files import serialize

Array = NDArray[np.float32]


class SmallGraph:
    """``g("Mul", "x", 0.5)`` adds a node and returns its output's name; arrays are constants."""

    def __init__(self, shape: tuple[int | str, ...], opset: int = 21, dtype: int = 1) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dtype, self.opset = dtype, opset
        self.output_shape: tuple[int | str, ...] | None = None
        self.inputs = [helper.make_tensor_value_info("x", dtype, shape)]

    def const(self, array: Any, name: str = "") -> str:
        """A new initializer; float arrays take the type of the graph."""
        array = np.asarray(array)
        name = name or f"c{len(self.constants)}"
        if array.dtype.kind == "f":
            kind = helper.tensor_dtype_to_np_dtype(self.dtype)
            array = array.astype(kind)
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def __call__(self, op: str, *inputs: Any, domain: str = "", **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.const(i) for i in inputs]
        outputs = attributes.pop("outputs", 1)
        stem = f"{op.lower()}{len(self.nodes)}"
        results = [stem if k == 0 else f"{stem}_{k}" for k in range(outputs)]
        self.nodes.append(
            helper.make_node(op, names, results, f"/{stem}", domain=domain, **attributes)
        )
        return stem

    def proto(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "small",
            self.inputs,
            [
                helper.make_tensor_value_info(name, self.dtype, self.output_shape)
                for name in outputs
            ],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        domains = {n.domain for n in self.nodes} - {""}
        opsets += [helper.make_opsetid(domain, 1) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return onnx.shape_inference.infer_shapes(model)

    def model(self, *outputs: str) -> ir.Model:
        return ir.from_proto(self.proto(*outputs))

    def save(self, path: Path, *outputs: str) -> Path:
        onnx.save(self.proto(*outputs), path)
        return path


def run(model: ir.Model | onnx.ModelProto | Path, x: NDArray[Any]) -> list[NDArray[Any]]:
    """All outputs for one input, without ONNX Runtime's own fusions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    content: str | bytes
    if isinstance(model, Path):
        content = str(model)
    elif isinstance(model, onnx.ModelProto):
        content = model.SerializeToString()
    else:
        content = serialize(model)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: x}))


def assert_shapes(model: ir.Model, x: NDArray[Any]) -> None:
    """Every shape that the graph states is that of the tensor; one symbol stands for one size."""
    copy = model.clone()
    made = [v for node in copy.graph for v in node.outputs if v.name and v.type is not None]
    copy.graph.outputs.extend(v for v in made if not v.is_graph_output())
    values = dict(zip([v.name for v in copy.graph.outputs], run(copy, x), strict=True))
    symbols: dict[str, int] = {}
    for value in made:
        found = values[value.name].shape
        if value.shape is None:
            continue
        assert len(value.shape) == len(found), value
        for stated, size in zip(value.shape, found, strict=True):
            known = isinstance(stated, int) or stated.value is None
            expected = stated if known else symbols.setdefault(str(stated.value), size)
            assert expected == size or expected == ir.SymbolicDim(None), value


def ops(model: ir.Model) -> list[str]:
    """Sorted op types."""
    return sorted(node.op_type for node in model.graph)


def sample(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(model: ir.Model, reference: onnx.ModelProto, x: Array) -> None:
    """The numbers of the rewritten model are those of the original."""
    for found, expected in zip(run(model, x), run(reference, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def text(model: ir.Model) -> bytes:
    """All that a file would hold, to see that nothing changed."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))
