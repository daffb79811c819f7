"""How often Python looks for objects that only refer to each other."""

from __future__ import annotations

import gc

SELDOM = 20_000, 50, 100
"""New objects between two searches, and how many searches of each generation are one of the next.
PyTorch's classes and the nodes of graphs live long: to visit them every 700 new objects is 6 to
10 % of an analysis (ViT-Ti, ``fqvit``), for at most 8 % less memory."""


def search_seldom() -> None:
    """For processes that are ours: those of a user's program keep what it chose."""
    gc.set_threshold(*SELDOM)
