"""Whole runs on models like the embedded one, with its images: what is reported, what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ptq_onnx

IMAGES = Path(__file__).resolve().parents[1] / "img/digits"


def quantized(model: Path, folder: Path, images: int = 32, **options: Any) -> dict[str, Any]:
    """The report of a run."""
    ptq_onnx.quantize(
        model,
        calib=IMAGES / "calib",
        images=images,
        report=False,
        threads=1,
        output=folder,
        **options,
    )
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def sqnr(model: Path, file: Path, count: int | None = None) -> float:
    """SQNR in dB of the file against the model, on ``count`` images or all."""
    few = [str(path) for path in sorted((IMAGES / "val").rglob("*.png"))[:count]]
    found = ptq_onnx.evaluate(
        file, IMAGES / "val" if count is None else few, reference=model, threads=1
    )
    return float(found.sqnr_db or 0)
