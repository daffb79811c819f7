"""Several inputs of a model as one array, for all that streams batches of one.

A batch is then float32 [B, 1, 1, K]: each row says how it is cut (a mark, the number of inputs, the
rank and the sizes of each), and holds their values one behind the other, in the order of the
graph's inputs. So batches are still stacked, cut and repeated as images are, and whoever runs a
session takes them apart. Whole numbers are exact up to 2^24.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MARK = np.float32(-2.5e38)
"""What no image holds."""
EXACT = 1 << 24
"""The largest whole number up to which float32 has all."""
TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    **{
        f"tensor({name})": getattr(np, name)
        for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    },
}
"""What an input of a session is fed as."""


def pack(values: Sequence[Array]) -> NDArray[np.float32]:
    """One image's inputs, each without a batch axis, as [1, 1, K]."""
    head: list[float] = [float(MARK), len(values)]
    for value in values:
        head += [value.ndim, *value.shape]
    parts = [np.array(head, np.float32), *(np.asarray(v, np.float32).ravel() for v in values)]
    return np.concatenate(parts)[None, None]


def unpack(batch: Array) -> list[NDArray[np.float32]] | None:
    """The inputs [B, …] of a packed batch; None for images."""
    shape = batch.shape
    if batch.ndim != 4 or shape[1:3] != (1, 1) or not shape[0] or shape[3] < 2:
        return None
    row = batch[0, 0, 0]
    if row[0] != MARK:
        return None
    sizes: list[tuple[int, ...]] = []
    at = 2
    for _ in range(int(row[1])):
        rank = int(row[at])
        sizes.append(tuple(int(d) for d in row[at + 1 : at + 1 + rank]))
        at += 1 + rank
    found = []
    for size in sizes:
        count = math.prod(size)
        part = batch[:, 0, 0, at : at + count].reshape(shape[0], *size)
        found.append(np.ascontiguousarray(part))
        at += count
    return found


def given(session: Any, batch: Array) -> dict[str, Array]:
    """What a session in our form takes, by input: the batch, or its parts in their types."""
    inputs, parts = session.get_inputs(), unpack(batch)
    if parts is None:
        return {inputs[0].name: batch}
    return {
        i.name: part.astype(TYPES[i.type], copy=False)
        for i, part in zip(inputs, parts, strict=True)
    }


def picture_in(batch: Array) -> Array | None:
    """The images [B, C, H, W] of a batch; None where it has none."""
    parts = unpack(batch)
    if parts is None:
        return batch
    return next((part for part in parts if part.ndim == 4), None)
