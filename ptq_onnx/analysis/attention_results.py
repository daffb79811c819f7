"""What the analysis of attention returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import Decibels
from ptq_onnx.numerics.codes.by_name import CodeName


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


@dataclass(frozen=True)
class AttentionCode:
    """One way to hold attention maps: ``uniform`` levels on [0, 1], ``log2`` codes (LIS) or 8-bit
    floats; ``row``: every row divided by its largest value before.

    Measured on float maps, rounded: ``snr``, ``snr_db``; ``rank``, the mean Spearman correlation
    of rows before and after (ties share their rank); ``discordant``, the share of pairs in a row
    whose order is lost or turned (a ranking loss); ``row_sum``, smallest, mean and largest sum
    of a row, one before; ``zero``, the share of values that become zero.
    """

    code: CodeName
    bits: int
    snr_db: Decibels
    rank: float
    discordant: float
    row_sum: tuple[float, float, float]
    zero: float
    snr: float = 0.0
    row: bool = False


@dataclass(frozen=True)
class BlockAttention:
    """Attention maps of one block over all images looked at.

    ``counts``: values per bin of log2 A, from 2^``lowest`` up to 1, one bin per half octave,
    those below in the first. ``codes``: what rounding does to float maps, in 8 and 4 bits and in
    the model's own; ``own``: what the codes of the quantized model do, None where it has none.
    ``snr``, ``snr_db``, ``rank``, ``discordant``: the maps of the quantized model against those of
    the float one.
    """

    block: int
    heads: int
    lowest: int
    counts: tuple[int, ...]
    codes: tuple[AttentionCode, ...]
    snr_db: Decibels
    rank: float
    discordant: float
    snr: float = 0.0
    own: AttentionCode | None = None


@dataclass(frozen=True)
class Rollout:
    """Attention rollout to the patches, [rows, columns], of one image: float and quantized,
    with the correlation (Pearson) of the two maps."""

    image_name: str
    float_map: tuple[tuple[float, ...], ...]
    quantized_map: tuple[tuple[float, ...], ...]
    correlation: float


@dataclass(frozen=True)
class AttentionAnalysis:
    """Attention of all blocks on ``images`` images."""

    images: int
    blocks: tuple[BlockAttention, ...]
    rollout: Rollout | None
