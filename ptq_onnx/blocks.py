"""Finds the transformer blocks of a fused graph and gives every node its block and role.

Roles come from structure, not from names: a block is found around its softmax, by
walking to the two attention products, the linears that feed them, the norm before and
the residual add, norm and MLP behind. Both layouts of q, k, v are known: one packed
linear (``qkv``) or three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

LAYOUT_OPS = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Flatten",
        "Expand",
        "Identity",
        "Concat",
        "Tile",
        "Pad",
        "Shape",
        "Cast",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
"""Ops that move elements and compute nothing."""

ACTIVATIONS = frozenset(
    ["Gelu", "QuickGelu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Swish", "Mish"]
)
"""Ops that may stand between fc1 and fc2."""


@dataclass(frozen=True)
class Role:
    """Block index (None outside the blocks) and role of one node."""

    block: int | None
    name: str

    @property
    def label(self) -> str:
        """``blocks.3.fc2`` or ``head``."""
        return self.name if self.block is None else f"blocks.{self.block}.{self.name}"


@dataclass(frozen=True)
class Blocks:
    """Roles of all nodes, by node name, and the number of transformer blocks."""

    roles: dict[str, Role]
    count: int
    unrecognised: tuple[str, ...] = field(default=())

    def nodes(self, role: str) -> list[str]:
        """Names of the nodes with that role, in graph order."""
        return [name for name, found in self.roles.items() if found.name == role]


def name_of(node: ir.Node) -> str:
    """The node's name; the name of its first output where it has none."""
    return node.name or node.outputs[0].name or ""


def is_layout(node: ir.Node) -> bool:
    """True for ops that only move elements."""
    return node.op_type in LAYOUT_OPS


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer or the output of a Constant node."""
    if value is None:
        return True
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant"
    return value.const_value is not None


def is_linear(node: ir.Node) -> bool:
    """True for the fused linear op (x W + b)."""
    return node.op_type == "Linear" and node.domain == "ptq_onnx"


def consumers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read the value, with the input index, in graph order."""
    yield from ((use.node, use.idx) for use in value.uses())


def through_layout(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The compute nodes that a value reaches through layout ops, with the input index."""
    seen: set[tuple[ir.Node, int]] = set()
    for node, index in consumers(value):
        found: Iterable[tuple[ir.Node, int]]
        if is_layout(node):
            # Only the data input of a layout op carries the value on; others hold shapes.
            if index > 0 and node.op_type != "Concat":
                continue
            found = (pair for output in node.outputs for pair in through_layout(output))
        else:
            found = ((node, index),)
        for pair in found:
            if pair not in seen:
                seen.add(pair)
                yield pair


def source(value: ir.Value) -> ir.Node | None:
    """The compute node behind a value, looking back through layout ops (data input)."""
    node = value.producer()
    while node is not None and is_layout(node):
        data = next((v for v in node.inputs if not is_constant(v)), None)
        node = None if data is None else data.producer()
    return node


def back_to(value: ir.Value, wanted: Callable[[ir.Node], bool]) -> ir.Node | None:
    """The nearest node behind ``value`` that is wanted, passing layout ops and scalings."""
    node = source(value)
    while node is not None and not wanted(node):
        if node.op_type not in ("Mul", "Div", "Add", "Sub", "LayerNormalization"):
            return None
        data = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
        node = None if data is None else source(data)
    return node


def is_product(node: ir.Node) -> bool:
    """True for a product of two activations."""
    return node.op_type == "MatMul" and not any(is_constant(v) for v in node.inputs)


class _Finder:
    """Walks one graph; collects the role of each node."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph)}
        self.roles: dict[ir.Node, Role] = {}
        self.count = 0

    def run(self) -> Blocks:
        for node in self.graph:
            if node.op_type == "Softmax":
                self.block(node)
        self.outside()
        self.layout()
        names = {name_of(n): self.roles.get(n, Role(None, "other")) for n in self.graph}
        unknown = tuple(n for n, role in names.items() if role.name == "other")
        return Blocks(names, self.count, unknown)

    def set(self, node: ir.Node | None, block: int | None, role: str) -> None:
        if node is not None and node not in self.roles:
            self.roles[node] = Role(block, role)

    def block(self, softmax: ir.Node) -> None:
        """Roles of the block around one softmax; nothing where the products are missing."""
        reached = through_layout(softmax.outputs[0])
        av = next((n for n, i in reached if is_product(n) and i == 0), None)
        logits = softmax.inputs[0]
        if av is None or logits is None:
            return
        qk = back_to(logits, is_product)
        if qk is None:
            return
        index = self.count
        self.count += 1
        self.set(softmax, index, "softmax")
        self.set(av, index, "av")
        self.set(qk, index, "qk")
        self.between(qk, softmax, index)
        norm = self.projections(qk, av, index)
        self.set(norm, index, "norm1")
        proj = next((n for n, _ in through_layout(av.outputs[0]) if is_linear(n)), None)
        if proj is None:
            return
        self.set(proj, index, "proj")
        residual = self.residual(proj, index, "residual1")
        if residual is not None:
            self.mlp(residual, index)

    def between(self, qk: ir.Node, softmax: ir.Node, index: int) -> None:
        """Scale and mask between the product and the softmax."""
        for value in softmax.inputs:
            node = None if value is None else source(value)
            while node is not None and node is not qk and node.op_type in ("Mul", "Div", "Add"):
                self.set(node, index, "mask" if node.op_type == "Add" else "qk_scale")
                data = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
                node = None if data is None else source(data)

    def projections(self, qk: ir.Node, av: ir.Node, index: int) -> ir.Node | None:
        """Roles of the linears behind q, k and v; returns the norm before them."""
        values = (qk.inputs[0], qk.inputs[1], av.inputs[1])
        linears = [None if v is None else back_to(v, is_linear) for v in values]
        packed = len({id(n) for n in linears if n is not None}) == 1
        norm: ir.Node | None = None
        for linear, role in zip(linears, ("q", "k", "v"), strict=True):
            if linear is None:
                continue
            self.set(linear, index, "qkv" if packed else role)
            data = linear.inputs[0]
            if data is not None:
                found = source(data)
                if found is not None and found.op_type == "LayerNormalization":
                    norm = found
        return norm

    def residual(self, node: ir.Node, index: int, role: str) -> ir.Node | None:
        """The add behind a branch, through a LayerScale; marks both."""
        for _ in range(3):
            following = [n for n, _ in through_layout(node.outputs[0])]
            add = next((n for n in following if n.op_type == "Add"), None)
            if add is not None and not any(is_constant(v) for v in add.inputs):
                self.set(add, index, role)
                return add
            scale = next((n for n in following if n.op_type == "Mul"), None)
            if scale is None or not any(is_constant(v) for v in scale.inputs):
                return None
            self.set(scale, index, "layer_scale")
            node = scale
        return None

    def mlp(self, residual: ir.Node, index: int) -> None:
        """norm2, fc1, gelu, fc2 and residual2 behind the first residual add."""
        following = [n for n, _ in through_layout(residual.outputs[0])]
        norm = next((n for n in following if n.op_type == "LayerNormalization"), None)
        start = residual if norm is None else norm
        fc1 = next((n for n, _ in through_layout(start.outputs[0]) if is_linear(n)), None)
        if fc1 is None:
            return
        behind = [n for n, _ in through_layout(fc1.outputs[0])]
        gelu = next((n for n in behind if n.op_type in ACTIVATIONS), None)
        if gelu is None:
            return
        fc2 = next((n for n, _ in through_layout(gelu.outputs[0]) if is_linear(n)), None)
        if fc2 is None:
            return
        if norm is not None:
            self.set(norm, index, "norm2")
        self.set(fc1, index, "fc1")
        self.set(gelu, index, "gelu")
        self.set(fc2, index, "fc2")
        self.residual(fc2, index, "residual2")

    def outside(self) -> None:
        """Patch embedding, position embedding, last norm and head."""
        first = min((self.order[n] for n in self.roles), default=len(self.order))
        last_norm: ir.Node | None = None
        for node in self.graph:
            if node in self.roles or is_layout(node):
                continue
            before = self.order[node] < first
            if node.op_type == "Conv":
                self.set(node, None, "patch_embed")
            elif is_linear(node):
                self.set(node, None, "patch_embed" if before else "head")
            elif node.op_type == "LayerNormalization":
                self.set(node, None, "pre_norm" if before else "norm")
                last_norm = node
            elif node.op_type == "Add" and before:
                self.set(node, None, "embed")
            elif node.op_type in ("ReduceMean", "GlobalAveragePool") and last_norm is not None:
                self.set(node, None, "pool")

    def layout(self) -> None:
        """Layout ops take the block of the compute node they read from."""
        for node in self.graph:
            if node in self.roles or not is_layout(node):
                continue
            data = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
            behind = None if data is None else source(data)
            role = None if behind is None else self.roles.get(behind)
            self.set(node, None if role is None else role.block, "layout")


def find_blocks(model: ir.Model) -> Blocks:
    """Block index and role of every node of a fused graph.

    Nodes that fit no role are ``other`` and listed in ``unrecognised``. ``count`` is 0 for
    a graph without a transformer block.
    """
    return _Finder(model.graph).run()
