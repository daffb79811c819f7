"""Roles of what lies outside the transformer blocks, once the nodes inside have theirs."""

from __future__ import annotations

import onnx_ir as ir

from ptq_onnx.blocks.role_map import RoleMap
from ptq_onnx.blocks.walking import (
    ACTIVATIONS,
    ARITHMETIC,
    NORMS,
    POOLS,
    data_inputs,
    is_constant,
    is_layout,
    is_linear,
    kernel_size,
    source,
)


class Outside(RoleMap):
    """Embeddings, merging, final norm, pooling and heads; then layout ops anywhere."""

    def outside(self) -> None:
        """Patch embedding, position embedding, what lies between the blocks, norm and head."""
        inside = [self.order[n] for n, role in self.roles.items() if role.block is not None]
        first = min(inside, default=len(self.order))
        last = max(inside, default=-1)
        seen_norm = False
        for node in self.graph:
            if node in self.roles or is_layout(node):
                continue
            at = self.order[node]
            before, between = at < first, at < last
            two = node.op_type in ARITHMETIC and len(data_inputs(node)) == 2
            if is_linear(node) or node.op_type == "Conv":
                self.set(node, None, self.projection_outside(node, before, between))
            elif node.op_type in NORMS:
                name = "pre_norm" if before else ("merge_norm" if between else "norm")
                self.set(node, None, name)
                seen_norm = True
            elif node.op_type == "Add" and before:
                self.set(node, None, "embed")
            elif node.op_type in POOLS and (inside or seen_norm):
                self.set(node, None, "pool")
            elif inside and node.op_type in ACTIVATIONS:
                self.set(node, None, "activation")
            elif inside and node.op_type == "Resize":
                self.set(node, None, "resize")
            elif inside and self.behind_head(node):
                self.set(node, None, "head_mean")
            elif inside and two and node.op_type == "Add":
                self.set(node, None, "residual")
            elif inside and two and node.op_type == "Mul":
                self.set(node, None, "gate")
            elif inside and node.op_type == "Mul" and not before:
                self.set(node, None, "layer_scale")

    def projection_outside(self, node: ir.Node, before: bool, between: bool) -> str:
        """The role of a linear or a convolution that belongs to no block: ``before`` the first one,
        ``between`` two stages, or behind the last."""
        if before:
            return "patch_embed"
        if between:
            return "merge" if is_linear(node) else "conv"
        return "head" if is_linear(node) or kernel_size(node) == 1 else "conv"

    def behind_head(self, node: ir.Node) -> bool:
        """True for arithmetic on the outputs of heads (the mean of two)."""
        if node.op_type not in ARITHMETIC:
            return False
        sources = [source(v) for v in data_inputs(node)]
        roles = [None if n is None else self.roles.get(n) for n in sources]
        return bool(roles) and all(r is not None and r.name in ("head", "head_mean") for r in roles)

    def layout(self) -> None:
        """Layout ops take the block of the compute node they read from."""
        for node in self.graph:
            if node in self.roles or not is_layout(node):
                continue
            data = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
            behind = None if data is None else source(data)
            role = None if behind is None else self.roles.get(behind)
            self.set(node, None if role is None else role.block, "layout")
