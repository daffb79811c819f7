"""Finds the transformer blocks of a fused graph and gives every node its block and role.

Roles come from structure, not from names: a block is found around its softmax, by walking to the
two attention products, the linears that feed them, the norm before and the residual add, norm and
MLP behind. A network without attention has its blocks around its MLPs.

On the way may stand what the families of ViTs put there: rotary positions (``rope``) and norms of
q and k (``q_norm``, ``k_norm``), a convolution that shrinks k and v (``reduction``), the bias
table of windows (``bias``) and their ``mask``, heads mixed before or behind the softmax
(``head_mix``), a norm before proj or fc2 (``inner_norm``, ``mlp_norm``), norms behind a branch
instead of before it, LayerScale, factors of tokens (``token_factor``), gates (``gate``), a
depthwise convolution between fc1 and its activation (``dwconv``). Projections are linears, or
convolutions of one pixel.
"""

from __future__ import annotations

import onnx_ir as ir

from ptq_onnx.blocks.masks import is_mask
from ptq_onnx.blocks.outside import Outside
from ptq_onnx.blocks.role_map import TOKEN_FACTOR, Blocks, Role
from ptq_onnx.blocks.walking import (
    ACTIVATIONS,
    ARITHMETIC,
    NORMS,
    ahead_to,
    back_to,
    behind,
    data_inputs,
    is_constant,
    is_depthwise,
    is_product,
    is_projection,
    is_row_factors,
    name_of,
    source,
    through_layout,
)

__all__ = ["RESIDUALS", "Blocks", "Role", "find_blocks"]

RESIDUALS = ("residual1", "residual2")
"""Adds of a branch to the stream that passes it by."""


class _Finder(Outside):
    """Walks one graph; collects the role of each node."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self.units = 0

    def run(self) -> Blocks:
        """The role of every node: blocks around each softmax, lone MLPs, what is outside, layout
        ops."""
        for node in self.graph:
            if node.op_type == "Softmax":
                self.block(node)
        attention = self.units
        for node in self.graph:
            if node.op_type in ACTIVATIONS and node not in self.roles:
                self.lone_mlp(node, is_block=attention == 0)
        self.number()
        self.outside()
        self.layout()
        names = {name_of(n): self.roles.get(n, Role(None, "other")) for n in self.graph}
        unknown = tuple(n for n, role in names.items() if role.name == "other")
        return Blocks(names, self.units, unknown)

    def number(self) -> None:
        """Number the blocks as the data flows."""
        first: dict[int, int] = {}
        for node, role in self.roles.items():
            if role.block is not None:
                at = self.order[node]
                first[role.block] = min(first.get(role.block, at), at)
        new = {old: n for n, old in enumerate(sorted(first, key=lambda b: first[b]))}
        for node, role in self.roles.items():
            if role.block is not None:
                self.roles[node] = Role(new[role.block], role.name)

    # --- attention ----------------------------------------------------------------------

    def block(self, softmax: ir.Node) -> None:
        """Roles of the block around one softmax; nothing where the products are missing."""
        behind_map = ahead_to(softmax.outputs[0], lambda n, i: is_product(n) and i == 0, _mixes)
        logits = softmax.inputs[0]
        if not behind_map or logits is None:
            return
        way = back_to(
            logits, is_product, lambda n: _mixes(n) or n.op_type in ("Where", "Sub", "Clip")
        )
        if not way:
            return
        index = self.units
        self.units += 1
        av, qk = behind_map[-1], way[0]
        self.set(softmax, index, "softmax")
        self.set(av, index, "av")
        self.set(qk, index, "qk")
        for node in behind_map[:-1]:
            self.set(node, index, "head_mix")
        self.before_softmax(way[1:], index)
        norm = self.projections(qk, av, index)
        self.set(norm, index, "norm1")
        found = ahead_to(av.outputs[0], lambda n, _: is_projection(n), _inside)
        if not found:
            return
        for node in found[:-1]:
            self.set(node, index, self.inside(node, "inner_norm"))
        proj = found[-1]
        self.set(proj, index, "proj")
        residual = self.residual(proj, index, "residual1", "norm1" if norm is None else "post_norm")
        if residual is not None:
            self.mlp(residual, index)

    def before_softmax(self, way: list[ir.Node], index: int) -> None:
        """Scale, mixed heads, bias and mask between the product and the softmax."""
        for node in way:
            if node.op_type in ("Mul", "Div"):
                self.set(node, index, "qk_scale")
            elif is_projection(node):
                self.set(node, index, "head_mix")
            elif node.op_type in ("Add", "Sub"):
                shuts = is_mask(node)
                self.set(node, index, "mask" if shuts else "bias")
                makers = [source(v) for v in data_inputs(node)] if shuts else []
                for maker in makers:
                    if maker is not None and maker.op_type == "Where":
                        self.set(maker, index, "mask")
            else:
                self.set(node, index, "mask")

    def inside(self, node: ir.Node, norm: str) -> str:
        """What stands between a product and proj, or between fc1 and fc2."""
        if node.op_type in NORMS:
            return norm
        if node.op_type in ACTIVATIONS:
            return "activation"
        if is_depthwise(node):
            return "dwconv"
        return "gate"

    def projections(self, qk: ir.Node, av: ir.Node, index: int) -> ir.Node | None:
        """Roles of the projections behind q, k and v; returns the norm before them."""
        values = (qk.inputs[0], qk.inputs[1], av.inputs[1])
        passing = lambda n: (  # noqa: E731
            n.op_type in ARITHMETIC | NORMS | ACTIVATIONS or is_depthwise(n)
        )
        ways = [[] if v is None else back_to(v, is_projection, passing) for v in values]
        names = _projection_names([way[0] if way else None for way in ways])
        norm: ir.Node | None = None
        for value, way, role, letter in zip(values, ways, names, "qkv", strict=True):
            if not way or value is None:
                continue
            self.set(way[0], index, role)
            stop = lambda n: is_projection(n) or is_product(n) or n.op_type == "Softmax"  # noqa: E731
            for node in behind(value, stop) or way[1:]:
                if node.op_type in NORMS:
                    self.set(node, index, f"{letter}_norm")
                else:
                    self.set(node, index, "dwconv" if is_depthwise(node) else "rope")
            data = way[0].inputs[0]
            before = None if data is None else source(data)
            if before is None:
                continue
            if before.op_type == "Conv" and letter != "q" and before not in self.roles:
                self.set(before, index, "reduction")
            if before.op_type not in NORMS:
                continue
            if norm is None:
                norm = before
            elif before is not norm and before not in self.roles:
                self.set(before, index, "kv_norm")
                shrunk = None if before.inputs[0] is None else source(before.inputs[0])
                if shrunk is not None and shrunk.op_type == "Conv":
                    self.set(shrunk, index, "reduction")
        return norm

    def residual(self, node: ir.Node, index: int | None, role: str, norm: str) -> ir.Node | None:
        """The add behind a branch, through a LayerScale or a norm; marks all."""
        passing = lambda n: n.op_type in NORMS or _is_constant_mul(n)  # noqa: E731
        wanted = lambda n, _: n.op_type == "Add" and not any(map(is_constant, n.inputs))  # noqa: E731
        found = ahead_to(node.outputs[0], wanted, passing, reach=3)
        if not found:
            return None
        for passed in found[:-1]:
            self.set(passed, index, norm if passed.op_type in NORMS else "layer_scale")
        self.set(found[-1], index, role)
        for value in found[-1].inputs:
            before = None if value is None else value.producer()
            if before is not None and is_row_factors(before):
                self.set(before, index, TOKEN_FACTOR)
        return found[-1]

    # --- MLPs ---------------------------------------------------------------------------

    def mlp(self, residual: ir.Node, index: int) -> None:
        """norm2, fc1, gelu, fc2 and residual2 behind the first residual add."""
        following = [n for n, _ in through_layout(residual.outputs[0]) if n not in self.roles]
        norm = next((n for n in following if n.op_type in NORMS), None)
        starts = [residual] if norm is None else [norm, residual]
        for start in starts:
            first = [n for n, _ in through_layout(start.outputs[0]) if is_projection(n)]
            for fc1 in first:
                found = self.activation_behind(fc1)
                if found and fc1 not in self.roles:
                    if start is norm:
                        self.set(norm, index, "norm2")
                    self.branch(found, fc1, index, "norm2" if start is not norm else "post_norm")
                    return

    def activation_behind(self, fc1: ir.Node) -> list[ir.Node]:
        """The way from fc1 to its activation, through a depthwise convolution."""
        return ahead_to(
            fc1.outputs[0],
            lambda n, _: n.op_type in ACTIVATIONS,
            lambda n: is_depthwise(n) or n.op_type in NORMS or _is_constant_mul(n),
            reach=2,
        )

    def branch(
        self, found: list[ir.Node], fc1: ir.Node, index: int | None, norm: str
    ) -> ir.Node | None:
        """The roles from fc1 on to the residual; returns the residual add."""
        gelu = found[-1]
        onward = ahead_to(gelu.outputs[0], lambda n, _: is_projection(n), _inside)
        if not onward:
            return None
        fc2 = onward[-1]
        self.set(fc1, index, "fc1")
        for node in found[:-1]:
            self.set(node, index, self.inside(node, "mlp_norm"))
        self.set(gelu, index, "gelu")
        for node in onward[:-1]:
            self.set(node, index, self.inside(node, "mlp_norm"))
            for value in data_inputs(node):  # the other half of a gated MLP
                way = back_to(value, is_projection, lambda n: n.op_type in ARITHMETIC, 1)
                if node.op_type == "Mul" and way and way[0] is not fc1:
                    self.set(way[0], index, "fc1_gate")
        self.set(fc2, index, "fc2")
        return self.residual(fc2, index, "residual2", norm)

    def lone_mlp(self, gelu: ir.Node, is_block: bool) -> None:
        """An MLP outside the attention blocks: of a pooling head, or of a network of MLPs."""
        way = back_to(
            gelu.inputs[0] or gelu.outputs[0],
            is_projection,
            lambda n: is_depthwise(n) or n.op_type in NORMS,
            2,
        )
        if not way or way[0] in self.roles:
            return
        fc1 = way[0]
        found = [*way[1:], gelu]
        onward = ahead_to(gelu.outputs[0], lambda n, _: is_projection(n), _inside)
        if not onward or onward[-1] in self.roles:
            return
        index = self.units if is_block else None
        self.units += is_block
        data = fc1.inputs[0]
        before = None if data is None else source(data)
        if before is not None and before.op_type in NORMS and is_block:
            self.set(before, index, "norm2")
            above = None if before.inputs[0] is None else source(before.inputs[0])
            if above is not None and is_depthwise(above):
                self.set(above, index, "dwconv")
        self.branch(found, fc1, index, "post_norm")


def _projection_names(nodes: list[ir.Node | None]) -> tuple[str, str, str]:
    """qkv for one packed projection, q and kv for two, else q, k and v."""
    q, k, v = nodes
    if q is k is v or (q is k and v is None) or (k is None and q is v):
        return "qkv", "qkv", "qkv"
    if k is v and k is not None:
        return "q", "kv", "kv"
    if q is k and q is not None:
        return "qk_proj", "qk_proj", "v"
    return "q", "k", "v"


def _mixes(node: ir.Node) -> bool:
    """What may stand between the softmax and the products: mixed heads, scales, biases."""
    return is_projection(node) or node.op_type in ("Mul", "Div", "Add")


def _is_constant_mul(node: ir.Node) -> bool:
    return node.op_type == "Mul" and any(is_constant(v) for v in node.inputs)


def _inside(node: ir.Node) -> bool:
    """What may stand between a product and proj, or between an activation and fc2."""
    return (
        node.op_type in NORMS
        or node.op_type in ACTIVATIONS
        or node.op_type in ("Mul", "Div")
        or is_depthwise(node)
        or (node.op_type == "Add" and any(v is not None and _is_nchw(v) for v in node.inputs))
    )


def _is_nchw(value: ir.Value) -> bool:
    node = source(value)
    return node is not None and node.op_type in ("Conv", "BatchNormalization")


def find_blocks(model: ir.Model) -> Blocks:
    """Block index and role of every node of a fused graph.

    Nodes that fit no role are ``other`` and listed in ``unrecognised``. ``count`` is 0 for
    a graph without a transformer block.
    """
    return _Finder(model.graph).run()
