"""Images that are arrays already: in memory, in ``.npy`` and ``.npz`` files, from iterables."""

import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.image_source import IndexedSource, Item, evenly
from ptq_onnx.preprocess import FloatArray, Preprocess, from_pixels

Array = NDArray[Any]
_NPZ_KEYS = ("images", "input", "x", "arr_0")


class ArraySource(IndexedSource):
    """Images of one array: floats [N, C, H, W] that are model inputs, or uint8 [N, H, W, C] pixels.

    ``load`` gives the array; for one on disk it maps the file anew each time, so that pages read
    once do not stay. ``where`` names the array in errors.
    """

    def __init__(
        self,
        load: Callable[[], Array],
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

    def _read(self, slot: int) -> Item:
        image = self._load()[slot]
        return str(slot), _to_input(image, f"{self._where}, image {slot}", self.preprocess)


def from_array(array: Array, preprocess: Preprocess, limit: int | None = None) -> ArraySource:
    """The images of an array in memory, [N, …] or a single one. Raises ImageError."""
    whole = array[None] if array.ndim == 3 else array
    return ArraySource(lambda: whole, "The array", preprocess, limit)


def from_file(path: Path, preprocess: Preprocess, limit: int | None = None) -> ArraySource:
    """The images of a ``.npy`` or ``.npz`` file, read piece by piece. Raises ImageError."""
    where = f"Array file '{path}'"
    if path.suffix.lower() == ".npz":
        folder = Path(tempfile.mkdtemp(prefix="ptq_onnx-"))
        try:
            source = ArraySource(
                _mapped(_unzip(path, folder / "images.npy"), where), where, preprocess, limit
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
        return source
    return ArraySource(_mapped(path, where), where, preprocess, limit)


def from_iterable(
    arrays: Iterable[Any], preprocess: Preprocess, limit: int | None = None
) -> ArraySource:
    """The images that an iterable yields, [C, H, W] or [B, C, H, W], uint8 ones [..., H, W, C].

    They are written to a temporary file in one go, 4 bytes a value, so a generator will do and
    memory holds one item of it. Takes the first ``limit``: the end of a generator may be far away.
    Raises ImageError.
    """
    folder = Path(tempfile.mkdtemp(prefix="ptq_onnx-"))
    try:
        path = folder / "images.f32"
        count, pictures = _spool(arrays, path, preprocess, limit)
        shape = (count, *preprocess.shape)
        kept = replace(preprocess, channels_last=False)
        source = ArraySource(
            lambda: np.memmap(path, np.float32, "r", shape=shape), "The iterable", kept
        )
        source.pictures = pictures
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    return source


def _spool(
    arrays: Iterable[Any], path: Path, preprocess: Preprocess, limit: int | None
) -> tuple[int, bool]:
    """Write the images as raw float32 to ``path``; returns how many there were, and whether all
    were pixels."""
    evenly(1, limit)  # checks the limit
    count, pictures = 0, True
    with path.open("wb") as file:
        for item in arrays:
            array = _as_array(item, f"The iterable, image {count}")
            batch = array[None] if array.ndim == 3 else array
            where = f"The iterable, image {count}"
            _check(batch, where, preprocess)
            pictures &= batch.dtype == np.uint8
            for image in batch if limit is None else batch[: limit - count]:
                pixels = _to_input(image, f"The iterable, image {count}", preprocess)
                try:
                    file.write(pixels.tobytes())
                except OSError as error:
                    raise ImageError(
                        f"Images cannot be kept in '{path.parent}' ({error.strerror}): "
                        "set TMPDIR to a folder with more space."
                    ) from None
                count += 1
            if count == limit:
                break
    if not count:
        raise ImageError(
            "The iterable yields no images: expected arrays [C, H, W] or [B, C, H, W] "
            "(is it a generator that was used up before?)."
        )
    return count, pictures


def _check(array: Array, where: str, preprocess: Preprocess) -> None:
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
        raise ImageError(f"{where}: there are no images in it, its shape is {list(array.shape)}.")


def _is_pixels(array: Array, preprocess: Preprocess) -> bool:
    """Whether uint8 images are inputs of a model that takes bytes, channels first."""
    return preprocess.raw and array.shape[-3:] == preprocess.shape


def _to_input(image: Array, where: str, preprocess: Preprocess) -> FloatArray:
    """One image of a checked array as float32 [C, H, W]."""
    if image.dtype == np.uint8:
        if image.shape[-1] not in (1, 3, 4):
            return np.array(image, dtype=np.float32)
        return from_pixels(image, preprocess)
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


def _mapped(path: Path, where: str) -> Callable[[], Array]:
    """A function that maps the ``.npy`` file at ``path`` into memory."""

    def load() -> Array:
        try:
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise ImageError(f"{where} cannot be read: {reason}.") from None
        return array[None] if array.ndim == 3 else array

    return load


def _unzip(path: Path, target: Path) -> Path:
    """Unpack the array of images in an ``.npz`` file to ``target``, never held in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            key = next((key for key in _NPZ_KEYS if key in keys), None)
            if key is None and len(keys) != 1:
                raise ImageError(
                    f"Array file '{path}': expected one array, or one called "
                    f"{', '.join(_NPZ_KEYS)}; found {', '.join(keys) or 'none'}."
                )
            with archive.open(f"{key or keys[0]}.npy") as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ImageError(f"Array file '{path}' cannot be read: {error}.") from None
    return target
