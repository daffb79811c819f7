"""Tensors' sizes in a graph that takes images of any size, at the size that its images have.

The preprocessing in the model's metadata says it: the graph's height and width stay open, but what
is counted (multiplications, time) is counted at that size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.symbolic_shapes import Symbolic
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess

ELEMENTS = "ptq_onnx.elements"
"""Key of a tensor's ``meta``: how many elements it has for one image."""
CHANNELS = (1, 3)

Sizes = Mapping[ir.Value, tuple[int, ...]]


def known_sizes(model: ir.Model) -> Sizes:
    """Shapes by tensor where the image's height or width is open, at the size that the model's
    images have and an open batch of one; nothing where none is open or no metadata say the size."""
    image = _image(model)
    if image is None or image.shape is None or len(image.shape) != 4:
        return {}
    shape, size = list(image.shape), _size(model)
    last = shape[3] in CHANNELS and shape[1] not in CHANNELS
    sides = (1, 2) if last else (2, 3)
    if size is None or all(isinstance(shape[axis], int) for axis in sides):
        return {}
    told = {0: 1, **dict(zip(sides, size, strict=True))}
    dims = [d if isinstance(d, int) else told.get(axis, d) for axis, d in enumerate(shape)]
    found = Symbolic(model.graph, given={image: dims}).run().shapes
    return {v: tuple(s) for v, s in found.items() if all(isinstance(d, int) for d in s)}


def note_elements(model: ir.Model) -> None:
    """Note in the ``meta`` of these tensors how many elements they have for one image."""
    found, image = known_sizes(model), _image(model)
    for value, shape in found.items():
        batch = 1 if image is None else found[image][0]
        value.meta[ELEMENTS] = math.prod(shape) // batch


def _image(model: ir.Model) -> ir.Value | None:
    """The first input that is no initializer."""
    return next((v for v in model.graph.inputs if not v.is_initializer()), None)


def _size(model: ir.Model) -> tuple[int, int] | None:
    """Height and width of the model's images."""
    stored = model.metadata_props.get(METADATA_KEY)
    try:
        return None if stored is None else Preprocess.from_json(stored).size
    except ConfigError:
        return None
