"""A small transformer as a file for Qualcomm's NPU, built as the pipeline does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from small_transformer import TOKENS, WIDTH

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.preparation.batch import with_batch
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.qdq.units import complete
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer


def tokens(images: int, seed: int = 0, count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, count, WIDTH)).astype(np.float32)


def quantizer_for(
    model: ir.Model,
    bits: str,
    more: Sequence[str] = (),
    count: int = TOKENS,
    inputs: Callable[[int, int], np.ndarray] | None = None,
) -> SiteQuantizer:
    """The quantizer of the target qnn on an equalised model, calibrated on ``inputs`` (how many,
    seed), tokens where that is not given."""
    made = inputs or (lambda images, seed: tokens(images, seed, count))
    config = QuantizeConfig(target="qnn", bits=bits, more_bits=tuple(more), mixed=False, threads=1)
    blocks = find_blocks(model)
    batches = [made(8, 0), made(8, 2)]
    whole = inputs is not None
    plan = equalise(Plan(model, blocks, find_sites(model, blocks, whole=whole), config), batches)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(batches[0][:1]), batches)
    return quantizer


def file_of(
    quantizer: SiteQuantizer, batch: int = 1, image: Sequence[int] = ()
) -> tuple[ir.Model, list[str]]:
    """The model of the file, and what stays in float."""
    model = with_batch(lower(quantizer.model, quantizer.specs), batch, image)
    return model, complete(model)
