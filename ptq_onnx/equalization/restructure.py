"""A model in the forms that a target's kernels take, and the plan that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common

from ptq_onnx.blocks.regions import decide
from ptq_onnx.blocks.roles import Blocks, find_blocks
from ptq_onnx.blocks.walking import name_of, through_layout
from ptq_onnx.config.targets import Target
from ptq_onnx.equalization import runtime_forms as forms
from ptq_onnx.equalization.code_forms import regions_of, sites_of, write_on_codes
from ptq_onnx.equalization.experts import experts_as_linears
from ptq_onnx.equalization.patch_forms import packed_pixels_as_linear, patches_as_linear
from ptq_onnx.equalization.reads import integer_readers, own_reads
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.base import Plan


def restructure(model: ir.Model, target: Target, *, products: bool = False) -> dict[str, int]:
    """Bring a fused model into the forms that help the target (``runtime_forms.py``), in place; how
    often each fired. ``products``: only those without which a product would stay float."""
    wanted = {
        "PatchesAsLinear": (patches_as_linear, target.patches_as_linear),
        "PackedPixelsAsLinear": (
            packed_pixels_as_linear,
            target.codes_of_convolutions and products,
        ),
        "ExpertsAsLinears": (experts_as_linears, True),
        "UnpackedAttention": (forms.unpack_attention, target.split_qkv and not products),
        "FoldedScale": (forms.fold_attention_scales, not products),
        "KeptRank": (forms.keep_rank, target.keep_rank),
    }
    return {name: form(model) if wished else 0 for name, (form, wished) in wanted.items()}


def in_form(plan: Plan) -> Plan:
    """The plan for a model whose products the target computes in integers (``runtime_forms.py``).

    For quantizers that take the model as it is otherwise. The plan's own model is left alone.
    """
    model = plan.model.clone()
    counts = restructure(model, plan.config.runtime, products=True)
    common.RemoveUnusedNodesPass()(model)
    blocks, more = on_codes(plan, model, find_blocks(model))
    counts |= more
    blocks = with_own_reads(plan, model, blocks)
    sites = sites_of(model, blocks, plan.config)
    extra: dict[str, Site] = {}
    if plan.config.runtime.codes_of_convolutions and not plan.config.regions:
        extra = convolution_outputs(model, blocks, sites)
    same = sites.keys() == plan.sites.keys()
    if (
        not extra
        and same
        and len(model.graph) == len(plan.model.graph)
        and not any(counts.values())
    ):
        return plan
    return replace(plan, model=model, blocks=blocks, sites={**extra, **sites}, forms=counts)


def on_codes(plan: Plan, model: ir.Model, blocks: Blocks) -> tuple[Blocks, dict[str, int]]:
    """The blocks once the activation functions between convolutions are written as ops on codes,
    in place, and how many of them there were."""
    regions = regions_of(model, plan.config)
    if plan.config.regions:
        decide(model.graph, regions)
    roles, counts = write_on_codes(model, blocks, regions)
    return replace(blocks, roles={**blocks.roles, **roles}), counts


def with_own_reads(plan: Plan, model: ir.Model, blocks: Blocks) -> Blocks:
    """The blocks with the copies that are quantized where products alone are, put into the
    model."""
    if not plan.config.products_only or plan.config.weight_only:
        return blocks
    takes = integer_readers(plan.config, blocks, regions_of(model, plan.config))
    whole, at_run_time = plan.config.runtime.all_codes, plan.config.at_run_time
    roles = own_reads(model, blocks, takes, at_run_time=at_run_time, whole=whole)
    return replace(blocks, roles={**blocks.roles, **roles})


def convolution_outputs(
    model: ir.Model, blocks: Blocks, sites: Mapping[str, Site]
) -> dict[str, Site]:
    """Outputs of convolutions that are no sites, as sites: of those that a Concat stands behind,
    only what it makes is one."""
    found: dict[str, Site] = {}
    for node in model.graph:
        output = node.outputs[0]
        if node.op_type != "Conv" or str(output.name) in sites or output.shape is None:
            continue
        role = blocks.roles.get(name_of(node))
        found[str(output.name)] = Site(
            tensor=str(output.name),
            role="other" if role is None else role.name,
            block=None if role is None else role.block,
            channel_axes=(1,),
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in output.shape),
            producer=name_of(node),
            consumers=tuple(name_of(n) for n, _ in through_layout(output)),
        )
    return found


def reads_only_products(site: Site, nodes: dict[str, ir.Node]) -> bool:
    """True for an activation that products alone read."""
    readers = [nodes[name] for name in site.consumers]
    return bool(readers) and all(n.op_type in ("Linear", "Conv", "MatMul") for n in readers)
