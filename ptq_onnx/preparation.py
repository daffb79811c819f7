"""From a file to a fused graph with blocks and sites: what every command starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ptq_onnx import graph as graphs
from ptq_onnx.blocks import Blocks, find_blocks
from ptq_onnx.contrib import refuse_tied
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


def prepare(path: str | Path, opset: int = 21) -> Prepared:
    """Load, clean and fuse a model, and find its blocks. Raises ModelError."""
    model = graphs.load(path)
    refuse_tied(model, Path(path))
    report = graphs.clean(model, opset)
    counts = fuse(model)
    blocks = find_blocks(model)
    return Prepared(Path(path), model, report, counts, blocks, find_sites(model, blocks))
