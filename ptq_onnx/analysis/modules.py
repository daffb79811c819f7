"""The modules that sensitivity analysis switches: ops, kinds of ops, blocks, the whole model.

A module holds the outputs and the weights of its ops, and those inputs of linears and products
that nothing else reads. What ``--keep-float`` leaves in float for it may be more, as the partner
of an attention product: :func:`left_in_float`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from ptq_onnx.analysis.results import Part, Scope
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.selector import ALL, Selector
from ptq_onnx.numerics.spec import Site, TensorSpec

if TYPE_CHECKING:
    from ptq_onnx.quantizers.base import SiteQuantizer

KINDS: dict[str, tuple[str, ...]] = {
    "patch_embed": ("patch_embed",),
    "embed": ("embed", "pos_embed"),
    "norm": ("pre_norm", "norm1", "norm2", "norm"),
    "qkv": ("qkv", "q", "k", "v"),
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "qk": ("qk",),
    "softmax": ("softmax",),
    "av": ("av",),
    "proj": ("proj",),
    "residual": ("residual1", "residual2"),
    "fc1": ("fc1",),
    "gelu": ("gelu",),
    "fc2": ("fc2",),
    "head": ("head",),
}
"""Kinds of modules, in the order of a block, and the roles of each."""
PARTS: tuple[Part, ...] = ("all", "activations", "weights")
READS_ALONE = ("Linear", "MatMul", "Conv")
"""Ops whose inputs are counted as theirs."""


@dataclass(frozen=True)
class Module:
    """Tensors that are switched together."""

    name: str
    scope: Scope
    role: str | None
    block: int | None
    part: Part
    tensors: frozenset[str]


def find_modules(
    model: ir.Model,
    blocks: Blocks,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
) -> list[Module]:
    """Every op, kind, block, and the model, with the quantized tensors of each; those that
    have weights and activations also with either alone. Modules without any are left out."""
    nodes = {name_of(n): n for n in model.graph}
    quantized = [s for s in sites.values() if s.tensor in specs]
    places = dict.fromkeys((base_role(s), s.block) for s in quantized)
    places.update(
        dict.fromkeys((r.name, r.block) for r in blocks.roles.values() if r.name != "layout")
    )
    found: list[Module] = []

    def add(
        name: str,
        scope: Scope,
        role: str | None,
        block: int | None,
        belongs: Callable[[str, int | None], bool],
    ) -> None:
        mine = [s for s in quantized if _concerns(s, belongs, blocks, nodes)]
        found.extend(_parts(name, scope, role, block, mine))

    for role, block in sorted(places, key=lambda p: (-1 if p[1] is None else p[1], _order(p[0]))):
        label = role if block is None else f"blocks.{block}.{role}"
        add(label, "op", role, block, partial(_is_op, role, block))
    for kind, roles in KINDS.items():
        add(kind, "kind", kind, None, partial(_is_kind, roles))
    for index in range(blocks.count):
        add(f"blocks.{index}", "block", None, index, partial(_is_block, index))
    add("model", "model", None, None, lambda *_: True)
    return found


def left_in_float(module: Module, quantizer: SiteQuantizer) -> frozenset[str]:
    """The tensors that ``--keep-float`` with the module's roles leaves in float; the module's own
    where that option knows none of them."""
    plan = quantizer.plan
    if module.scope == "model" or plan.config.target == INTEGER:
        return module.tensors
    known = {r.name for r in plan.blocks.roles.values()} - {"layout", "other"}
    known |= {base_role(s) for s in plan.sites.values()}
    roles = KINDS[module.name] if module.scope == "kind" else (str(module.role),)
    roles = (ALL,) if module.scope == "block" else tuple(r for r in roles if r in known)
    blocks = None if module.block is None else (module.block,)
    kept = (*plan.config.keep_float, *(str(Selector(role, blocks)) for role in roles))
    after = quantizer.rules_under(replace(plan.config, keep_float=kept))
    return module.tensors | {t for t in quantizer.rules if t not in after}


def _is_op(role: str, block: int | None, r: str, b: int | None) -> bool:
    return (r, b) == (role, block)


def _is_kind(roles: tuple[str, ...], r: str, _: int | None) -> bool:
    return r in roles


def _is_block(block: int, _: str, b: int | None) -> bool:
    return b == block


def base_role(site: Site) -> str:
    """The role of the op that a site belongs to: ``fc2`` of ``fc2.weight``."""
    return site.role.removesuffix(".weight")


def _order(role: str) -> int:
    roles = [r for names in KINDS.values() for r in names]
    return roles.index(role) if role in roles else len(roles)


def _concerns(
    site: Site,
    belongs: Callable[[str, int | None], bool],
    blocks: Blocks,
    nodes: Mapping[str, ir.Node],
) -> bool:
    """True for the outputs, weights and own inputs of the ops that belong to a module."""
    if belongs(base_role(site), site.block):
        return True
    if site.is_parameter or not site.consumers:
        return False
    readers = [blocks.roles.get(name) for name in site.consumers]
    return all(nodes[n].op_type in READS_ALONE for n in site.consumers) and all(
        r is not None and belongs(r.name, r.block) for r in readers
    )


def _parts(
    name: str, scope: Scope, role: str | None, block: int | None, sites: Iterable[Site]
) -> Iterable[Module]:
    weights = frozenset(s.tensor for s in sites if s.is_parameter)
    activations = frozenset(s.tensor for s in sites if not s.is_parameter)
    by_part = {"all": weights | activations, "activations": activations, "weights": weights}
    wanted = PARTS if weights and activations else PARTS[:1]
    return [
        Module(name, scope, role, block, part, by_part[part]) for part in wanted if by_part[part]
    ]
