"""Images as Python holds them: PIL pictures, and what loaders, readers and generators yield."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.preprocess import FloatArray, Preprocess, from_image, open_picture
from ptq_onnx.images.source import IndexedSource, Item, evenly

TAKEN = (
    "a folder, a .npy or .npz file, a list of paths or of PIL images, an array [N, C, H, W], or an"
    " iterable of arrays, of (images, labels) or of dicts (DataLoader, CalibrationDataReader,"
    " generator)"
)
KEYS = ("pixel_values", "image", "images", "input", "x")
"""Names under which loaders of other tools yield the images."""


def is_picture(item: object) -> bool:
    """True for a PIL image."""
    return isinstance(item, Image.Image)


class PictureSource(IndexedSource):
    """PIL images that are held in memory already."""

    def __init__(
        self,
        images: Sequence[Any],
        preprocess: Preprocess,
        limit: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.images, self.preprocess, self.skipped = images, preprocess, []
        self.transform, self.pictures = transform, transform is None
        self._count, self._indices = len(images), evenly(len(images), limit)

    def _read(self, slot: int) -> Item:
        if self.transform is None:
            return str(slot), from_image(self.images[slot], self.preprocess)
        where = f"The function of preprocess, on image {slot}"
        return str(slot), _input(self.transform(self.images[slot]), where, self.preprocess)


def transformed_file(
    path: Path, transform: Callable[[Any], Any], preprocess: Preprocess
) -> FloatArray:
    """What a function of the user's makes of a file's picture, in RGB or gray."""
    picture = open_picture(path, preprocess.channels)
    return _input(transform(picture), f"The function of preprocess, on '{path}'", preprocess)


class Items:
    """The arrays in what an iterable yields; labels that came with them are kept.

    A tuple or list of two is (images, labels); of a dict it is the entry of the model's input, or
    the only one.
    """

    def __init__(
        self, source: Any, name: str | None = None, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self._source, self._name, self._transform = source, name, transform
        self._labels: list[NDArray[np.int64]] | None = []

    def __iter__(self) -> Iterator[Any]:
        source = self._source
        reader = getattr(source, "get_next", None)
        items: Iterable[Any] = source if reader is None else iter(reader, None)
        for item in items:
            images, labels = self._apart(item)
            if self._transform is not None:
                images = _made(self._transform(images))
            array = _plain(images)
            self._keep(labels, len(array) if _dimensions(array) == 4 else 1)
            yield array

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """Those of the first ``count`` images, if every item came with labels."""
        found = np.concatenate(self._labels) if self._labels else np.zeros(0, np.int64)
        return found[:count] if len(found) >= count > 0 else None

    def _apart(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            return self._entry(item), item.get("labels", item.get("label"))
        if isinstance(item, tuple | list) and len(item) == 2:
            images, labels = map(_dimensions, item)
            if images >= 3 > labels:
                return item[0], item[1]
        if isinstance(item, tuple | list) and len(item) == 1:
            return item[0], None
        return item, None

    def _entry(self, item: Mapping[str, Any]) -> Any:
        if self._name in item:
            return item[str(self._name)]
        key = next((key for key in KEYS if key in item), None)
        if key is None and len(item) == 1:
            (key,) = item
        if key is None:
            raise ImageError(
                f"The iterable yields dicts with {', '.join(map(str, item))}: expected the model's"
                f" input '{self._name}' among them."
            )
        return item[key]

    def _keep(self, labels: Any, count: int) -> None:
        """Labels, as long as there is one for each image."""
        if self._labels is None:
            return
        found = np.atleast_1d(_plain(labels)) if labels is not None else None
        whole = found is not None and found.dtype.kind in "iu" and found.shape == (count,)
        if not whole or found is None:
            self._labels = None
            return
        self._labels.append(found.astype(np.int64))


def _dimensions(value: Any) -> int:
    plain = _plain(value)
    return plain.ndim if isinstance(plain, np.ndarray) else 0


def _made(value: Any) -> Any:
    """What a function returned; a processor of transformers returns a dict."""
    return value.get("pixel_values", value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    """Without torch's graph and device; a PIL image as its pixels [H, W, C]."""
    if is_picture(value):
        mode = "L" if value.mode in ("1", "L") else "RGB"
        pixels = np.asarray(value.convert(mode))
        return pixels[..., None] if pixels.ndim == 2 else pixels
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.dtype.is_floating_point:
            value = value.float()  # numpy has no bfloat16
        return value.numpy()
    try:
        return value if isinstance(value, np.ndarray) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return value


def _input(value: Any, where: str, preprocess: Preprocess) -> FloatArray:
    """What a function returned, as one model input. Raises ConfigError."""
    array = _plain(_made(value))
    shape = np.shape(array)
    if shape == (1, *preprocess.shape):
        array, shape = array[0], shape[1:]
    if shape != preprocess.shape or not np.issubdtype(np.asarray(array).dtype, np.floating):
        kind = getattr(array, "dtype", type(value).__name__)
        raise ConfigError(  # no ImageError: the picture is not at fault
            f"{where}: expected floats {list(preprocess.shape)} back, got {kind}{list(shape)}."
        )
    pixels = np.asarray(array, np.float32)
    if not np.isfinite(pixels).all():
        raise ConfigError(f"{where}: gave NaN or infinity.")
    return pixels
