"""Prepared models, their images and calibrated quantizers, made once for all tests.

Nothing here may be changed by a test: the same objects serve all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.images.opening import METADATA_KEY, Preprocess, open_images
from ptq_onnx.preparation.prepare import Prepared, prepare
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

Array = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "models/digits_vit.onnx"


@cache
def prepared(path: Path) -> Prepared:
    """A model, loaded, cleaned and fused."""
    return prepare(path)


@cache
def images(path: Path = DIGITS, folder: Path = ROOT / "img/digits/calib", count: int = 32) -> Array:
    """Some images of a folder as the model wants them, [count, C, H, W]."""
    text = prepared(path).model.metadata_props.get(METADATA_KEY)
    preprocess = Preprocess.named("inception") if text is None else Preprocess.from_json(text)
    return np.concatenate(list(open_images(folder, preprocess, limit=count).batches(8)))


def quantized(
    path: Path = DIGITS, calibration: Array | None = None, **options: Any
) -> SiteQuantizer:
    """A calibrated quantizer of its own graph, for the options of a QuantizeConfig; fqvit by
    itself, which has codes of every kind."""
    found = prepared(path)
    data = images() if calibration is None else calibration
    config = QuantizeConfig(**{"quantizer": "fqvit", "threads": 1, **options})
    plan = Plan(found.model, found.blocks, found.sites, config)
    batches = [data[i : i + 8] for i in range(0, len(data), 8)]
    if config.equalizes:
        plan = rewritten(plan, batches)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.zeros(1, *data.shape[1:]), batches)
    return quantizer


def uncalibrated(path: Path = DIGITS, **options: Any) -> SiteQuantizer:
    """A quantizer with its rules and no numbers, for the options of a QuantizeConfig."""
    found = prepared(path)
    config = QuantizeConfig(**{"quantizer": "fqvit", "threads": 1, **options})
    return make_quantizer(Plan(found.model, found.blocks, found.sites, config))


def subject(quantizer: SiteQuantizer, path: Path = DIGITS) -> Prepared:
    """The model that a quantizer quantized, which need not be the prepared one."""
    plan = quantizer.plan
    return replace(
        prepared(path), model=quantizer.model, blocks=plan.blocks, sites=dict(plan.sites)
    )


def decibels(found: Array, expected: Array) -> float:
    """10 log10 of signal to noise; 400 where there is no noise."""
    noise = float(np.sum((found.astype(np.float64) - expected) ** 2))
    return 400.0 if noise == 0 else 10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / noise)
