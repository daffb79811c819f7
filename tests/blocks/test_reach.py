"""Which tensors reach much further up than down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_graph import SmallGraph

from ptq_onnx.blocks.reach import UPWARDS, reaches_up

FACTOR = np.array([0.5, 1, 2, 4], np.float32)


def reaches(make: Any) -> bool:
    g = SmallGraph((2, 3, 4))
    return reaches_up(g.model(make(g)).graph.outputs[0])


@pytest.mark.parametrize("name", sorted(UPWARDS))
def test_activation_functions_do(name: str) -> None:
    """Also times positive constants, as equalisation leaves them, and copied."""
    domain = {"domain": "ptq_onnx"} if name in ("QuickGelu", "Silu") else {}
    assert reaches(lambda g: g(name, "x", **domain))
    assert reaches(lambda g: g("Identity", g("Mul", g(name, "x", **domain), FACTOR)))
    assert reaches(lambda g: g("Mul", FACTOR, g(name, "x", **domain)))


@pytest.mark.parametrize(
    "make",
    [
        lambda g: g("Tanh", "x"),
        lambda g: g("Mul", g("Gelu", "x"), -FACTOR),
        lambda g: g("Mul", g("Gelu", "x"), "x"),
        lambda g: g("Add", g("Gelu", "x"), FACTOR),
        lambda g: g("Identity", "x"),
    ],
)
def test_others_do_not(make: Any) -> None:
    assert not reaches(make)
