"""Attention maps as the page shows them: small pictures without text, which the page sets itself.

Text in the page's own type is legible at any width, by day and by night, and in print.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ptq_onnx.analysis.attention_results import AttentionMap
from ptq_onnx.report.attention_map import COLORS, enlarged, overlay, told
from ptq_onnx.report.svg import MAP_SHARE, map_limit

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Column:
    """One model: its mean map on the picture and bare, as data addresses, and its SNR in words."""

    label: str
    overlay: str
    mean: str
    snr: str


@dataclass(frozen=True)
class Head:
    """Maps of one head, by model; colours end at ``limit``."""

    number: int
    maps: tuple[tuple[str, str], ...]
    limit: float


@dataclass(frozen=True)
class Sheet:
    """All maps of one block on one image. ``limit``: the weight of the brightest colour of the
    means over heads; ``largest``: the largest there is; ``share``: the percentile it is."""

    title: str
    query: str
    picture: str
    columns: tuple[Column, ...]
    heads: tuple[Head, ...]
    limit: float
    largest: float
    share: float = MAP_SHARE


def sheet(found: AttentionMap, title: str, chosen: Sequence[int] = ()) -> Sheet:
    """The maps of all heads, or of those ``chosen`` that there are."""
    maps = {k: np.nan_to_num(v.astype(np.float32)) for k, v in found.maps.items()}
    means = {label: heads.mean(axis=0) for label, heads in maps.items()}
    limit = map_limit(*means.values())
    picture = enlarged(found.image)
    count = max(len(heads) for heads in maps.values())
    numbers = [h for h in dict.fromkeys(chosen) if h < count] if chosen else [*range(count)]
    columns = [
        Column(
            label,
            _address(overlay(picture, np.asarray(mean / limit, np.float32)), "webp"),
            _colored(mean, limit),
            told(found.snr_db.get(label)),
        )
        for label, mean in means.items()
    ]
    return Sheet(
        title=title,
        query=found.query,
        picture=_address(picture, "webp"),
        columns=tuple(columns),
        heads=tuple(_head(number, maps) for number in numbers),
        limit=limit,
        largest=max(float(mean.max()) for mean in means.values()),
    )


def _head(number: int, maps: dict[str, Weights]) -> Head:
    present = {label: heads[number] for label, heads in maps.items() if number < len(heads)}
    limit = map_limit(*present.values())
    return Head(number, tuple((k, _colored(v, limit)) for k, v in present.items()), limit)


def _colored(weights: Weights, limit: float) -> str:
    """A pixel a patch; the page enlarges it without smoothing."""
    colors = mpl.colormaps[COLORS](np.clip(weights / limit, 0, 1))[..., :3]
    return _address(np.rint(colors * 255).astype(np.uint8), "png")


def _address(picture: NDArray[np.uint8], kind: str) -> str:
    buffer = io.BytesIO()
    quality = {"quality": 75, "method": 4} if kind == "webp" else {"optimize": True}
    Image.fromarray(picture).save(buffer, kind, **quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
