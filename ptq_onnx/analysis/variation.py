"""How weights and activations vary, tensor by tensor, and what that costs their rounding.

Sources: SDAM, the standard deviation of the absolute mean: Huang et al., Quantization
Variation (VVTQ), arXiv 2307.00331. Channel ranges of LayerNorm inputs: FQ-ViT, arXiv
2111.13824, figures 1 and 2. Massive tokens: Sun et al., arXiv 2402.17762.

Two runs of the float model: one for the extremes (reduced inside ONNX Runtime), one for raw
values, batch by batch; memory holds one batch and fixed-size sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ptq_onnx.analysis.tensor_sums import (
    Array,
    Double,
    Histogram,
    Rounding,
    Seen,
    kurtosis,
    ratio_to_median,
    rounding_figures,
    sdam,
)
from ptq_onnx.analysis.tokens import find_tokens, first_images
from ptq_onnx.analysis.variation_results import (
    ChannelRanges,
    KindVariation,
    TensorVariation,
    Variation,
)
from ptq_onnx.blocks.element_map import channel_map
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.statistics import collect
from ptq_onnx.numerics.dot import dot
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import Site, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.runtime.packed import given
from ptq_onnx.runtime.sessions import Session


def variation(
    model: ir.Model,
    blocks: Blocks,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
    batches: Iterable[Any],
    *,
    rounded: ir.Model | None = None,
    count: int | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Variation:
    """Variation of every site of the float ``model``; ``batches`` [B, C, H, W] are run twice.

    ``rounded``: the model whose weights the file holds, where they were rounded another way than
    to the nearest. ``count``: how many images these are, where others fill up a batch behind the
    last. ``progress`` is called with the images of both runs.
    """
    activations = [s for s in sites.values() if not s.is_parameter]
    stats = collect(model, activations, batches, threads=threads, progress=progress)
    tokens = find_tokens(model, blocks)
    seen = {s.tensor: Seen(s, stats.channels[s.tensor], specs.get(s.tensor)) for s in activations}
    images = 0
    for size, values in _raw(model, activations, batches, threads):
        real = size if count is None else min(size, count - images)
        for tensor, value in values.items():
            seen[tensor].add(first_images(value, size, real), tokens)
        images += real
        if progress is not None:
            progress(real)
    found = [one.result() for one in seen.values()]
    outliers = [o for one in seen.values() for o in one.outliers()]
    weights = [_weight(model, rounded or model, s, sites, specs.get(s.tensor))
               for s in sites.values() if s.is_parameter]  # fmt: skip
    norms = _norm_inputs(model, blocks, seen)
    tensors = tuple(found + [w for w in weights if w is not None])
    return Variation(images, tensors, tuple(_kinds(tensors)), norms, tuple(outliers))


def _raw(
    model: ir.Model,
    sites: list[Site],
    batches: Iterable[Any],
    threads: int,
) -> Iterable[tuple[int, dict[str, Array]]]:
    """The size of every batch, and the raw values of all sites."""
    copy = graphs.to_standard(model)
    values = {v.name: v for v in copy.graph.inputs}
    values.update({v.name: v for node in copy.graph for v in node.outputs})
    outputs = {str(v.name) for v in copy.graph.outputs}
    for site in sites:
        if site.tensor not in outputs and values[site.tensor].producer() is not None:
            copy.graph.outputs.append(values[site.tensor])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = Session(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    inputs = {i.name for i in session.get_inputs()}
    wanted = [s.tensor for s in sites if s.tensor not in inputs]
    for batch in batches:
        found = dict(zip(wanted, session.run(wanted, {feed: batch}), strict=True))
        if len(wanted) < len(sites):
            own = given(session, batch)
            found |= {s.tensor: own[s.tensor] for s in sites if s.tensor in own}
        yield len(batch), found


def _weight(
    model: ir.Model,
    rounded_model: ir.Model,
    site: Site,
    sites: Mapping[str, Site],
    spec: TensorSpec | None,
) -> TensorVariation | None:
    constant = model.graph.initializers[site.tensor].const_value
    if constant is None:
        return None
    value = np.asarray(constant.numpy(), np.float32)
    flat = value.ravel().astype(np.float64)
    square = flat * flat
    powers = np.array([flat.sum(), square.sum(), dot(square, flat), dot(square, square)])
    others = tuple(a for a in range(value.ndim) if a not in site.channel_axes)
    means = np.abs(value).mean(axis=others, dtype=np.float64).ravel()
    extremes = np.abs(value).max(axis=others, initial=0).ravel()
    histogram = Histogram(float(value.min(initial=0)), float(value.max(initial=0)))
    histogram.add(0, value)
    rounding = None if spec is None else Rounding(spec)
    if rounding is not None:
        held = rounded_model.graph.initializers[site.tensor].const_value
        start = value if held is None else np.asarray(held.numpy(), np.float32)
        rounded = fake_quantize(start, rounding.spec)
        rounding.add(value, rounded)
        histogram.add(1, rounded)
    heads = _head_means(model, site, sites, means)
    return TensorVariation(
        tensor=site.tensor,
        role=site.role,
        block=site.block,
        parameter=True,
        low=histogram.low,
        high=histogram.high,
        absolute_mean=float(np.abs(flat).mean()) if flat.size else 0.0,
        sdam=sdam(means),
        sdam_heads=None if heads is None else sdam(heads),
        kurtosis=kurtosis(flat.size, powers),
        channels=len(means),
        channel_ratio=ratio_to_median(extremes),
        **rounding_figures(rounding),
        histogram=histogram.result(),
    )


def _head_means(
    model: ir.Model, site: Site, sites: Mapping[str, Site], means: Double
) -> Double | None:
    """Mean |w| of every head of q, k and v, from those of the linear's columns [N]."""
    if site.role.removesuffix(".weight") not in ("qkv", "q", "k", "v"):
        return None
    values = {v.name: v for node in model.graph for v in node.outputs}
    linear = next((n for n in model.graph if name_of(n) == site.consumers[0]), None)
    heads: list[float] = []
    for other in sites.values():
        if linear is None or other.block != site.block or other.role not in ("q", "k", "v"):
            continue
        shape = tuple(
            int(d) if a in other.channel_axes else 1
            for a, d in enumerate(other.shape)
            if a > 0 and (isinstance(d, int) or a not in other.channel_axes)
        )
        columns = channel_map(linear.outputs[0], values[other.tensor], shape)
        if columns is not None and len(shape) == 3:
            heads += [float(means[c.ravel()].mean()) for c in columns]
    return np.array(heads) if heads else None


def _norm_inputs(
    model: ir.Model, blocks: Blocks, seen: Mapping[str, Seen]
) -> tuple[ChannelRanges, ...]:
    """Channel ranges of what every LayerNorm reads, in graph order."""
    found: list[ChannelRanges] = []
    for node in model.graph:
        read = node.inputs[0] if node.op_type == "LayerNormalization" else None
        one = None if read is None else seen.get(str(read.name))
        if one is None:
            continue
        extremes = one.extreme()
        box = np.percentile(extremes, [0, 25, 50, 75, 100])
        found.append(
            ChannelRanges(
                tensor=one.site.tensor,
                role=one.site.role,
                block=one.site.block,
                reader=blocks.roles[name_of(node)].label,
                low=tuple(float(v) for v in one.stats.lowest[0]),
                high=tuple(float(v) for v in one.stats.highest[0]),
                box=(float(box[0]), float(box[1]), float(box[2]), float(box[3]), float(box[4])),
            )
        )
    return tuple(found)


def _kinds(tensors: Iterable[TensorVariation]) -> list[KindVariation]:
    """Per role, in the order in which roles appear."""
    groups: dict[tuple[str, bool], list[TensorVariation]] = defaultdict(list)
    for one in tensors:
        groups[one.role, one.parameter].append(one)
    return [
        KindVariation(
            role=role,
            parameter=parameter,
            tensors=len(group),
            absolute_mean=float(np.mean([t.absolute_mean for t in group])),
            sdam_modules=float(np.std([t.absolute_mean for t in group])),
            sdam_channels=_mean([t.sdam for t in group]),
            sdam_heads=_mean([t.sdam_heads for t in group]),
        )
        for (role, parameter), group in groups.items()
    ]


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
