"""What the figures have in common: their options, a calibrated quantizer, a held-out source."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.opening import FolderSource, open_images
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Subject:
    """A prepared model, its preprocessing, calibration images and images held out."""

    prepared: Prepared
    preprocess: Preprocess
    calib: np.ndarray[Any, Any]
    apart: np.ndarray[Any, Any]
    names: list[str]
    threads: int

    def quantizer(self, **options: Any) -> SiteQuantizer:
        """A calibrated quantizer for the options of a QuantizeConfig."""
        p = self.prepared
        config = QuantizeConfig(threads=self.threads, **options)
        quantizer = make_quantizer(Plan(p.model, p.blocks, p.sites, config))
        quantizer.run(torch.zeros(1, *self.calib.shape[1:]), batches(self.calib, 8))
        return quantizer


def batches(images: np.ndarray[Any, Any], size: int = 2) -> list[np.ndarray[Any, Any]]:
    """The images, ``size`` at a time."""
    return [images[i : i + size] for i in range(0, len(images), size)]


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that all figures take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "models/digits_vit.onnx"))
    parser.add_argument("--calib", default=str(ROOT / "img/digits/calib"))
    parser.add_argument("--preprocess", help="imagenet or inception (default: the model's)")
    parser.add_argument("--images", type=int, default=64, help="calibration images (64)")
    parser.add_argument("--apart", type=int, default=32, help="images to measure on (32)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", help="a .png to write")
    return parser


def load(args: argparse.Namespace) -> Subject:
    """The model and images that the options name."""
    prepared = prepare(args.model)
    config = QuantizeConfig(preprocess=args.preprocess)
    preprocess = resolve_preprocess(prepared.model, config)
    source = open_images(args.calib, preprocess, limit=args.images)
    others = source.others(args.apart) if isinstance(source, FolderSource) else None
    if others is None:
        raise SystemExit(f"{args.calib} has no images left beside {args.images} for calibration.")
    return Subject(
        prepared,
        preprocess,
        np.concatenate(list(source.batches(8))),
        np.concatenate(list(others.batches(8))),
        others.names,
        args.threads,
    )


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown."""
    titles = list(titles)
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
