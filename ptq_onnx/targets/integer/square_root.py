"""⌊√w⌋ of integers w in [2^60, 2^62), by Newton's method with integer division.

The start x_0 = ⌊(⌊w / 2^30⌋ + 9·2^28) / 3⌋ + 1 is above √w: with u = w / 2^60 in [1, 4), the
tangent of √u at 9/4, (u + 9/4) / 3, is above √u, and the 1 covers both floors. Its relative
error e is at most 1/12 (at u = 1), plus 2^-30.

A step x ↦ ⌊(x + ⌊w / x⌋) / 2⌋ never falls below ⌊√w⌋: (x + w/x) / 2 ≥ √w for every x > 0, and
⌊(x + ⌊w/x⌋) / 2⌋ = ⌊(x + w/x) / 2⌋. From above, a step without floors takes e to e² / (2 (1 +
e)): 1/12, 3.3·10^-3, 5.3·10^-6, 1.4·10^-11. Floors only lower an iterate that stays at or
above ⌊√w⌋. After three steps x < √w (1 + 1.5·10^-11) < √w + 0.04, so x is ⌊√w⌋ or one more,
and one comparison of x² with w decides; x² < 2^62.01 fits int64.
"""

from __future__ import annotations

import numpy as np

from ptq_onnx.targets.integer.grid import Ints

STEPS = 3
"""Newton steps, see above."""


def integer_sqrt(w: Ints) -> Ints:
    """⌊√w⌋ for w in [2^60, 2^62), int64, any shape."""
    x = ((w >> 30) + (9 << 28)) // 3 + 1
    for _ in range(STEPS):
        x = (x + w // x) // 2
    return np.asarray(x - (x * x > w), np.int64)
