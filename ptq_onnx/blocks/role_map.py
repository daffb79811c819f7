"""Which role each node of a graph plays: the values, and the map while it is being filled."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_row_factors

TOKEN_FACTOR = "token_factor"
"""The role of a Mul by factors of tokens (``equalization/token_factors.py``)."""


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


class RoleMap:
    """The roles of one graph's nodes, found so far."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph)}
        self.roles: dict[ir.Node, Role] = {}

    def set(self, node: ir.Node | None, block: int | None, role: str) -> None:
        """Give a node its role, unless it has one; factors of tokens have theirs anywhere."""
        if node is not None and node not in self.roles:
            self.roles[node] = Role(block, TOKEN_FACTOR if is_row_factors(node) else role)
