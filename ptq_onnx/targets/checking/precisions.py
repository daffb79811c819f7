"""In what precision OpenVINO's CPU plug-in runs the products of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_onnx.errors import ModelError, one_line

PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Types of product in the compiled graph."""
FLOATS = ("f32", "f16", "bf16")
OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",  # bf16 is the default on some CPUs
    "INFERENCE_NUM_THREADS": "1",
    "SNIPPETS_MODE": "DISABLE",  # else attention is one node, which hides its products
}


@dataclass(frozen=True)
class CompiledProduct:
    """One product of the compiled graph."""

    op_type: str
    precision: str
    """``i8`` or ``u8`` where it multiplies codes."""
    originals: tuple[str, ...]
    """Nodes or tensors of the file that went into it."""


@dataclass(frozen=True)
class CompiledGraph:
    """The products, or the reason why OpenVINO refuses the file."""

    products: tuple[CompiledProduct, ...]
    refusal: str = ""


def compiled(source: str | Path | bytes) -> tuple[CompiledProduct, ...]:
    """The products of the compiled graph, in its order.

    Raises ModelError where OpenVINO refuses the file, ImportError where it is not installed.
    """
    import openvino

    try:
        core = openvino.Core()
        content = source if isinstance(source, bytes) else str(source)
        network = core.compile_model(core.read_model(content), "CPU", OPTIONS)
        nodes = network.get_runtime_model().get_ordered_ops()
    except Exception as error:  # its exceptions share no base class
        raise ModelError(f"OpenVINO does not compile the model: {one_line(error)}.") from error
    found = (_product(node) for node in nodes)
    return tuple(product for product in found if product.op_type in PRODUCTS)


def compile_graph(source: str | bytes) -> CompiledGraph | None:
    """The same, where a refusal is a result; None where OpenVINO is not installed."""
    try:
        return CompiledGraph(compiled(source))
    except ImportError:
        return None
    except ModelError as error:
        return CompiledGraph((), str(error))


def _product(node: Any) -> CompiledProduct:
    info = node.get_rt_info()
    kind, precision, kernel, names = (
        str(info[key].value) if key in info else ""
        for key in ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
    )
    # With weights that are decompressed first, the precision is that of the stored weights and
    # only the kernel says that floats are multiplied
    computed = kernel.rpartition("_")[2].lower()
    precision = computed if computed in FLOATS else precision
    originals = (*names.split(","), node.get_friendly_name())
    return CompiledProduct(kind, precision, tuple(map(_original, originals)))


def _original(name: str) -> str:
    """The name in the file: OpenVINO appends to it what its transformations made."""
    return name.split("/WithoutBiases")[0].split("/Dequantization")[0].removesuffix("_original")
