"""Folders, array files and iterables of images as streams of model input batches.

:func:`open_images` gives an :class:`ImageSource`. Whatever it reads from, memory holds a batch or
two, never the set: files are decoded when their turn comes, arrays on disk are mapped image by
image, and what a generator yields is kept in a temporary file.
"""

import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from ptq_onnx.errors import ImageError
from ptq_onnx.images import arrays as image_arrays
from ptq_onnx.images import items as image_items
from ptq_onnx.images.preprocess import FORMATS, METADATA_KEY, Preprocess, load_image
from ptq_onnx.images.source import ImageSource, Item, at_random, evenly

__all__ = ["METADATA_KEY", "FolderSource", "ImageSource", "Preprocess", "load_image", "open_images"]

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
) | {f".{name.lower()}" for name in FORMATS if name in ("WEBP", "AVIF")}


class Reader(Protocol):
    """onnxruntime's CalibrationDataReader: inputs by name, None at the end."""

    def get_next(self) -> Any:
        """The next batch as a dict by input name; None behind the last."""


Transform = Callable[[Any], Any]
"""From a picture (PIL), or from what an iterable yields, to a model input [C, H, W]."""
Images = str | os.PathLike[str] | ImageSource | Iterable[Any] | Reader
"""What :func:`open_images` takes."""

_log = logging.getLogger(__name__)


def open_images(
    source: Images,
    preprocess: Preprocess,
    limit: int | None = None,
    *,
    transform: Transform | None = None,
    name: str | None = None,
) -> ImageSource:
    """Open images, wherever they are: a folder, a ``.npy`` or ``.npz`` file, an array, a list of
    paths or of PIL images, or an iterable (a generator, a DataLoader, a CalibrationDataReader).

    A folder is read with its sub-folders. Arrays are floats [N, C, H, W] (model inputs) or uint8
    [N, H, W, C] (pixels, to be preprocessed); an iterable yields [C, H, W] or [B, C, H, W], or
    tuples whose first entry that is, or dicts that have it as the model's input ``name``.
    ``transform``: makes a model input of a picture, or of what is yielded. ``limit`` spreads its
    choice evenly, but takes the first images of an iterable. Raises ImageError, ConfigError.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return FolderSource(path, preprocess, limit, transform=transform)
        if not path.exists():
            raise ImageError(f"'{path}' does not exist: expected a folder of images or an array.")
        if path.suffix.lower() in (".npy", ".npz"):
            if transform is not None:
                raise ImageError(
                    f"'{path}' holds arrays, and preprocess is a function of pictures: give"
                    " pictures, or leave the function out."
                )
            return image_arrays.from_file(path, preprocess, limit)
        if path.suffix.lower() in EXTENSIONS:
            return FolderSource(path.parent, preprocess, limit, [path.name], transform)
        what = "a model, not images: " if path.suffix == ".onnx" else ""
        raise ImageError(f"'{path}' is {what}neither a folder of images nor a .npy or .npz file.")
    if isinstance(source, list | tuple) and source:
        if all(isinstance(item, str | os.PathLike) for item in source):
            files = [os.path.abspath(item) for item in source]
            return FolderSource(Path(os.sep), preprocess, limit, files, transform)
        if any(isinstance(item, str | os.PathLike) for item in source):
            raise ImageError("The list holds paths and other things: give paths alone.")
        if all(image_items.is_picture(item) for item in source):
            return image_items.PictureSource(source, preprocess, limit, transform)
    if transform is None and hasattr(source, "__array__"):
        return image_arrays.from_array(np.asarray(source), preprocess, limit)
    if isinstance(source, Iterable) or hasattr(source, "get_next"):
        items = image_items.Items(source, name, transform)
        opened = image_arrays.from_iterable(items, preprocess, limit)
        opened.labels = items.labels(len(opened))
        return opened
    raise ImageError(f"Images come from {image_items.TAKEN}, got {type(source).__name__}.")


class FolderSource(ImageSource):
    """The image files below ``root``, sorted by relative path, or those that are listed.

    An unreadable file gives its place to one that ``limit`` left out, if there is any.
    """

    def __init__(
        self,
        root: Path,
        preprocess: Preprocess,
        limit: int | None = None,
        files: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.root, self.preprocess, self.skipped = root, preprocess, []
        self.transform, self.pictures = transform, transform is None
        self.listed = files is not None
        self.files = _image_files(root) if files is None else list(files)
        if not self.files:
            raise ImageError(
                f"Folder '{root}' holds no images (looked for {', '.join(sorted(EXTENSIONS))}, "
                "sub-folders included)."
            )
        self._chosen: list[int | None] = list(evenly(len(self.files), limit))
        self._used = {index for index in self._chosen if index is not None}
        self._lock = threading.Lock()

    def reopened(self, limit: int | None = None, preprocess: Preprocess | None = None) -> Self:
        """All of its files once more, of which ``limit`` chooses anew."""
        files = self.files if self.listed else None
        return type(self)(self.root, preprocess or self.preprocess, limit, files, self.transform)

    def drawn(self, limit: int, seed: int) -> Self:
        """``limit`` of its files, drawn at random, in their order."""
        found, chosen = self.reopened(), at_random(len(self.files), limit, seed)
        found._chosen, found._used = list(chosen), set(chosen)
        return found

    @property
    def names(self) -> list[str]:
        """The chosen files, relative to the folder."""
        return [self.files[index] for index in self._chosen if index is not None]

    def others(self, limit: int) -> "FolderSource | None":
        """Up to ``limit`` images of the folder that this source does not use; None if none."""
        left = [index for index in range(len(self.files)) if index not in self._used]
        if not left:
            return None
        rest = self.reopened()
        rest._chosen = [left[i] for i in evenly(len(left), limit)]
        rest._used = set(range(len(self.files)))
        return rest

    def part(self, first: int, last: int) -> Self:
        """Some of the chosen files, in their order; none takes the place of one that cannot be
        read but what ``limit`` left out."""
        found = self.reopened()
        found._chosen, found._used = self._chosen[first:last], set(self._used)
        return found

    def _slots(self) -> Sequence[int]:
        return [slot for slot, index in enumerate(self._chosen) if index is not None]

    def _read(self, slot: int) -> Item:
        index = self._chosen[slot]
        if index is None:
            raise ImageError(f"Folder '{self.root}': place {slot} is empty.")
        name = self.files[index]
        if self.transform is not None:
            return name, image_items.transformed_file(
                self.root / name, self.transform, self.preprocess
            )
        return name, load_image(self.root / name, self.preprocess)

    def _retry(self, slot: int, error: ImageError) -> Item | None:
        with self._lock:  # two passes at a time may meet the same file
            while self._chosen[slot] is not None:
                try:
                    return self._read(slot)
                except ImageError as again:
                    self._replace(slot, again)
            if not self.names:
                raise ImageError(
                    f"None of the {len(self.files)} images in '{self.root}' can be read; the "
                    f"first was '{self.skipped[0]}'."
                ) from error
            return None

    def _replace(self, slot: int, error: ImageError) -> None:
        """Give the place of an unreadable file to the next unused one."""
        index = self._chosen[slot]
        assert index is not None
        _log.warning("skipped: %s", error)
        self.skipped.append(self.files[index])
        count = len(self.files)
        others = ((index + step) % count for step in range(1, count))
        spare = next((other for other in others if other not in self._used), None)
        if spare is not None:
            self._used.add(spare)
        self._chosen[slot] = spare


def _image_files(root: Path) -> list[str]:
    """Relative paths of the image files below ``root``; links to folders are followed once.

    A pipe, a device or a socket is no image, whatever its name.
    """
    files: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in names
            if Path(name).suffix.lower() in EXTENSIONS
            and not name.startswith(".")
            and not _is_special(os.path.join(folder, name))
        ]
    return sorted(files)


def _is_special(path: str) -> bool:
    """True for what exists and is no regular file; a dangling link is a file that is missing."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
