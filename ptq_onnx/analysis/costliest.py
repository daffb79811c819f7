"""Which modules are measured on all images: those that cost most on few.

Modules differ by tens of dB, figures of 8 and of 32 images by 0.8 dB (layerwise, ViT-Ti with
``fqvit``; the order of the modules agrees at a rank correlation of 0.99, and 9 of the 10 worst of
32 images are among the 15 worst of 8). Most of the time would go into digits that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.results import Scope

FEW = 8
"""Images that every module is measured on."""
Costs = tuple[float, float, float]
"""The noise-to-signal ratio of the logits with a module alone quantized; that of the features with
the module alone in float; and that of the logits."""
PLACES: Mapping[Scope, tuple[int, int, int]] = {
    "op": (15, 6, 3),
    "kind": (2, 1, 0),
    "block": (2, 1, 0),
    "model": (1, 0, 0),
}
"""Modules that are measured on all images: the worst by each of the costs, no module twice."""


def images_of_first_run(count: int) -> int:
    """How many of the images all modules are measured on: all, where two runs save little."""
    return FEW if count >= 2 * FEW else count


def count_of_costliest(modules: Iterable[Module]) -> int:
    """How many of the modules :func:`costliest` chooses."""
    scopes = [m.scope for m in modules if m.part == "all"]
    return sum(min(sum(places), scopes.count(scope)) for scope, places in PLACES.items())


def costliest(costs: Mapping[Module, Costs]) -> list[Module]:
    """Whole modules (part ``all``) with the most noise alone, and those without which the least is
    left; in the order of ``costs``."""
    chosen: set[Module] = set()
    orders: list[Callable[[Module], float]] = [
        lambda m: -_or_infinite(costs[m][0]),
        lambda m: _or_infinite(costs[m][1]),
        lambda m: _or_infinite(costs[m][2]),
    ]
    for scope, places in PLACES.items():
        whole = [m for m in costs if (m.scope, m.part) == (scope, "all")]
        for order, count in zip(orders, places, strict=True):
            left = sorted((m for m in whole if m not in chosen), key=order)
            chosen.update(left[:count])
    return [m for m in costs if m in chosen]


def _or_infinite(ratio: float) -> float:
    """Of outputs that are no numbers."""
    return math.inf if math.isnan(ratio) else ratio
