"""The table: which architecture is tried through which exporter, and what must be found in it.

``run`` does all of one cell; the tests assert on what it returns. The table of docs/models.md is
made of ``CELLS`` and ``EXPECTED``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.targets.checking.check import check
from zoo.architectures import make
from zoo.checks import Agreement, Found, agreement, census, quantized, relative_error
from zoo.checks import run as run_file
from zoo.exporters import export

PARITY = 1e-4
HALF_PARITY = 5e-3
"""Against a file that computes in half precision: ours computes in single."""
EQUALISED = 1e-3
"""Equalisation is exact but for the rounding of float32."""
SHARE = 1e-3
"""Of codes that may differ by one (design: 0.1 %)."""
QUANTIZERS = {"deploy": 18.0, "fqvit": 8.0}
"""Quantizers and the SQNR in dB that random tiny networks must keep: a broken scale falls below."""

EXPECTED = {
    "vit": Found(5, 2, 9, 2, 2),
    "vit_registers": Found(5, 2, 9, 2, 2),
    "vit_avg_pool": Found(5, 2, 9, 2, 2),
    "vit_attention_pool": Found(6, 3, 14, 3, 3),
    "vit_rope": Found(7, 3, 14, 3, 3),
    "deit": Found(5, 2, 9, 2, 2),
    "deit_distilled": Found(5, 2, 10, 2, 2),
    "deit3": Found(5, 2, 9, 2, 2),
    "dinov2": Found(5, 2, 9, 2, 2),
    "dinov2_swiglu": Found(5, 2, 9, 2, 2),
    "eva02": Found(5, 2, 9, 2, 2),
    "eva02_sub_norm": Found(7, 2, 15, 2, 2),
    "aimv2": Found(6, 2, 11, 2, 2),
    "beit": Found(5, 2, 9, 2, 2),
    "clip": Found(6, 2, 13, 2, 2),
    "siglip": Found(6, 3, 17, 3, 3),
    "clip_timm": Found(6, 2, 9, 2, 2),
    "siglip_timm": Found(6, 3, 14, 3, 3),
    "cait": Found(9, 4, 25, 4, 4),
    "xcit": Found(13, 7, 15, 3, 3),
    "mixer": Found(5, 4, 9, 0, 4),
    "swin": Found(11, 4, 18, 4, 4),
    "swinv2": Found(19, 4, 18, 4, 4),
    "twins": Found(12, 4, 19, 4, 4),
    "maxvit": Found(9, 11, 17, 4, 4),
    "coatnet": Found(3, 5, 1, 1, 1),
    "levit": Found(0, 0, 15, 3, 3),
    "pit": Found(5, 2, 10, 2, 2),
    "pvt_v2": Found(9, 2, 11, 2, 2),
    "mobilevit": Found(21, 34, 37, 9, 9),
    "efficientformer_v2": Found(0, 13, 2, 3, 3),
    "convnext": Found(9, 4, 1, 0, 4),
    "hf_vit": Found(5, 2, 13, 2, 2),
    "hf_vit_sdpa": Found(5, 2, 13, 2, 2),
    "hf_deit": Found(5, 2, 14, 2, 2),
    "hf_swin": Found(11, 4, 26, 4, 4),
    "hf_dinov2": Found(5, 2, 13, 2, 2),
    "hf_segformer": Found(9, 2, 14, 2, 2),
    "detr": Found(6, 1, 14, 3, 3),
}
"""Norms (Layer, RMS and L2), GELUs (of any kind, SiLU too), linears, softmaxes, blocks."""

PACKED_BY_OPTIMIZER = Found(6, 2, 9, 2, 2)
"""CLIP behind onnxruntime's optimizer, which makes one weight of q, k and v."""

MUST = ("vit", "deit", "deit_distilled", "swin", "swinv2", "dinov2", "eva02", "beit", "clip")
MUST += ("hf_vit",)


@dataclass(frozen=True)
class Cell:
    """One architecture through one exporter."""

    architecture: str
    exporter: str
    expected: Found | None = None
    leftover: tuple[str, ...] = ()
    """Ops that rightly have no role."""

    @property
    def name(self) -> str:
        """``swin/dy18``"""
        return f"{self.architecture}/{self.exporter}"


@dataclass(frozen=True)
class Result:
    """What a cell gave; ``decibels`` and ``agreements`` by quantizer."""

    found: Found
    unrecognised: tuple[str, ...]
    parity: float
    decibels: dict[str, float] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    violations: tuple[str, ...] = ()
    """Errors that the checker finds in the files."""
    moved: float = 0.0
    """Relative error of the equalised float model."""

    def complaints(self, cell: Cell) -> list[str]:
        """Everything that is not as it must be."""
        expected = cell.expected or EXPECTED[cell.architecture]
        limit = HALF_PARITY if cell.exporter.endswith("half") else PARITY
        found: list[str] = []
        if self.found != expected:
            found.append(f"found {self.found}, expected {expected}")
        if self.unrecognised != cell.leftover:
            found.append(f"without a role: {', '.join(self.unrecognised)}")
        if not self.parity <= limit:
            found.append(f"the fused graph is off by {self.parity:.1e}")
        if not self.moved <= EQUALISED:
            found.append(f"the equalised model is off by {self.moved:.1e}")
        found.extend(self.violations)
        for name, least in QUANTIZERS.items():
            if name in self.decibels and self.decibels[name] < least:
                found.append(f"{name}: {self.decibels[name]:.1f} dB")
            agreed = self.agreements.get(name)
            if agreed is not None and (agreed.worst > 1 or agreed.share > SHARE):
                found.append(f"{name} disagrees with the simulator: {agreed}")
        return found


def _cells() -> list[Cell]:
    first = {"aimv2": "dy23", "detr": "ts14"}
    cells = [Cell(name, first.get(name, "ts17")) for name in EXPECTED]
    for exporter in ("ts11", "ts14", "ts20", "dy18", "dy23"):
        for name in MUST:
            cells.append(Cell(name, exporter))
    cells += [Cell(name, "ts13") for name in ("vit", "swin", "hf_vit")]
    cells += [Cell(name, "ts18") for name in ("vit", "cait", "hf_swin")]
    cells += [Cell(name, "dy20") for name in ("vit", "swin")]
    cells += [Cell(name, "dy23") for name in ("detr",)]
    cells += [Cell(name, "ts17-static") for name in ("vit", "swin", "levit")]
    cells += [Cell("vit", "dy18-static")]
    cells += [Cell(name, "ts17-size") for name in ("convnext", "pvt_v2", "hf_segformer")]
    cells += [Cell(name, "ts17-half") for name in ("vit", "swin")]
    cells += [Cell("vit", "ort-vit"), Cell("clip", "ort-clip", PACKED_BY_OPTIMIZER)]
    cells += [Cell("swin", "ort-swin")]
    cells += [Cell(name, "ort-session") for name in ("vit", "clip", "eva02")]
    # The session makes an RMS norm of the patch embedding's LayerNorm, and leaves its Sub over.
    cells += [Cell("swin", "ort-session", leftover=("Sub",))]
    cells += [Cell("vit", "tf2onnx"), Cell("vit", "paddle2onnx"), Cell("swin", "tf2onnx")]
    cells += [Cell("vit", "keras")]
    return cells


CELLS = _cells()
FIRST = tuple(CELLS[: len(EXPECTED)])
"""Each architecture once: quantized by all quantizers."""
COVERING = {
    "ts11": ("swin", "clip", "hf_vit"),
    "ts13": ("vit",),
    "ts14": ("vit", "deit", "swinv2", "dinov2"),
    "ts18": ("cait",),
    "ts20": ("deit_distilled", "eva02", "beit"),
    "dy18": ("deit_distilled", "swin", "beit", "clip"),
    "dy20": ("vit",),
    "dy23": ("deit", "swinv2", "dinov2", "eva02", "hf_vit"),
    "ts17-static": ("vit", "levit"),
    "dy18-static": ("vit",),
    "ts17-size": ("convnext", "hf_segformer"),
    "ts17-half": ("vit",),
    "ort-vit": ("vit",),
    "ort-clip": ("clip",),
    "ort-swin": ("swin",),
    "ort-session": ("clip", "swin"),
    "tf2onnx": ("vit",),
    "paddle2onnx": ("vit",),
    "keras": ("vit",),
}
"""Of the others, those that always run, quantized by one quantizer in turn: every exporter, and the
architectures that must work with all of them through each kind: TorchScript's and dynamo's."""
ALWAYS = {cell: tuple(QUANTIZERS) for cell in FIRST}
for _turn, _cell in enumerate(
    c for c in CELLS if c not in FIRST and c.architecture in COVERING.get(c.exporter, ())
):
    ALWAYS[_cell] = (tuple(QUANTIZERS)[_turn % len(QUANTIZERS)],)
"""Cells, and their quantizers; ``-m full_matrix`` runs the rest, all of them by all quantizers."""


def images(cell: Cell, count: int = 4) -> np.ndarray:
    """Noise of the architecture's size, [N, C, H, W], the same at every call."""
    _, shape = make(cell.architecture)
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def write(cell: Cell, folder: Path) -> Path:
    """The cell's file, exported once; several processes may share the folder."""
    path = folder / f"{cell.architecture}.{cell.exporter}.onnx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            export(cell.architecture, cell.exporter, Path(place) / path.name).replace(path)
    return path


def run(cell: Cell, folder: Path, quantizers: Iterable[str] = QUANTIZERS) -> Result:
    """Everything of one cell: parity, counts, quantization, the file against the simulator."""
    torch.set_num_threads(1)
    path, batch = write(cell, folder), images(cell)
    prepared = prepare(path)
    fused = graphs.serialize(prepared.model)
    reference = run_file(fused, batch[:2])
    decibels: dict[str, float] = {}
    agreements: dict[str, Agreement] = {}
    violations: list[str] = []
    moved = 0.0
    for name in quantizers:
        quantizer = quantized(prepared, batch, quantizer=name)
        file = graphs.serialize(lower(quantizer.model, quantizer.specs))
        violations.extend(f"{name}: {error}" for error in violated(file, strays=name == "deploy"))
        if name == "deploy":
            equalised = run_file(graphs.serialize(quantizer.plan.model), batch[:2])
            moved = relative_error(equalised, reference)
        decibels[name] = ratio(run_file(file, batch[:2])[0], reference[0])
        agreements[name] = agreement(prepared, quantizer, batch[:2])
    return Result(
        found=census(prepared),
        unrecognised=unrecognised(prepared),
        violations=tuple(violations),
        moved=moved,
        parity=relative_error(reference, run_file(str(path), batch[:2], optimize=False)),
        decibels=decibels,
        agreements=agreements,
    )


def violated(content: bytes, *, strays: bool = False) -> list[str]:
    """Errors of the conformance check of a file for ONNX Runtime; ``strays``: pairs that no product
    reads too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.onnx"
        path.write_bytes(content)
        found = check(path, "onnxruntime")
        more = [v for v in found.violations if strays and v.rule == "stray-pair"]
        return [f"{v.rule} {v.node}: {v.text}" for v in (*found.errors, *more)]


def unrecognised(prepared: Prepared) -> tuple[str, ...]:
    """Types of the ops without a role."""
    kinds = {n.name or str(n.outputs[0].name): n.op_type for n in prepared.model.graph}
    return tuple(sorted(kinds[name] for name in prepared.blocks.unrecognised))


def ratio(found: np.ndarray, expected: np.ndarray) -> float:
    """SQNR in dB."""
    noise = float(((expected - found).astype(np.float64) ** 2).sum())
    return 10 * float(np.log10((expected.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))
