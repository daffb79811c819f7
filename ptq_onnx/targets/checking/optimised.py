"""The graph that ONNX Runtime really runs: what its optimizer makes of a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.evaluation.network import open_with_fp8
from ptq_onnx.files.held_folder import scratch_folder

FLOAT_PRODUCTS = frozenset(
    (
        "Conv",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "Gemm",
        "MatMul",
        "NhwcFusedConv",
        "TransposeMatMul",
    )
)
"""Ops of the optimised graph that multiply floats."""


def optimised(source: str | Path | bytes) -> onnx.ModelProto:
    """The optimised graph of a file, or of the bytes of a model, for the CPU; no weights in it.

    Raises ModelError where ONNX Runtime does not load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        # Weights go to a file that is never read
        prefix = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{prefix}file_name", "weights")
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
        try:
            content = source if isinstance(source, bytes) else str(source)
            open_with_fp8(content, options, ["CPUExecutionProvider"])
            return onnx.load_model(path, load_external_data=False)
        except Exception as error:  # its exceptions share no base class
            raise ModelError(f"ONNX Runtime does not load the model: {one_line(error)}.") from error


def optimised_histogram(source: str | Path | bytes) -> dict[str, int]:
    """How often each op occurs in the optimised graph, the most frequent first.

    Raises ModelError.
    """
    return dict(Counter(node.op_type for node in optimised(source).graph.node).most_common())


@dataclass(frozen=True)
class OptimisedNode:
    """One node of the optimised graph."""

    op_type: str
    name: str
    output: str


@dataclass(frozen=True)
class OptimisedGraph:
    """The nodes, or the reason why ONNX Runtime refuses the file."""

    nodes: tuple[OptimisedNode, ...]
    refusal: str = ""

    @property
    def float_products(self) -> tuple[OptimisedNode, ...]:
        """The products that multiply floats."""
        return tuple(n for n in self.nodes if n.op_type in FLOAT_PRODUCTS)


def optimise(source: str | bytes) -> OptimisedGraph:
    """Read the optimised graph; a refusal is a result, not an error."""
    try:
        found = optimised(source).graph.node
    except ModelError as error:
        return OptimisedGraph((), str(error))
    return OptimisedGraph(
        tuple(OptimisedNode(n.op_type, n.name or n.output[0], n.output[0]) for n in found)
    )
