"""HardSwish between convolutions as ops that runtimes compute on codes.

HardSwish: let the convolution give u = a·x; then u · clip(u + 3a, 0, 6a) = 6a² · hardswish(x), so
that a = √(c/6) makes it c · hardswish(x) for any c > 0, without another factor. The clip is the
range of the codes of the sum: two integer ops in all. Exact in float but for rounding.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.region_ops import scales_hard_swish
from ptq_onnx.blocks.regions import MORE, Regions, find_regions
from ptq_onnx.blocks.roles import Blocks, Role
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import consumers, name_of
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.writer import Writer
from ptq_onnx.graph.formula import constant, new_constant, scalar
from ptq_onnx.graph.known_sizes import note_elements
from ptq_onnx.numerics.spec import Site

SHIFT, TOP = 3.0, 6.0


def regions_of(model: ir.Model, config: QuantizeConfig) -> Regions:
    """What the quantizer puts on codes between products; nothing where it does not."""
    spared = MORE if config.convolutions else 0.0
    if not config.regions:
        return Regions()
    note_elements(model)
    return find_regions(model.graph, spared=spared)


def write_on_codes(
    model: ir.Model, blocks: Blocks, regions: Regions
) -> tuple[dict[str, Role], dict[str, int]]:
    """Write every HardSwish of the regions so, in place; the roles of new nodes, and how many there
    were."""
    roles: dict[str, Role] = {}
    count = 0
    for node in list(model.graph):
        if node not in regions.ops or node.op_type != "HardSwish":
            continue
        role = blocks.roles.get(name_of(node), Role(None, "activation"))
        before = {name_of(n) for n in model.graph}
        _hard_swish(model.graph, node)
        count += 1
        roles.update({n: role for n in map(name_of, model.graph) if n not in before})
    return roles, {"HardSwishOnCodes": count} if count else {}


def _hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    factor, last = 1.0, node
    reader = next(iter(consumers(node.outputs[0])), (None, 0))[0]
    if reader is not None and scales_hard_swish(reader):
        factor, last = float(scalar(reader.inputs[1]) or 1.0), reader
    scale = math.sqrt(factor / TOP)
    x = node.inputs[0]
    conv = None if x is None else x.producer()
    assert x is not None
    assert conv is not None
    for index in (1, 2):
        old = conv.inputs[index] if len(conv.inputs) > index else None
        array = constant(old)
        if old is not None and array is not None:
            scaled = np.asarray(array, np.float64) * scale
            made = new_constant(graph, f"{old.name}_gated", scaled.astype(np.float32))
            conv.replace_input_with(index, made)
    write, shape = Writer(graph, node), [] if x.shape is None else list(x.shape)
    numbers = {"shift": SHIFT * scale, "zero": 0.0, "top": TOP * scale}
    shift, zero, top = (
        new_constant(graph, f"{x.name}_{name}", np.array(number, np.float32))
        for name, number in numbers.items()
    )
    moved = write.node("Add", [x, shift], shape, x, "moved")
    gate = write.node("Clip", [moved, zero, top], shape, x, "gate")
    _replace(graph, last, write.node("Mul", [x, gate], shape, x, "gated"))
    if last is not node:
        graph.remove(node, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """The new value in place of what the node makes, under its name and the node's."""
    old, maker = node.outputs[0], new.producer()
    assert maker is not None
    name, maker.name = str(old.name), node.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def sites_of(model: ir.Model, blocks: Blocks, config: QuantizeConfig) -> dict[str, Site]:
    """The sites of a model in form; what the regions put on codes is a site in any case."""
    sites = find_sites(model, blocks, whole=config.runtime.all_codes)
    regions = regions_of(model, config)
    extra: dict[str, Site] = {}
    for value in (*regions.codes, *regions.constants):
        if str(value.name) not in sites:
            extra[str(value.name)] = _site(value, blocks)
    return {**extra, **sites}


def _site(value: ir.Value, blocks: Blocks) -> Site:
    node, readers = value.producer(), tuple(name_of(n) for n, _ in consumers(value))
    fixed = value.const_value is not None
    named = readers[0] if fixed and readers else ("" if node is None else name_of(node))
    role = blocks.roles.get(named)
    shape = () if value.shape is None else tuple(
        d if isinstance(d, int) else str(d.value) for d in value.shape
    )  # fmt: skip
    return Site(
        tensor=str(value.name),
        role="number" if fixed else ("other" if role is None else role.name),
        block=None if role is None else role.block,
        channel_axes=(1,) if len(shape) == 4 else (),
        shape=shape,
        producer=None if node is None else name_of(node),
        consumers=readers,
        is_parameter=fixed,
    )
