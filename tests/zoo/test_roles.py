"""Roles inside the blocks of the families, and Swin under fqvit as FQ-ViT has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ptq_onnx.engine.node_sessions import carried_specs
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.quantizers.base import SiteQuantizer
from zoo.architectures import torchvision_schemas
from zoo.cells import Cell, images, write
from zoo.checks import quantized

with torchvision_schemas():
    pytest.importorskip("timm", exc_type=ImportError)
pytest.importorskip("transformers")

BASE = {
    "norm1": 1, "qk": 1, "qk_scale": 1, "softmax": 1, "av": 1, "proj": 1, "residual1": 1,
    "norm2": 1, "fc1": 1, "gelu": 1, "fc2": 1, "residual2": 1,
}  # fmt: skip
PACKED, APART = {**BASE, "qkv": 1}, {**BASE, "q": 1, "k": 1, "v": 1}
CASES: dict[str, tuple[int, dict[str, int]]] = {
    "vit/ts17": (0, PACKED),
    "hf_vit/ts17": (1, APART),
    "deit_distilled/dy18": (1, PACKED),
    "dinov2/ts17": (0, {**PACKED, "layer_scale": 2}),
    "dinov2_swiglu/ts17": (0, {**PACKED, "layer_scale": 2, "gate": 1}),
    "eva02/ts17": (0, {**PACKED, "rope": 8, "gate": 1}),
    "eva02_sub_norm/ts17": (0, {**APART, "rope": 8, "gate": 1, "fc1_gate": 1, "mlp_norm": 1}),
    "beit/dy18": (0, {**PACKED, "bias": 1, "layer_scale": 2}),
    "swin/ts17": (0, {**PACKED, "bias": 1}),
    "swin/dy18": (1, {**PACKED, "bias": 1, "mask": 1}),
    "swinv2/ts17": (1, {**PACKED, "bias": 1, "mask": 1, "q_norm": 1, "k_norm": 1}),
    "cait/ts17": (0, {**PACKED, "head_mix": 2, "layer_scale": 2}),
    "pvt_v2/ts17": (
        0,
        {**BASE, "q": 1, "kv": 1, "kv_norm": 1, "reduction": 1, "dwconv": 1},
    ),
    "hf_swin/ts17": (1, {**APART, "bias": 1, "mask": 1}),
}


@pytest.fixture(scope="module")
def prepared(exports: Path) -> Callable[[str], Prepared]:
    """A cell's model by name, prepared once for all tests here, which change nothing in it."""
    return cache(lambda name: prepare(write(Cell(*name.split("/")), exports)))


@pytest.fixture(scope="module")
def swin(prepared: Callable[[str], Prepared]) -> SiteQuantizer:
    return quantized(prepared("swin/ts17"), images(Cell("swin", "ts17")), quantizer="fqvit")


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str, prepared: Callable[[str], Prepared]) -> None:
    block, expected = CASES[name]
    roles = prepared(name).blocks.roles.values()
    found = Counter(r.name for r in roles if r.block == block and r.name != "layout")
    assert found == expected


def test_swin_is_quantized_as_fq_vit_does(swin: SiteQuantizer) -> None:
    """QKᵀ before the bias, the table, their sum; the mask adds to codes and is not rounded."""
    sites = swin.plan.sites  # of the form that the target computes in integers
    roles = {
        (sites[t].role, sites[t].block, sites[t].is_parameter): spec
        for t, spec in swin.specs.items()
    }
    for block in range(4):
        table = roles[("pos_embed", block, True)]
        assert (table.rule.bits, table.rule.granularity, table.factor) == (8, "tensor", None)
        for role in ("qk", "bias"):
            assert roles[(role, block, False)].rule.granularity == "tensor"
        shares = roles[("softmax", block, False)].rule
        assert (shares.code, shares.around) == (Uniform(), (RowMaximum(), RowSums()))
        # A mask of -100 within the range would leave a step of half a unit.
        assert float(roles[("bias", block, False)].scale) < 0.2
    assert not any(role == "mask" for role, _, _ in roles)


def test_patch_merging_repeats_the_factors_four_times(
    prepared: Callable[[str], Prepared], swin: SiteQuantizer
) -> None:
    found = prepared("swin/ts17")
    merge = next(n for n, r in found.blocks.roles.items() if r.name == "merge_norm")
    node = next(n for n in found.model.graph if n.name == merge)
    source, spec = carried_specs(found.model, swin.specs)[str(node.inputs[0].name)]
    before = swin.specs[source]
    assert (found.sites[source].role, found.sites[source].block) == ("residual2", 1)
    assert before.factor is not None
    assert spec.factor is not None
    np.testing.assert_array_equal(spec.factor, np.tile(before.factor.ravel(), 4))
