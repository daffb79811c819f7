"""Several places of one tensor that must have the same codes in an integer machine.

A tensor is quantized where it is read: the class token and the distillation token of a DeiT, cut
out of one norm, each by itself. An integer machine requantizes the norm once, each channel to one
grid, so that places that hold the same channels get one scale, from the statistics of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.element_map import layout_indices, static_shape
from ptq_onnx.blocks.walking import is_constant, is_row_factors
from ptq_onnx.calibration.statistics import ChannelStatistics, Statistics
from ptq_onnx.numerics.spec import Site, TensorSpec


def places_of_one(graph: ir.Graph, sites: Mapping[str, Site]) -> tuple[tuple[str, ...], ...]:
    """Groups of two and more sites that hold the same channels (last axis) of one tensor."""
    values = {str(v.name): v for node in graph for v in node.outputs}
    by_producer: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.producer is not None and not site.is_parameter:
            by_producer.setdefault(site.producer, []).append(name)
    nodes = {str(node.name): node for node in graph}
    groups = []
    for producer, names in by_producer.items():
        if len(names) < 2:
            continue
        value = nodes[producer].outputs[0]
        channels = [_channels(value, values[name]) for name in names if name in values]
        if channels[0] and all(found == channels[0] for found in channels):
            groups.append(tuple(names))
    return tuple(groups)


def _channels(value: ir.Value, place: ir.Value) -> frozenset[int]:
    """Which channels of a tensor a place holds; none where that is not known."""
    shape = static_shape(value)
    indices = np.arange(1) if shape is None else layout_indices(value, place)
    if shape is None or indices is None:
        return frozenset()
    return frozenset(np.unique(indices % shape[-1]).tolist())


def share_statistics(stats: Statistics, groups: tuple[tuple[str, ...], ...]) -> None:
    """Let the sites of each group have the statistics of all."""
    for group in groups:
        known = [name for name in group if name in stats.channels]
        for name in known:
            others = [stats.channels[n].pooled() for n in known if n != name]
            stats.channels[name] = joined([stats.channels[name].pooled(), *others])


def shared(
    specs: dict[str, TensorSpec], groups: tuple[tuple[str, ...], ...]
) -> dict[str, TensorSpec]:
    """Specs in which each group has one: the widest, where a method found several."""
    found = dict(specs)
    for group in groups:
        known = [specs[name] for name in group if name in specs]
        if len({one.rule for one in known}) == 1:
            widest = max(known, key=lambda one: one.clip[1] - one.clip[0])
            found |= {one.tensor: replace(widest, tensor=one.tensor) for one in known}
    return found


def joined(parts: list[ChannelStatistics]) -> ChannelStatistics:
    """Statistics of tensors of one row as those of one: of the extremes of single images, the
    larger at each rank, which two tensors of the same image may both give."""
    first = parts[0]
    return replace(
        first,
        highest=np.max([one.highest for one in parts], axis=0),
        lowest=np.min([one.lowest for one in parts], axis=0),
        ema_low=np.min([one.ema_low for one in parts], axis=0),
        ema_high=np.max([one.ema_high for one in parts], axis=0),
        power=np.sum([one.power for one in parts], axis=0),
        total=np.sum([one.total for one in parts], axis=0),
        count=sum(one.count for one in parts),
    )


def with_row_factors(graph: ir.Graph, specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Specs in which what factors of rows make has the codes of what they multiply: the largest
    factor is one, and a row that keeps its size keeps its codes, with no rounding. Not where
    channels have factors: what reads them has taken those in."""
    found = dict(specs)
    for node in graph:
        if not is_row_factors(node):
            continue
        values = [v for v in node.inputs if v is not None]
        data = next(v for v in values if not is_constant(v))
        factors = next(str(v.name) for v in values if is_constant(v))
        if factors in found and found[factors].rule.per_tensor:
            found[factors] = _with_one_exact(found[factors])
        read, made = str(data.name), str(node.outputs[0].name)
        known = [found[name] for name in (read, made) if name in found]
        if len(known) == 2 and known[0].rule == known[1].rule and known[0].rule.per_tensor:
            found[made] = replace(known[0], tensor=made)
    return found


def _with_one_exact(spec: TensorSpec) -> TensorSpec:
    """Codes among which 1, 1/2, 1/4 … are exact."""
    scale, zero = 2.0 ** -(spec.rule.bits - 1 - spec.rule.signed), 0
    clip = tuple(code * scale for code in spec.rule.limits)
    return replace(
        spec,
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(zero, np.int32),
        clip=(clip[0], clip[1]),
    )
