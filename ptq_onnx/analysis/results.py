"""What the analyses return: plain values that reports draw and JSON holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def decibels(snr: float) -> float:
    """-10 log10 of a noise-to-signal ratio; 200 where there is no noise at all."""
    return 200.0 if snr <= 1e-20 else -10 * math.log10(snr)


@dataclass(frozen=True)
class OpError:
    """The error at the output of one op when the whole graph is quantized.

    ``snr`` is noise to signal, Σ(q - f)² / Σf² over all images: lower is better. ``snr_db``
    is -10 log10 of it: higher is better. ``quantized``: the op's output is rounded to codes.
    """

    node: str
    op_type: str
    role: str
    block: int | None
    snr: float
    snr_db: float
    mse: float
    cosine: float
    max_abs: float
    quantized: bool


@dataclass(frozen=True)
class BlockError:
    """The error at the output of one transformer block (its second residual add)."""

    block: int
    snr: float
    snr_db: float


@dataclass(frozen=True)
class Graphwise:
    """Errors of all compute ops, in graph order, with every op quantized.

    ``held_apart``: the images were not used in calibration.
    """

    images: int
    held_apart: bool
    ops: tuple[OpError, ...]
    blocks: tuple[BlockError, ...]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one block on one image, by model: float, vanilla, the chosen quantizer.

    ``maps``: label → [heads, rows, columns] weights on the patches, of the class token, or
    averaged over the queries where there is none (``query`` says which). ``snr_db`` is that
    of the whole attention tensor against float; None for float itself. ``image`` is uint8
    [H, W, 3].
    """

    block: int
    image: NDArray[np.uint8]
    image_name: str
    query: str
    maps: dict[str, NDArray[np.float32]]
    snr_db: dict[str, float | None]
