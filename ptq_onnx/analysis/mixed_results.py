"""What mixing widths returns."""

from __future__ import annotations

from dataclasses import dataclass

from ptq_onnx.analysis.decibels import Decibels


@dataclass(frozen=True)
class MixedModule:
    """Weights or activations of one role in one block, and the ``bits`` they got. ``elements``: of
    one image, or parameters. ``noise``: what ranks them, in the bits of ``--bits``."""

    module: str
    part: str
    role: str
    block: int | None
    elements: int
    bits: int
    noise: float


@dataclass(frozen=True)
class MixedPoint:
    """Widths mixed for another target: mean bits of all that is mixed, by parameters and elements,
    million bytes of the file, and the noise that is expected of weights and activations, mixed and
    with ``--bits`` of so many everywhere (None: a number between two)."""

    bits: float
    megabytes: float
    weights_db: Decibels
    activations_db: Decibels
    uniform_weights_db: Decibels | None
    uniform_activations_db: Decibels | None


@dataclass(frozen=True)
class Mixed:
    """Bits of single modules and what they were chosen by.

    ``by``: ``output``, ``layer`` or ``nuclear``. ``weights``, ``activations``: mean bits by
    parameters and by elements, before and after. ``megabytes``: what the file was expected to
    have. ``images``: that the noise was measured on.
    """

    by: str
    target_bits: float | None
    target_size: float | None
    weights: tuple[float, float]
    activations: tuple[float, float]
    megabytes: float
    images: int
    modules: tuple[MixedModule, ...]
    points: tuple[MixedPoint, ...]
    more_bits: tuple[str, ...]
    seconds: float
