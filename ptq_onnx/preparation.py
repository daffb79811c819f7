"""From a file to a fused graph with blocks and sites: what every command starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ptq_onnx import graph as graphs
from ptq_onnx.blocks import Blocks, find_blocks
from ptq_onnx.contrib import refuse_tied
from ptq_onnx.free_batch import FixedBatch, fixed_batch, freed
from ptq_onnx.fusion import fuse
from ptq_onnx.sites import find_sites
from ptq_onnx.spec import Site


@dataclass(frozen=True)
class Prepared:
    """A cleaned and fused model, and what is known of it."""

    path: Path
    model: ir.Model
    cleaned: graphs.CleanReport
    fusions: dict[str, int]
    blocks: Blocks
    sites: dict[str, Site]
    fixed: FixedBatch | None = None
    """The file's batch size, where it is fixed and the model here takes any."""


def prepare(path: str | Path, opset: int = 21, *, free: bool = False) -> Prepared:
    """Load, clean and fuse a model, and find its blocks. Raises ModelError.

    ``free``: without the batch size that it may be fixed to, where its graph allows that.
    """
    model = graphs.load(path)
    refuse_tied(model, Path(path))
    report = graphs.clean(model, opset)
    fixed = fixed_batch(model) if free else None
    if fixed is not None:
        any_batch = freed(model, fixed, report.opset)
        model, fixed = (model, None) if any_batch is None else (any_batch, fixed)
    counts = fuse(model)
    blocks = find_blocks(model)
    return Prepared(Path(path), model, report, counts, blocks, find_sites(model, blocks), fixed)
