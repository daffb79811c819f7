"""Sparse initializers, written out: onnx_ir has none, and would lose them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

LARGEST = 1 << 28
"""Elements of a tensor when it is written out."""


def write_out_sparse(graph: onnx.GraphProto) -> None:
    """Make dense initializers of the sparse ones, in place. Raises ValueError, one line."""
    for sparse in graph.sparse_initializer:
        name, dims = sparse.values.name, tuple(sparse.dims)
        try:
            graph.initializer.append(numpy_helper.from_array(_dense(sparse, dims), name))
        except Exception as error:  # whatever contradicts itself in there
            raise ValueError(f"sparse tensor '{name}' {list(dims)}: {error}") from error
    del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto, dims: tuple[int, ...]) -> NDArray[Any]:
    if min(dims, default=0) < 0 or math.prod(dims) > LARGEST:
        raise ValueError(f"its size is not from 0 to {LARGEST} elements")
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dims)
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < math.prod(dims):
        raise ValueError("an index is outside")
    dense = np.zeros(math.prod(dims), values.dtype)
    dense[flat] = values
    return dense.reshape(dims)
