"""The image input as a product ships it: bytes, channels last, normalised inside the graph.

Inside this package every model reads float32 images [batch, channels, height, width]. A file with
another input is brought to that form when it is read (:func:`take_images`), its own input is
kept in the metadata, and put back in front when a model is written (:func:`put_back`), so that
what reads the file feeds the quantized one as it fed the float one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.fusion.normalisation import FLOATS, normalised_from
from ptq_onnx.graph.formula import unique_name
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.runtime.packed import TYPES, unpack

KEY = "ptq_onnx.input"
"""Key of a model's ``metadata_props`` while it is in our form; no file has it."""
PIXELS_KEY = "ptq_onnx.pixels"
"""Largest value of a picture that the graph normalises itself: 255, or 1; no file has it."""

NEARLY = 1e-3
"""How far from a whole number a pixel may be."""

SIDES = (1, 3)
"""How many channels an image has."""
TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
MOVES = frozenset(
    ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Identity", "Flatten")
)
"""Ops that move bytes as they move floats."""


@dataclass(frozen=True)
class Signature:
    """An input of a file: type by ONNX's name, dimensions, names of the dynamic ones, and what
    the image is called in our form."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    inner: str

    @property
    def channels_last(self) -> bool:
        """Whether the image is [batch, height, width, channels]."""
        return channels_last(self.shape)


def channels_last(shape: Any) -> bool:
    """Whether an image of that shape has its channels last: 1 or 3 of them, and not second."""
    dims = [d if isinstance(d, int) else None for d in shape]
    return len(dims) == 4 and dims[3] in SIDES and dims[1] not in SIDES


def fed(images: NDArray[np.float32], shape: Any, dtype: Any) -> NDArray[Any]:
    """Float images [B, C, H, W] as an input of that shape and NumPy type takes them.

    Raises ImageError where bytes are wanted and the images are no pixels.
    """
    dtype = np.dtype(dtype)
    found: NDArray[Any] = images
    if channels_last(shape):
        found = np.ascontiguousarray(found.transpose(TO_LAST))
    if dtype.kind in "iu":
        whole, limits = np.rint(found), np.iinfo(dtype)
        off = float(np.abs(found - whole).max(initial=0))
        if off > NEARLY or whole.min(initial=0) < limits.min or whole.max(initial=0) > limits.max:
            raise ImageError(
                f"The model takes pixels as {dtype}, {limits.min} to {limits.max}, got"
                f" {found.min():.4g} to {found.max():.4g}: feed them as they are"
                " (--preprocess none)."
            )
        found = whole
    return found.astype(dtype, copy=False)


def feeds(inputs: Any, batch: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What the inputs of a session of a file take, by name: the images of a batch in their layout
    and type, or every part of a packed one. Raises ImageError."""
    parts = unpack(batch)
    if parts is None:
        image = next((i for i in inputs if len(i.shape) == 4), inputs[0])
        return {image.name: fed(batch, image.shape, TYPES[image.type])}
    if len(parts) != len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise ImageError(f"{len(parts)} inputs are given for the model's {len(inputs)}: {names}.")
    found: dict[str, NDArray[Any]] = {}
    for one, part in zip(inputs, parts, strict=True):
        kind, image = TYPES[one.type], len(one.shape) == 4
        found[one.name] = fed(part, one.shape, kind) if image else part.astype(kind, copy=False)
    return found


def signature(model: ir.Model) -> Signature | None:
    """The file's own image input, where it is not in our form."""
    text = model.metadata_props.get(KEY)
    if text is None:
        return None
    values = json.loads(text)
    return Signature(**{**values, "shape": tuple(values["shape"])})


def pixels(model: ir.Model) -> int | None:
    """255 or 1 where the graph normalises pictures of 0 to that itself."""
    text = model.metadata_props.get(PIXELS_KEY)
    return None if text is None else int(text)


def as_pixels(model: ir.Model, config: QuantizeConfig, found: Preprocess) -> Preprocess:
    """The preprocessing of a model that takes bytes, which can be no other than none.

    Raises ConfigError where an option asks for one.
    """
    own = signature(model)
    if own is None or own.dtype != ir.DataType.UINT8.name:
        return found
    named = config.preprocess not in (None, "none")
    if named or config.mean is not None or config.std is not None:
        option = f"--preprocess {config.preprocess}" if named else "--mean and --std"
        raise ConfigError(
            f"{option}: the model's input '{own.name}' is uint8: it takes pixels as they are and"
            " normalises them itself; leave the option out."
        )
    plain = Preprocess.named("none")
    channels = found.channels
    return replace(found, mean=plain.mean[:channels], std=plain.std[:channels])


def take_images(model: ir.Model, image: ir.Value) -> list[str]:
    """Let the graph read float32 [batch, channels, height, width], in place; returns notes."""
    notes: list[str] = []
    graph, shape = model.graph, list(image.shape or ())
    last, of_bytes = channels_last(shape), image.dtype == ir.DataType.UINT8
    if last or of_bytes:
        dims = tuple(d if isinstance(d, int) else str(d.value) for d in shape)
        inner = unique_name(graph, f"{image.name}_image")
        own = Signature(str(image.name), (image.dtype or ir.DataType.FLOAT).name, dims, inner)
        model.metadata_props[KEY] = json.dumps(asdict(own))
        image = _exchange(graph, image, inner, last, of_bytes)
        notes.append(
            f"The input '{own.name}' is {'uint8' if of_bytes else 'float'}"
            f" [{', '.join(map(str, dims))}]: pictures are fed so, and quantized.onnx takes the"
            " same"
        )
    top = 255 if of_bytes else normalised_from(image)
    if top is not None:
        model.metadata_props[PIXELS_KEY] = str(top)
        how = "as they are, 0 to 255 (--preprocess none)" if top == 255 else "as 0 to 1"
        what = "The input is bytes" if of_bytes else "The graph normalises its input itself"
        notes.append(f"{what}: by default pictures are fed {how}")
    return notes


def put_back(model: ir.Model) -> None:
    """Give a model in our form the input of its file again, in place."""
    own = signature(model)
    model.metadata_props.pop(PIXELS_KEY, None)
    model.metadata_props.pop(KEY, None)
    if own is None:
        return
    graph = model.graph
    image = next(v for v in graph.inputs if v.name == own.inner)
    dtype = ir.DataType[own.dtype]
    shape = image.shape
    if shape is not None and own.channels_last:
        shape = ir.Shape([shape[i] for i in TO_LAST])
    new = ir.Value(name=own.name, type=ir.TensorType(dtype), shape=shape)
    graph.inputs[graph.inputs.index(image)] = new
    nodes: list[ir.Node] = []
    current = new
    if dtype != ir.DataType.FLOAT:
        attributes = {"to": int(ir.DataType.FLOAT)}
        nodes.append(ir.node("Cast", [current], attributes, name=f"{own.name}_float"))
        current = nodes[-1].outputs[0]
        current.name, current.shape = unique_name(graph, f"{own.name}_float"), new.shape
        current.type = ir.TensorType(ir.DataType.FLOAT)
    if own.channels_last:
        perm = {"perm": list(TO_FIRST)}
        nodes.append(ir.node("Transpose", [current], perm, name=f"{own.name}_channels"))
        current = nodes[-1].outputs[0]
    image.replace_all_uses_with(current)
    current.name, current.shape, current.type = image.name, image.shape, image.type
    graph.insert_before(next(iter(graph)), nodes)


def _exchange(graph: ir.Graph, image: ir.Value, name: str, last: bool, of_bytes: bool) -> ir.Value:
    """Put an input in our form in the place of the file's."""
    assert image.shape is not None
    order = TO_FIRST if last else range(4)
    new = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([image.shape[i] for i in order]),
    )
    graph.inputs[graph.inputs.index(image)] = new
    current = new
    if last:
        node = ir.node("Transpose", [new], {"perm": list(TO_LAST)}, name=f"{new.name}_last")
        current = node.outputs[0]
        current.name = unique_name(graph, f"{new.name}_last")
        current.type, current.shape = new.type, image.shape
        graph.insert_before(next(iter(graph)), node)
    image.replace_all_uses_with(current)
    if of_bytes:
        _as_floats(graph, current)
    return new


def _as_floats(graph: ir.Graph, value: ir.Value) -> None:
    """Floats of whole numbers where bytes were: ops that move them do as before, a Cast to float
    has nothing left to do, and any other op gets its bytes by a Cast in front."""
    for node, index in [(use.node, use.idx) for use in value.uses()]:
        if node.op_type in MOVES and index == 0:
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            _as_floats(graph, node.outputs[0])
        elif node.op_type == "Cast" and node.attributes.get_int("to", 0) in FLOATS:
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)
        elif node.op_type not in ("Shape", "Size"):
            to = {"to": int(ir.DataType.UINT8)}
            cast = ir.node("Cast", [value], to, name=f"{value.name}_bytes")
            cast.outputs[0].name = unique_name(graph, f"{value.name}_bytes")
            cast.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            cast.outputs[0].shape = value.shape
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
