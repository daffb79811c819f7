"""What every cell is held to: parity in float, and the file against the simulator, node by node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.numerics.codes.log2 import Log2, top_code
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import Prepared
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

Array = NDArray[Any]


@dataclass(frozen=True)
class Found:
    """The ops that fusion left, by what they are."""

    norms: int
    gelus: int
    linears: int
    softmaxes: int
    blocks: int


def census(prepared: Prepared) -> Found:
    """LayerNorms, GELUs (of any kind), linears, softmaxes and blocks of a prepared model."""
    ops = Counter(node.op_type for node in prepared.model.graph)
    return Found(
        norms=ops["LayerNormalization"] + ops["RMSNormalization"] + ops["L2Normalization"],
        gelus=ops["Gelu"] + ops["QuickGelu"] + ops["Silu"],
        linears=ops["Linear"],
        softmaxes=ops["Softmax"],
        blocks=prepared.blocks.count,
    )


def session(model: bytes | str, optimize: bool = True) -> ort.InferenceSession:
    """Plain ONNX Runtime, with its default optimizations or with none."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes | str, images: Array, optimize: bool = True) -> list[Array]:
    """All outputs for one batch; half inputs are given half images."""
    loaded = session(model, optimize)
    feed = loaded.get_inputs()[0]
    half = feed.type == "tensor(float16)"
    found = loaded.run(None, {feed.name: images.astype(np.float16) if half else images})
    return [np.asarray(f, np.float32) for f in found]


def relative_error(found: list[Array], expected: list[Array]) -> float:
    """The largest deviation, against the largest value of its tensor."""
    return max(
        float(np.abs(f - e).max()) / max(float(np.abs(e).max()), 1e-12)
        for f, e in zip(found, expected, strict=True)
    )


def quantized(prepared: Prepared, images: Array, **options: Any) -> SiteQuantizer:
    """A quantizer calibrated on the images [N, C, H, W], two at a time."""
    config = QuantizeConfig(threads=1, **options)
    batches = [images[i : i + 2] for i in range(0, len(images), 2)]
    plan = Plan(prepared.model, prepared.blocks, prepared.sites, config)
    plan = equalise(plan, batches) if config.equalizes else in_form(plan)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(images[:2]), batches)
    return quantizer


@dataclass(frozen=True)
class Agreement:
    """The file's codes against the simulator's, each node fed the simulator's own inputs."""

    tensors: int
    elements: int
    different: int
    worst: int
    """The largest difference of two codes."""
    where: str
    """The tensor with most of them."""

    @property
    def share(self) -> float:
        """Elements whose codes differ."""
        return self.different / max(self.elements, 1)


def subject(prepared: Prepared, quantizer: SiteQuantizer) -> Prepared:
    """The model that the quantizer quantized: an equalised copy where it works on one."""
    plan = quantizer.plan
    return replace(prepared, model=quantizer.model, blocks=plan.blocks, sites=dict(plan.sites))


def agreement(prepared: Prepared, quantizer: SiteQuantizer, images: Array) -> Agreement:
    """Cut the file at every quantized tensor, feed it the simulator's codes, compare."""
    prepared = subject(prepared, quantizer)
    specs = {t: s for t, s in quantizer.specs.items() if not prepared.sites[t].is_parameter}
    values = _simulated(prepared, quantizer, images, set(specs))
    proto = ir.to_proto(graphs.to_standard(lower(prepared.model, quantizer.specs)))
    made = {o for node in proto.graph.node for o in node.output}
    codes = {_stored_name(t, made): _stored(values[t], spec) for t, spec in specs.items()}
    computed = _cut(proto, codes)
    loaded = session(proto.SerializeToString())
    feed = prepared.model.graph.inputs[0].name
    given = {i.name: codes.get(i.name, images) for i in loaded.get_inputs()}
    assert set(given) <= {*codes, feed}
    found = dict(zip(computed, loaded.run(list(computed.values()), given), strict=True))
    worst, most, where, different, elements = 0, 0, "", 0, 0
    for name, result in found.items():
        distance = np.abs(result.astype(int) - codes[name].astype(int))
        elements += distance.size
        different += int((distance > 0).sum())
        worst = max(worst, int(distance.max(initial=0)))
        if (distance > 0).sum() > most:
            most, where = int((distance > 0).sum()), name
    return Agreement(len(found), elements, different, worst, f"{where}: {most}")


def _simulated(
    prepared: Prepared, quantizer: SiteQuantizer, images: Array, wanted: set[str]
) -> dict[str, Array]:
    values = {str(prepared.model.graph.inputs[0].name): images}

    def keep(name: str, value: Array) -> None:
        if name in wanted:
            values[name] = value

    Simulator(prepared.model, quantizer, threads=1).walk(images, keep)
    return values


def _stored(values: Array, spec: TensorSpec) -> Array:
    """Codes as the file stores them (uint8)."""
    if spec.rule.code == Log2():
        with np.errstate(divide="ignore"):
            levels = -np.log2(values.astype(np.float64))
        top = top_code(spec.rule.bits)
        return np.where(np.isfinite(levels), np.rint(levels), top).astype(np.uint8)
    if spec.rule.granularity == "row":
        values = values / values.max(axis=-1, keepdims=True)
    shift = 128 if spec.rule.signed else 0
    return (quantize(values, spec) + shift).astype(np.uint8)


def _stored_name(tensor: str, made: set[str]) -> str:
    """The name of a tensor's codes in the file."""
    suffixes = ("", "_renormalized", "_row_rescaled")
    candidates = [f"{tensor}{suffix}_quantized" for suffix in suffixes]
    return next(name for name in candidates if name in made)


def _cut(proto: onnx.ModelProto, codes: dict[str, Array]) -> dict[str, str]:
    """Make the named tensors inputs; what was computed for them becomes an output."""
    graph = proto.graph
    computed: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in codes:
                node.output[index] = computed[name] = f"{name}_computed"
    del graph.output[:]
    for name, output in computed.items():
        shape = list(codes[name].shape)
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, shape))
        graph.output.append(
            onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None)
        )
    kept = [v for v in graph.value_info if v.name not in codes]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return computed
