"""Finds the places of a fused graph where tensors are quantized.

Each float tensor that a compute op makes or reads is one site, once:

* a tensor read by products only, through layout ops (q, k, v out of a packed linear, the
  class token out of the last norm), is quantized where each product reads it, so that the
  product gets its integers directly and each part its own range; where one reads all of what
  another reads a part of (the class token of a class attention), once, where all of it is read;
* of a tensor that is cut into parts, one of which products alone read (v beside q and k that have
  norms of their own), each part is a tensor of its own;
* what a product reads through a copy (``equalization/reads.py``) is quantized behind it, for that
  product alone;
* a tensor that is concatenated on its way (class token + patches) after the Concat;
* any other where it is made;
* QKᵀ once, behind its scale, before a bias table is added; the table, and the sum, as FQ-ViT does
  for Swin; a mask behind them is not quantized: it only shuts positions out.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from ptq_onnx.blocks.element_map import varying_axes
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import (
    ACTIVATIONS,
    consumers,
    is_constant,
    is_layout,
    is_linear,
    is_product,
    name_of,
    through_layout,
)
from ptq_onnx.numerics.spec import Site

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
PRODUCT_ROLES = {("qk", 0): "q", ("qk", 1): "k", ("av", 0): "softmax", ("av", 1): "v"}


def find_sites(model: ir.Model, blocks: Blocks, *, whole: bool = False) -> dict[str, Site]:
    """All quantization sites, by tensor name, activations in graph order, then parameters.

    ``whole``: also what every other compute op makes, as an unscaled QKᵀ or a mask that was added.
    """
    sites: dict[str, Site] = {}
    constants: list[Site] = []
    graph_input = image_input(model)
    for value in [graph_input, *(v for n in model.graph for v in n.outputs)]:
        node = value.producer()
        if node is not None and (is_layout(node) or is_constant(value)):
            continue
        if value.dtype is not None and value.dtype not in FLOAT_TYPES:
            continue
        for place in places(value):
            site = _activation(place, value, blocks)
            if site is not None and site.tensor not in sites:
                sites[site.tensor] = site
        if whole and not any(str(place.name) in sites for place in places(value)):
            site = _activation(value, value, blocks, whole=True)
            if site is not None:
                sites[site.tensor] = site
    for node in model.graph:
        constants.extend(_parameters(node, blocks))
    for site in constants:
        sites.setdefault(site.tensor, site)
    return sites


def image_input(model: ir.Model) -> ir.Value:
    """The graph input that is not an initializer and has rank 4 (else the first)."""
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    return next((v for v in free if v.shape is not None and len(v.shape) == 4), free[0])


def places(value: ir.Value) -> list[ir.Value]:
    """Where one logical tensor is quantized (see the module's text)."""
    parts = _parts(value)
    if any(_only_products(part) for part in parts):
        return _distinct(place for part in parts for place in _part_places(part))
    copies = _distinct(read for read in _reads(value) if is_copy(read))
    if not copies:
        return _places(value)
    others = readers(value) or value.is_graph_output()
    return [*copies, value] if others else copies


def readers(place: ir.Value) -> list[tuple[ir.Node, int]]:
    """The compute nodes that read a place through layout ops, but those that have a copy."""
    found: list[tuple[ir.Node, int]] = []
    for node, index in through_layout(place):
        read = node.inputs[index]
        if read is None or read is place or not is_copy(read):
            found.append((node, index))
    return found


def is_copy(value: ir.Value) -> bool:
    """True for a tensor of the same numbers that one reader has for itself."""
    producer = value.producer()
    return producer is not None and producer.op_type == "Identity"


def _places(value: ir.Value) -> list[ir.Value]:
    producer = value.producer()
    uses = list(consumers(value))
    if not uses:
        return [value] if value.is_graph_output() else []
    leaves = list(through_layout(value))
    direct = all(not is_layout(n) for n, _ in uses)
    if direct:
        scale = leaves[0][0] if len(leaves) == 1 else None
        if scale is not None and _is_scaling(value, scale):
            return []
        return [value]
    nodes = [n for n, _ in leaves]
    if producer is not None and producer.op_type == "Softmax" and any(map(is_linear, nodes)):
        return [value]  # mixed heads: where a runtime quantizes a softmax, it is at its output
    made_by_product = producer is not None and is_product(producer)
    if (
        leaves
        and not made_by_product
        and all(is_product(n) or (is_linear(n) and i == 0) for n, i in leaves)
    ):
        return _outermost(_reads(value))
    concat = _last_concat(value)
    return [value if concat is None else concat]


def _part_places(part: ir.Value) -> list[ir.Value]:
    """As ``places``, for a part: what all readers read, where that is one tensor."""
    reads = _reads(part)
    return reads if len(reads) == 1 and not part.is_graph_output() else places(part)


def _reads(value: ir.Value) -> list[ir.Value]:
    """The tensors that compute nodes read of a value, through layout ops."""
    return _distinct(v for n, i in through_layout(value) if (v := n.inputs[i]) is not None)


def _outermost(reads: list[ir.Value]) -> list[ir.Value]:
    """Those of the tensors that are not made of another one by layout ops."""
    inner = {id(v) for read in reads for v in _reads(read) if v is not read}
    return [v for v in reads if id(v) not in inner]


def _only_products(value: ir.Value) -> bool:
    leaves = list(through_layout(value))
    return bool(leaves) and all(is_product(node) for node, _ in leaves)


def _distinct(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list({id(v): v for v in values}.values())


CUTS = frozenset(("Slice", "Gather", "Split"))
"""Ops that take a part."""


def _parts(value: ir.Value) -> list[ir.Value]:
    """The tensors that layout ops cut a value into, parts of parts too, all of which it is read
    as; none where it is read whole."""
    current = value
    while not current.is_graph_output():
        uses = [(n, i) for n, i in consumers(current) if n.op_type != "Shape"]
        nodes = [n for n, _ in uses]
        if len(uses) > 1 or (nodes and nodes[0].op_type == "Split"):
            if not all(n.op_type in CUTS and i == 0 for n, i in uses):
                return []
            cut = [v for n in nodes for v in n.outputs if v.uses() or v.is_graph_output()]
            return [part for v in cut for part in _parts(v) or [v]] if len(cut) > 1 else []
        if not uses or not is_layout(nodes[0]) or uses[0][1] or nodes[0].op_type == "Concat":
            return []
        current = nodes[0].outputs[0]
    return []


def _is_scaling(value: ir.Value, node: ir.Node) -> bool:
    """True for ``value`` = product, ``node`` = its scalar Mul."""
    producer = value.producer()
    if producer is None or not is_product(producer) or node.op_type not in ("Mul", "Div"):
        return False
    other = [v for v in node.inputs if v is not value]
    return len(other) == 1 and is_constant(other[0])


def _last_concat(value: ir.Value) -> ir.Value | None:
    """The output of the last Concat on the only layout path out of ``value``, or None."""
    found: ir.Value | None = None
    current = value
    while True:
        uses = [n for n, _ in consumers(current)]
        if len(uses) != 1 or not is_layout(uses[0]):
            return found
        current = uses[0].outputs[0]
        if uses[0].op_type == "Concat":
            found = current


def _activation(
    place: ir.Value, value: ir.Value, blocks: Blocks, *, whole: bool = False
) -> Site | None:
    producer = value.producer()
    leaves = readers(place)
    role_of = blocks.roles
    made = None if producer is None else role_of.get(name_of(producer))
    block = None if made is None else made.block
    role = "input" if producer is None else (made.name if made is not None else "other")
    if role == "mask" and not whole:
        return None
    if role == "qk_scale":
        role = "qk"
    for node, index in leaves:
        reader = role_of.get(name_of(node))
        if reader is None:
            continue
        named = PRODUCT_ROLES.get((reader.name, index))
        if named == "softmax" and (producer is None or producer.op_type != "Softmax"):
            named = "head_mix"  # behind a mix of the heads a map may be negative
        if named is not None:
            role, block = named, reader.block
    shape = _shape(place)
    if place.name is None or not shape:
        return None
    return Site(
        tensor=place.name,
        role=role,
        block=block,
        channel_axes=_axes_of_part(role, place, value)
        or _channel_axes(role, shape, producer, cut=place is not value),
        shape=shape,
        producer=None if producer is None else name_of(producer),
        consumers=tuple(name_of(n) for n, _ in leaves),
    )


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    if value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def _axes_of_part(role: str, place: ir.Value, value: ir.Value) -> tuple[int, ...]:
    """Channel axes of a part of what a linear makes that no product reads; empty for others."""
    producer = value.producer()
    if place is value or role in PRODUCT_ROLES.values() or producer is None:
        return ()
    if not is_linear(producer):
        return ()
    shape = _shape(place)
    axes = varying_axes(value, place) or ()
    return tuple(axis for axis in axes[-1:] if isinstance(shape[axis], int))


def _channel_axes(
    role: str, shape: tuple[int | str, ...], producer: ir.Node | None, cut: bool
) -> tuple[int, ...]:
    """Axes that tell channels apart: the last; heads too for q, k, v; k's rows are channels.

    Attention logits and maps have heads, which are their channels, and no others. ``cut``: layout
    ops have made heads of the channels; before them q, k and v of convolutions are images.
    """
    rank = len(shape)
    if role in ("qk", "softmax", "bias", "head_mix") or rank < 2:
        return (1,) if rank == 4 and isinstance(shape[1], int) else ()
    image = rank == 4 and producer is not None and _is_nchw(producer)
    if role in ("q", "k", "v", "av") and (cut or not image):
        channel = rank - 2 if role == "k" else rank - 1
        axes = (1, channel) if rank == 4 else (channel,)
        return tuple(axis for axis in axes if isinstance(shape[axis], int))
    if image or (rank == 4 and producer is None):
        return (1,) if isinstance(shape[1], int) else ()
    if not isinstance(shape[rank - 1], int):
        return ()
    return (rank - 1,)


CHANNELS_FIRST = frozenset(
    (
        "Conv", "ConvTranspose", "BatchNormalization", "GlobalAveragePool", "AveragePool",
        "MaxPool", "Resize",
    )
)  # fmt: skip
CHANNELWISE = ACTIVATIONS | {"Add", "Mul", "Sub", "Div", "ReduceMean"}


def _is_nchw(node: ir.Node, depth: int = 4) -> bool:
    """True for convolutions and pools, and for arithmetic on what they make."""
    if node.op_type in CHANNELS_FIRST:
        return True
    if node.op_type not in CHANNELWISE or depth == 0:
        return False
    makers = [v.producer() for v in node.inputs if v is not None and not is_constant(v)]
    return any(m is not None and _is_nchw(m, depth - 1) for m in makers)


def _parameters(node: ir.Node, blocks: Blocks) -> list[Site]:
    """Weights of linears and convolutions; constants added to activations (positions)."""
    role = blocks.roles.get(name_of(node))
    block = None if role is None else role.block
    name = "other" if role is None else role.name
    found: list[tuple[ir.Value, str, tuple[int, ...]]] = []
    if is_linear(node) and node.inputs[1] is not None:
        found.append((node.inputs[1], f"{name}.weight", (1,)))
    elif node.op_type == "Conv" and node.inputs[1] is not None and is_constant(node.inputs[1]):
        found.append((node.inputs[1], f"{name}.weight", (0,)))
    elif node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) == 1:
        if node.inputs[1] is not None and is_constant(node.inputs[1]):
            found.append((node.inputs[1], f"{name}.weight", (1,)))
    elif node.op_type == "Add" and name == "embed":
        for value in node.inputs:
            if value is not None and is_constant(value) and value.shape is not None:
                found.append((value, "pos_embed", (len(value.shape) - 1,)))
    elif node.op_type == "Add" and name == "bias":
        tables = [v for v in node.inputs if v is not None and is_constant(v)]
        found.extend((value, "pos_embed", ()) for value in tables)
    return [
        Site(
            tensor=value.name or "",
            role=label,
            block=block,
            channel_axes=axes,
            shape=_shape(value),
            producer=None,
            consumers=(name_of(node),),
            is_parameter=True,
        )
        for value, label, axes in found
    ]
