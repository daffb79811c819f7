"""Refuses tensors that are not finite before a sample of them misleads a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ModelError


def check_finite(values: Mapping[str, NDArray[np.float32]], tensors: Iterable[str]) -> None:
    """Raises ModelError for the first of the tensors that is NaN or infinite anywhere."""
    for tensor in tensors:
        if not np.isfinite(values[tensor]).all():
            raise not_finite(f"'{tensor}'")


def not_finite(tensor: str) -> ModelError:
    """The error of a tensor that is NaN or infinite."""
    return ModelError(
        f"Tensor {tensor} is NaN or infinite on a calibration image; check the model and its"
        " preprocessing."
    )
