"""What a model takes besides its images, from ``--input`` and from arrays by the inputs' names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.array_files import arrays_in
from ptq_onnx.images.opening import Images, open_images
from ptq_onnx.images.packed_source import PackedSource
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.source import ImageSource
from ptq_onnx.images.synthetic import DRAWN, PSAQ, SYNTHETIC
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.validation import is_image
from ptq_onnx.runtime.packed import EXACT

Arrays = dict[str, NDArray[Any]]
LARGEST = 1 << 30
"""Bytes of the inputs besides images, which are held in memory."""


@dataclass(frozen=True)
class Taken:
    """The inputs of a model's file, in order; ``image``: the one that takes pictures, if any."""

    inputs: tuple[ir.Value, ...]
    image: ir.Value | None

    @property
    def plain(self) -> bool:
        """One input, which takes pictures."""
        return len(self.inputs) == 1 and self.image is not None

    @property
    def others(self) -> list[ir.Value]:
        """Those that take no pictures."""
        return [value for value in self.inputs if value is not self.image]

    @property
    def described(self) -> str:
        """For errors."""
        return ", ".join(f"'{v.name}' {_shape(v)}" for v in self.inputs)


def taken_by(model: str | Path) -> Taken:
    """What a file takes. Raises ModelError."""
    free = graphs.inputs(model)
    return Taken(free, next((v for v in free if is_image(v)), None))


def open_source(
    model: str | Path,
    images: Images | None,
    preprocess: Preprocess,
    given: Sequence[str] = (),
    limit: int | None = None,
    **how: Any,
) -> ImageSource:
    """The images, with whatever else the model takes. ``given``: of ``--input``; ``how``: of
    :func:`open_images`. Raises PtqError."""
    taken = taken_by(model)
    if isinstance(images, ImageSource):
        return images
    if taken.plain:
        if given:
            raise ConfigError(
                f"--input {given[0][:60]}: model {model} has one input, which takes the images."
            )
        assert images is not None
        return open_images(images, preprocess, limit, **how)
    if isinstance(images, str) and images == PSAQ:
        raise ConfigError(
            f"--calib {PSAQ}: images are made from models with one input, which takes pictures;"
            f" model {model} has {taken.described}. Use --calib {SYNTHETIC}, or images."
        )
    arrays = read_arrays(model, taken, images, given)
    source = None
    if taken.image is not None and str(taken.image.name) not in arrays:
        if images is None:
            raise ConfigError(f"Model {model} takes images as '{taken.image.name}': name them.")
        source = _images(images, preprocess, limit, how)
    missing = [v for v in taken.others if str(v.name) not in arrays]
    if missing:
        count = f"{len(taken.inputs)} inputs" if len(taken.inputs) > 1 else "an input"
        raise ConfigError(
            f"Model {model} has {count}: {taken.described}; nothing is given for"
            f" '{missing[0].name}': --input {missing[0].name}=FILE.npz or a number, or an .npz with"
            " arrays of the inputs' names in place of the images."
        )
    ordered = {str(v.name): arrays.get(str(v.name)) for v in taken.inputs}
    return PackedSource(ordered, source, limit)


def _images(images: Images, preprocess: Preprocess, limit: int | None, how: Any) -> ImageSource:
    if isinstance(images, str) and images in DRAWN:
        return DRAWN[images](preprocess, limit or 1)
    return open_images(images, preprocess, None, **how)


def item_shapes(
    model: str | Path, images: Images | None, given: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The sizes of each input that is given as an array, without the batch."""
    taken = taken_by(model)
    if taken.plain:
        return {}
    arrays = read_arrays(model, taken, images, given)
    return {name: array.shape[1:] for name, array in arrays.items()}


def read_arrays(
    model: str | Path, taken: Taken, images: Images | None, given: Sequence[str]
) -> Arrays:
    """The arrays [N, …] by input: of the ``.npz`` that stands for the images, else of ``--input``.
    Raises ConfigError, ImageError."""
    by_name = {str(v.name): v for v in taken.inputs}
    found: Arrays = {}
    for text in given:
        name, equals, value = text.partition("=")
        if name not in by_name or not equals or not value:
            raise ConfigError(
                f"--input {text[:60]}: expected NAME=FILE or NAME=NUMBER, with an input of the"
                f" model: {', '.join(by_name)}."
            )
        found[name] = _fitting(_value(name, value, by_name[name]), by_name[name])
    for name, array in _of_archive(images, by_name).items():
        found[name] = _fitting(array, by_name[name])
    if sum(a.nbytes for a in found.values()) > LARGEST:
        raise ImageError(
            f"The inputs of model {model} besides pictures are more than {LARGEST >> 20} MB, which"
            " are held in memory: give fewer entries."
        )
    return found


def _of_archive(images: Images | None, by_name: Mapping[str, ir.Value]) -> Arrays:
    """Arrays of the inputs' names; one array is the only input's, whatever it is called."""
    if not isinstance(images, str | Path) or Path(images).suffix.lower() not in (".npz", ".npy"):
        return {}
    arrays = _loaded(Path(images))
    if len(by_name) == 1 and len(arrays) == 1:
        return dict(zip(by_name, arrays.values(), strict=True))
    return {name: array for name, array in arrays.items() if name in by_name}


def _loaded(path: Path) -> Arrays:
    return arrays_in(path, f"'{path}'", LARGEST)


def _value(name: str, text: str, value: ir.Value) -> NDArray[Any]:
    """A file's array, or a number everywhere."""
    if Path(text).suffix.lower() in (".npz", ".npy"):
        arrays = _loaded(Path(text))
        key = name if name in arrays else next(iter(arrays), None)
        if key is None or (key != name and len(arrays) > 1):
            raise ImageError(f"--input {name}={text}: it holds no array '{name}'.")
        return arrays[key]
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"--input {name}={text[:60]}: expected a .npz or .npy file, or a number."
        ) from None
    sizes = list(value.shape or ())[1:]
    if not all(isinstance(d, int) for d in sizes):
        raise ConfigError(
            f"--input {name}={text}: the input is {_shape(value)}, so that a number does not say"
            " how large it is: give an array of one entry, .npy or .npz."
        )
    return np.full((1, *(int(d) for d in sizes if isinstance(d, int))), number, np.float32)


def _fitting(array: NDArray[Any], value: ir.Value) -> NDArray[Any]:
    """The array, which fits the input. Raises ImageError."""
    sizes = list(value.shape or ())
    fits = array.ndim == len(sizes) and array.ndim > 0 and len(array) > 0
    fits = fits and all(
        not isinstance(d, int) or d == s for d, s in zip(sizes[1:], array.shape[1:], strict=False)
    )
    if not fits or array.dtype.kind not in "fiub":
        raise ImageError(
            f"Input '{value.name}' is {_shape(value)}: expected an array [N, …] of that, got"
            f" {array.dtype}{list(array.shape)}."
        )
    if math.prod(array.shape) and array.dtype.kind in "iu" and int(np.abs(array).max()) > EXACT:
        raise ImageError(f"Input '{value.name}': numbers beyond {EXACT} are not exact here.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError(f"Input '{value.name}': the array holds NaN or infinity.")
    return array


def _shape(value: ir.Value) -> str:
    dims = [str(d if isinstance(d, int) else d.value or "?") for d in value.shape or ()]
    kind = "untyped" if value.dtype is None else value.dtype.name.lower()
    return f"{kind} [{', '.join(dims)}]"


def note_on(config: QuantizeConfig, source: ImageSource) -> list[str]:
    """What must be said of inputs besides images."""
    if not isinstance(source, PackedSource):
        return []
    constant = [text for text in config.input if not Path(text.partition("=")[2]).suffix]
    held = f" ({', '.join(constant)} for every image)" if constant else ""
    return [
        f"The model takes {len(source.inputs)} inputs: {', '.join(source.inputs)}{held}. Their"
        " dynamic sizes but for the batch are fixed to those of the arrays given."
    ]
