"""The model in the form of its target, before anything is moved in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import onnx_ir.passes.common as common

from ptq_onnx.blocks.roles import Blocks, find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.equalization.pixels import image_in_pixels
from ptq_onnx.equalization.restructure import reads_only_products, restructure, with_own_reads
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.base import Plan


@dataclass(frozen=True)
class Form:
    """The changed model, its blocks and sites, the ranges that are known, and what was done."""

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
    blocks = with_own_reads(plan, model, blocks)
    sites = find_sites(model, blocks, whole=target.all_codes)
    return Form(model, blocks, sites, fixed, counts)
