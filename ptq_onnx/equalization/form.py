"""The model in the form of its target, before anything is moved in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import onnx_ir.passes.common as common

from ptq_onnx.blocks.roles import Blocks, find_blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.equalization.code_forms import regions_of, sites_of
from ptq_onnx.equalization.pixels import image_in_pixels
from ptq_onnx.equalization.restructure import (
    on_codes,
    reads_only_products,
    restructure,
    with_own_reads,
)
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.base import Plan


@dataclass(frozen=True)
class Form:
    """The changed model, its blocks and sites, the ranges that are known, and what was done."""

    plan: Plan
    model: ir.Model
    blocks: Blocks
    sites: dict[str, Site]
    fixed: Mapping[str, tuple[float, float]]
    counts: Mapping[str, int]

    @property
    def read_by_products(self) -> list[Site]:
        """Activations that products alone read."""
        nodes = {name_of(node): node for node in self.model.graph}
        sites = self.sites.values()
        return [s for s in sites if not s.is_parameter and reads_only_products(s, nodes)]

    @property
    def measured(self) -> list[Site]:
        """Those, and what is put on codes between convolutions."""
        more, read = regions_of(self.model, self.plan.config).tensors, self.read_by_products
        there = {s.tensor for s in read}
        extra = [s for name, s in self.sites.items() if name in more and name not in there]
        return [*read, *extra]


def take_form(plan: Plan, *, pixels: bool) -> Form:
    """Bring the plan's own model into its target's form. ``pixels``: an image of pixels in whole
    steps of its own scale."""
    model, target = plan.model, plan.config.runtime
    counts = restructure(model, target)
    common.RemoveUnusedNodesPass()(model)
    blocks = find_blocks(model)
    fixed: Mapping[str, tuple[float, float]] = plan.fixed
    if plan.pixels is not None and pixels and not target.all_codes:
        roles, known = image_in_pixels(
            model,
            *plan.pixels,
            centred=target.symmetric,
            convolutions=target.convolutions,
        )
        blocks = replace(blocks, roles={**blocks.roles, **roles})
        fixed = {**fixed, **known}
    blocks, more = on_codes(plan, model, blocks)
    blocks = with_own_reads(plan, model, blocks)
    sites = sites_of(model, blocks, plan.config)
    return Form(plan, model, blocks, sites, fixed, {**counts, **more})
