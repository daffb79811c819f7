"""Images that are arrays already: in memory, in ``.npy`` and ``.npz`` files, from iterables."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ptq_onnx.errors import ImageError
from ptq_onnx.images.array_files import (
    KEPT,
    Array,
    Header,
    Kept,
    Packed,
    is_archive,
    mapped,
    spooled,
)
from ptq_onnx.images.preprocess import FloatArray, Preprocess, from_pixels
from ptq_onnx.images.source import IndexedSource, Item, evenly

Images = Array | Header | Kept
"""A whole array, or what is known of one that is not held."""
MOST_IMAGES = 1 << 22
MOST_PIXELS = 1 << 26
"""Images of an array, and pixels of one of them."""


class ArraySource(IndexedSource):
    """Images of one array: floats [N, C, H, W] that are model inputs, or uint8 [N, H, W, C] pixels.

    ``load`` gives the array; for one on disk it maps the file anew each time, so that pages read
    once do not stay. ``where`` names the array in errors.
    """

    def __init__(
        self,
        load: Callable[[], Images],
        where: str,
        preprocess: Preprocess,
        limit: int | None = None,
    ) -> None:
        self.preprocess, self.skipped = preprocess, []
        self._load, self._where = load, where
        array = load()
        _check(array, where, preprocess)
        self._count, self._indices = len(array), evenly(len(array), limit)
        self.pictures = array.dtype == np.uint8

    def __len__(self) -> int:
        return len(self._indices)

    def part(self, first: int, last: int) -> Self | None:
        """Some of the chosen images, in their order."""
        return self._with(self._indices[first:last])

    def _read(self, slot: int) -> Item:
        images = self._load()
        assert not isinstance(images, Header)
        return self._item(slot, images[slot])

    def _item(self, slot: int, image: Array) -> Item:
        return str(slot), _to_input(image, f"{self._where}, image {slot}", self.preprocess)


class StreamedSource(ArraySource):
    """More images of an archive than are kept: every pass unpacks them, one at a time."""

    def __init__(self, packed: Packed, preprocess: Preprocess, limit: int | None) -> None:
        super().__init__(lambda: packed.header, packed.where, preprocess, limit)
        self._packed = packed

    def part(self, first: int, last: int) -> None:
        """An archive is unpacked from its beginning."""

    def _prefetched(self, ahead: int) -> Iterator[Item]:
        for slot, image in zip(self._indices, self._packed.images(self._indices), strict=True):
            yield self._item(slot, image)


class KeptSource(ArraySource):
    """The images of an archive that are used, kept unpacked."""

    def __init__(self, packed: Packed, preprocess: Preprocess, limit: int | None) -> None:
        super().__init__(lambda: packed.header, packed.where, preprocess, limit)
        self._packed, kept = packed, Kept(packed, self._indices)
        self._load = lambda: kept

    def part(self, first: int, last: int) -> None:
        """As above."""

    def _with(self, indices: list[int]) -> Self:
        """Others have to be unpacked first."""
        other, kept = super()._with(indices), Kept(self._packed, indices)
        other._load = lambda: kept
        return other


def from_array(array: Array, preprocess: Preprocess, limit: int | None = None) -> ArraySource:
    """The images of an array in memory, [N, …] or a single one. Raises ImageError."""
    whole = array[None] if array.ndim == 3 else array
    return ArraySource(lambda: whole, "The array", preprocess, limit)


def from_file(path: Path, preprocess: Preprocess, limit: int | None = None) -> ArraySource:
    """The images of a ``.npy`` or ``.npz`` file, read piece by piece. Raises ImageError."""
    where = f"Array file '{path}'"
    if not is_archive(path, where):
        return ArraySource(mapped(path, where), where, preprocess, limit)
    packed = Packed(path, where)
    _check(packed.header, where, preprocess)
    if _large(packed, len(evenly(len(packed.header), limit))):
        return StreamedSource(packed, preprocess, limit)
    return KeptSource(packed, preprocess, limit)


def _large(packed: Packed, count: int) -> bool:
    """Whether so many of an archive's images are more than are kept."""
    return count * packed.header.nbytes > KEPT * len(packed.header)


def from_iterable(
    arrays: Iterable[Any], preprocess: Preprocess, limit: int | None = None
) -> ArraySource:
    """The images that an iterable yields, [C, H, W] or [B, C, H, W], uint8 ones [..., H, W, C].

    They are written to a temporary file in one go, 4 bytes a value, so a generator will do and
    memory holds one item of it. Takes the first ``limit``: the end of a generator may be far away.
    Raises ImageError.
    """
    evenly(1, limit)  # checks the limit
    spool = Spool(arrays, preprocess, limit)
    file = spooled(spool)
    if not spool.count:
        raise ImageError(
            "The iterable yields no images: expected arrays [C, H, W] or [B, C, H, W] "
            "(is it a generator that was used up before?)."
        )
    source = ArraySource(
        lambda: np.memmap(file, np.float32, "r", shape=(spool.count, *preprocess.shape)),
        "The iterable",
        replace(preprocess, channels_last=False),
    )
    source.pictures = spool.pictures
    return source


class Spool:
    """Model inputs of what an iterable yields, one at a time, at most ``limit``; after them
    ``count`` tells how many there were, and ``pictures`` whether all were pixels."""

    def __init__(self, arrays: Iterable[Any], preprocess: Preprocess, limit: int | None) -> None:
        self.count, self.pictures = 0, True
        self._arrays, self._preprocess, self._limit = arrays, preprocess, limit

    def __iter__(self) -> Iterator[FloatArray]:
        for item in self._arrays:
            where = f"The iterable, image {self.count}"
            array = _as_array(item, where)
            batch = array[None] if array.ndim == 3 else array
            _check(batch, where, self._preprocess)
            self.pictures &= batch.dtype == np.uint8
            for image in batch:
                if self.count == self._limit:
                    return
                where = f"The iterable, image {self.count}"
                self.count += 1
                yield _to_input(image, where, self._preprocess)
            if self.count == self._limit:
                return


def _check(array: Images, where: str, preprocess: Preprocess) -> None:
    """Refuse an array whose images cannot become model inputs of ``preprocess.shape``."""
    found = f"{array.dtype}{list(array.shape)}"
    if array.dtype == np.uint8:
        fits = array.ndim == 4 and (array.shape[-1] in (1, 3, 4) or _is_pixels(array, preprocess))
        if not fits:
            raise ImageError(f"{where}: uint8 pixels must be [N, H, W, 3 (or 1, 4)], got {found}.")
    elif not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{where}: expected floats or uint8 pixels, got {found}.")
    elif array.ndim != 4 or array.shape[1:] != preprocess.given:
        wanted = ", ".join(map(str, preprocess.given))
        raise ImageError(
            f"{where}: expected preprocessed images [N, {wanted}], got {found}: resize them, or "
            "give raw pixels as uint8 [N, H, W, C]."
        )
    if 0 in array.shape:
        raise ImageError(f"{where}: it holds no images; its shape is {list(array.shape)}.")
    if len(array) > MOST_IMAGES or array.shape[1] * array.shape[2] > MOST_PIXELS:
        raise ImageError(
            f"{where}: {found} is more than {MOST_IMAGES} images of {MOST_PIXELS} pixels each."
        )


def _is_pixels(array: Images, preprocess: Preprocess) -> bool:
    """Whether uint8 images are inputs of a model that takes bytes, channels first."""
    return preprocess.raw and array.shape[-3:] == preprocess.shape


def _to_input(image: Array, where: str, preprocess: Preprocess) -> FloatArray:
    """One image of a checked array as float32 [C, H, W]."""
    if image.dtype == np.uint8:
        if image.shape[-1] not in (1, 3, 4):
            return np.array(image, dtype=np.float32)
        try:
            return from_pixels(image, preprocess)
        except (ValueError, MemoryError) as error:
            raise ImageError(f"{where}: {error}.") from None
    if preprocess.channels_last:
        image = image.transpose(2, 0, 1)
    with np.errstate(over="ignore"):
        pixels = np.array(image, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise ImageError(f"{where}: holds NaN or infinity; repair or remove it.")
    return pixels


def _as_array(item: Any, where: str) -> Array:
    try:
        array = np.asarray(item)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ImageError(
            f"{where}: expected an array, got {type(item).__name__} ({error})."
        ) from None
    if array.dtype == object:
        raise ImageError(f"{where}: expected an array, got {type(item).__name__}.")
    return array
