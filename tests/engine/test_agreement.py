"""What is analysed is what is deployed: the exported file against the exact simulator.

On the real ViT-Ti: end to end to the last bit, and node by node, each fed the simulator's
own codes. The two exports of the same weights must calibrate to the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import quantize, relative
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

INCEPTION = Preprocess.named("inception")
OPTIONS = {
    "vanilla": {"quantizer": "vanilla", "method": "minmax"},
    "channelwise": {"quantizer": "channelwise", "per_channel": ("all",)},
    "fqvit": {"quantizer": "fqvit"},
    "fqvit 8/8/4": {"quantizer": "fqvit", "bits": "8/8/4"},
    "deploy": {"quantizer": "deploy"},
}


def quantized(prepared: Prepared, calib: Path, **options: object) -> SiteQuantizer:
    """A calibrated quantizer, from 16 images."""
    config = QuantizeConfig(threads=1, **options)
    images = np.concatenate(list(open_images(calib, INCEPTION, limit=16).batches(8)))
    pixels = (INCEPTION.mean, INCEPTION.std)
    plan = Plan(prepared.model, prepared.blocks, prepared.sites, config, pixels=pixels)
    if config.equalizes:
        plan = equalise(plan, [images[:8], images[8:]])
    quantizer = make_quantizer(plan)
    quantizer.run(torch.zeros(1, 3, 224, 224), [images[:8], images[8:]])
    return quantizer


def session(model: bytes | str) -> ort.InferenceSession:
    """Plain ONNX Runtime with its default optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def decibels(reference: np.ndarray, value: np.ndarray) -> float:
    noise = float(((reference - value).astype(np.float64) ** 2).sum())
    return 10 * np.log10(float((reference.astype(np.float64) ** 2).sum()) / max(noise, 1e-30))


@pytest.fixture(scope="module")
def vit(real_models: dict[str, Path]) -> Prepared:
    return prepare(real_models["vit"])


@pytest.fixture(scope="module")
def images(shared: Path) -> np.ndarray:
    return next(open_images(shared / "imagenet/val", INCEPTION, limit=4).batches(4))


@pytest.fixture(scope="module")
def calibrated(vit: Prepared, shared: Path) -> Callable[[str], SiteQuantizer]:
    """The quantizer of each line of OPTIONS, made once: no test changes anything in it."""
    return cache(lambda name: quantized(vit, shared / "imagenet/calib", **OPTIONS[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_simulator_computes_what_the_file_computes(
    name: str,
    vit: Prepared,
    images: np.ndarray,
    calibrated: Callable[[str], SiteQuantizer],
    tmp_path: Path,
) -> None:
    quantizer = calibrated(name)
    path = tmp_path / "quantized.onnx"
    graphs.save(lower(quantizer.model, quantizer.specs), path)
    in_file = session(str(path)).run(None, {"input": images})[0]
    simulated = Simulator(quantizer.model, quantizer, threads=1).run(images)["logits"]
    assert decibels(in_file, simulated) >= 100
    assert path.stat().st_size < 0.35 * vit.path.stat().st_size


def test_deploy_runs_its_products_in_integers(
    calibrated: Callable[[str], SiteQuantizer], tmp_path: Path
) -> None:
    """What ONNX Runtime makes of the file: all 74 linears and 24 attention products in int8."""
    quantizer = calibrated("deploy")
    data = graphs.serialize(lower(quantizer.model, quantizer.specs))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in optimized.graph.node)
    assert ops["MatMulIntegerToFloat"] + ops["QLinearMatMul"] == 98
    assert ops["Conv"] == ops["Gemm"] == 0
    assert ops["MatMul"] == ops["FusedMatMul"] == ops["MatMulNBits"] == 0


def test_every_quantized_node_of_the_file_gives_the_simulators_codes(
    vit: Prepared, images: np.ndarray, calibrated: Callable[[str], SiteQuantizer]
) -> None:
    quantizer = calibrated("fqvit")
    specs = {t: s for t, s in quantizer.specs.items() if not vit.sites[t].is_parameter}
    file = graphs.to_standard(lower(vit.model, quantizer.specs))
    model = onnx.load_from_string(graphs.serialize(file))
    simulator = Simulator(vit.model, quantizer, threads=1)
    values = simulator.run(images, [t for t in specs if t != "input"])
    values["input"] = images
    codes = {t: stored(values[t], spec) for t, spec in specs.items() if spec.rule.code == Uniform()}
    feeds = {renamed(f"{t}_quantized", model): code for t, code in codes.items()}
    for tensor, spec in specs.items():
        if spec.rule.code == Log2():
            feeds[renamed(f"{tensor}_dequantized", model)] = values[tensor]
    checked = 0
    for tensor, expected in codes.items():
        output = renamed(f"{tensor}_quantized", model)
        part, needed = between(model, output, {k: v.dtype for k, v in feeds.items()})
        given = {name: feeds.get(name, images) for name in needed}
        found = session(part.SerializeToString()).run(None, given)[0]
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.max() <= 1, tensor
        assert (difference > 0).mean() <= 1e-3, tensor
        checked += 1
    # 12 blocks of norm1, q, k, v, qk, softmax, av, residual1, norm2, fc1, gelu, residual2; the
    # input, patches, embedding, class token and logits.
    assert checked == 12 * 12 + 5


def stored(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Codes as the file stores them (uint8)."""
    shift = 128 if spec.rule.signed else 0
    return (quantize(relative(values, spec).part, spec) + shift).astype(np.uint8)


def renamed(name: str, model: onnx.ModelProto) -> str:
    """The name in the file: outputs of A·V are quantized behind their renormalization, and a
    graph output gives its name to the last node."""
    made = {o for node in model.graph.node for o in node.output}
    stem, _, suffix = name.rpartition("_")
    candidates = (name, f"{stem}_renormalized_{suffix}", stem if suffix == "dequantized" else "")
    return next(c for c in candidates if c in made)


def between(
    model: onnx.ModelProto, output: str, stops: dict[str, np.dtype]
) -> tuple[onnx.ModelProto, list[str]]:
    """The part of the file from the nearest quantized tensors before ``output`` to it."""
    producers = {o: node for node in model.graph.node for o in node.output}
    constants = {t.name for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    needed: list[str] = []

    def visit(name: str) -> None:
        if not name or name in constants or name in needed:
            return
        if (name in stops and name != output) or name not in producers:
            needed.append(name)
            return
        node = producers[name]
        if any(node is seen for seen in nodes):
            return
        for value in node.input:
            visit(value)
        nodes.append(node)

    visit(output)
    known = {v.name: v for v in [*model.graph.value_info, *model.graph.input]}
    inputs = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(stops.get(name, np.dtype(np.float32))),
            shape_of(known.get(name)),
        )
        for name in needed
    ]
    inside = {name for node in nodes for name in node.input}
    part = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "part",
            inputs,
            [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None)],
            [t for t in model.graph.initializer if t.name in inside],
            value_info=[v for n, v in known.items() if n in producers and n not in needed],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    return part, needed


def shape_of(info: onnx.ValueInfoProto | None) -> list[int | str] | None:
    if info is None:
        return None
    return [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim]


def test_both_exports_calibrate_to_the_same_numbers(
    vit: Prepared,
    calibrated: Callable[[str], SiteQuantizer],
    real_models: dict[str, Path],
    shared: Path,
) -> None:
    other = prepare(real_models["vit-dynamo"])
    of_other = quantized(other, shared / "imagenet/calib", quantizer="fqvit")
    found = [by_role(vit, calibrated("fqvit")), by_role(other, of_other)]
    assert [key for key, _ in found[0]] == [key for key, _ in found[1]]
    for (key, one), (_, two) in zip(*found, strict=True):
        np.testing.assert_allclose(one.scale, two.scale, rtol=1e-3, err_msg=str(key))
        assert (one.factor is None) == (two.factor is None), key


def by_role(
    prepared: Prepared, quantizer: SiteQuantizer
) -> Iterator[tuple[tuple[int, str], TensorSpec]]:
    entries = [
        ((-1 if site.block is None else site.block, site.role), quantizer.specs[tensor])
        for tensor, site in prepared.sites.items()
        if tensor in quantizer.specs
    ]
    return sorted(entries, key=lambda entry: entry[0])
