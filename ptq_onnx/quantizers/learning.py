"""What training a block gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """One block: its error on the batches held apart, relative to its output's variance, before
    and after training, and whether it keeps what it learned, or the best ``part`` of it."""

    block: str
    before: float
    after: float
    kept: bool
    steps: int
    part: float
    resumed: bool = False
    """It was found finished by a run that had been stopped."""


@dataclass(frozen=True)
class Learning:
    """What a block has learned: constants and steps by name."""

    trained: Trained
    constants: Mapping[str, Array] = field(default_factory=dict)
    steps: Mapping[str, Array] = field(default_factory=dict)
