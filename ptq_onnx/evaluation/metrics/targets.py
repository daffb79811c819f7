"""The truth of a metric: a folder of files, an array, lines of text, or COCO's annotations.

A folder holds a file for each image: the image's own name with another ending, in the same
sub-folder or not. An array (``.npy``, ``.npz``) has one entry for each image, in the order of the
images' names. Lines are ``name<TAB>value``, or ``name value``. Files are read when their image is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ptq_onnx.errors import ImageError, one_line
from ptq_onnx.files.text_file import read_text
from ptq_onnx.images.array_files import arrays_in
from ptq_onnx.images.preprocess import Preprocess, aligned
from ptq_onnx.images.preprocess import opened as opened_picture

ARRAYS, PICTURES = (".npy", ".npz"), (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
KEYS = ("targets", "labels", "y", "arr_0")
"""Names in an archive that are taken for the targets, in this order."""
LARGEST = 1 << 30
"""Bytes that an archive unpacks to."""
LARGEST_TEXT = 1 << 28
"""Bytes of a file of lines or of annotations."""


@dataclass(frozen=True)
class Targets:
    """One source of truth. ``names``: of all images, in their order. Raises ImageError."""

    path: Path
    names: Sequence[str]
    preprocess: Preprocess
    _place: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ImageError(f"--targets {self.path} does not exist: expected a folder or a file.")
        self._place.update({name: index for index, name in enumerate(self.names)})

    @property
    def name(self) -> str:
        """What reports call it: never its folder."""
        return self.path.name

    def array(self, image: str, *, pixels: bool = True) -> NDArray[Any]:
        """The array of an image; a picture of ``pixels`` is cut out as the model's input is."""
        if self.path.is_dir():
            return self._of_file(image, pixels)
        if self.path.suffix.lower() not in ARRAYS:
            raise ImageError(
                f"--targets {self.path}: expected a folder of pictures or arrays, one for each"
                " image, or an array (.npy, .npz) of them."
            )
        return np.asarray(self._whole[self._place[image]])

    def text(self, image: str) -> str:
        """The text behind an image's name."""
        found = self._lines.get(image, self._lines.get(PurePosixPath(image).name))
        if found is None:
            raise ImageError(f"--targets {self.path}: no line for '{image}'.")
        return found

    def label(self, image: str) -> int:
        """The class behind an image's name, or in the array."""
        if self.path.suffix.lower() in ARRAYS and not self.path.is_dir():
            return int(self._whole[self._place[image]])
        text = self._labels_text(image).strip()
        if not (text.isascii() and text.isdigit()):
            raise ImageError(
                f"--targets {self.path}: '{image}' needs a class from 0, got {text[:40]!r}."
            )
        return int(text)

    def _labels_text(self, image: str) -> str:
        """As labels files have it: the class is the last word."""
        name = next((n for n in (image, PurePosixPath(image).name) if n in self._labels), None)
        if name is None:
            raise ImageError(f"--targets {self.path}: no line for '{image}'.")
        return self._labels[name]

    @cached_property
    def _labels(self) -> dict[str, str]:
        lines = (line.strip().replace("\t", " ") for line in self._text().splitlines())
        parts = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name.rstrip(): label for name, _, label in parts}

    def anything(self, image: str) -> Any:
        """Whatever there is of an image: for functions of the user's."""
        if self.path.is_dir():
            return self._of_file(image, pixels=False)
        if self.path.suffix.lower() in ARRAYS:
            return np.asarray(self._whole[self._place[image]])
        if self.path.suffix.lower() == ".json":
            return self.boxes(image)
        return self.text(image)

    def boxes(self, image: str) -> list[Mapping[str, Any]]:
        """COCO's annotations of an image."""
        return self._coco[1].get(self._index(image), [])

    def size(self, image: str) -> tuple[int, int]:
        """Width and height of a picture, as COCO's annotations have them."""
        return self._sizes[self._index(image)]

    @property
    def images(self) -> list[str]:
        """The pictures that COCO's annotations name, sorted."""
        return sorted(self._coco[0])

    def _index(self, image: str) -> int:
        images = self._coco[0]
        index = images.get(image, images.get(PurePosixPath(image).name))
        if index is None:
            raise ImageError(f"--targets {self.path}: no image has the file_name '{image}'.")
        return index

    @property
    def categories(self) -> list[int]:
        """COCO's categories, in order."""
        return sorted(int(one["id"]) for one in self._json.get("categories", []))

    @cached_property
    def _whole(self) -> NDArray[Any]:
        arrays = arrays_in(self.path, f"--targets {self.path}", LARGEST)
        if not arrays:
            raise ImageError(f"--targets {self.path} holds no array.")
        key = next((k for k in KEYS if k in arrays), next(iter(arrays)))
        found = arrays[key]
        if found.ndim == 0 or len(found) != len(self.names):
            count = 0 if found.ndim == 0 else len(found)
            raise ImageError(
                f"--targets {self.path} holds {count} entries for {len(self.names)} images."
            )
        return found

    def _of_file(self, image: str, pixels: bool) -> NDArray[Any]:
        path = self._file(image)
        if path.suffix.lower() in ARRAYS:
            return next(iter(arrays_in(path, f"'{path}'", LARGEST).values()))
        with opened_picture(path) as picture:
            picture.load()
            return np.asarray(aligned(_plain(picture), self.preprocess) if pixels else picture)

    def _file(self, image: str) -> Path:
        base = PurePosixPath(image)
        for place in (base, PurePosixPath(base.name)):
            for suffix in (*PICTURES, *ARRAYS):
                path = self.path / place.with_suffix(suffix)
                if path.is_file():
                    return path
        raise ImageError(
            f"--targets {self.path}: no file for image '{image}' (looked for"
            f" {base.with_suffix('')} with {', '.join((*PICTURES, *ARRAYS))})."
        )

    @cached_property
    def _lines(self) -> dict[str, str]:
        return dict(self._read_lines())

    def _read_lines(self) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(self._text().splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            name, tab, value = line.partition("\t")
            if not tab:
                name, _, value = line.strip().partition(" ")
            if not name or not (value or tab):
                raise ImageError(
                    f"--targets {self.path}, line {number}: expected 'name<TAB>value', got"
                    f" {line.strip()[:60]!r}."
                )
            yield name, value

    def _text(self) -> str:
        try:
            return read_text(self.path, LARGEST_TEXT)
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"--targets {self.path} cannot be read: {one_line(error)}.") from error

    @cached_property
    def _json(self) -> Mapping[str, Any]:
        try:
            found: Any = json.loads(self._text())
            if not isinstance(found, dict):
                raise ValueError("it holds no object")
            return found
        except (ValueError, RecursionError) as error:
            raise ImageError(
                f"--targets {self.path} is not JSON of COCO's form: {one_line(error)[:200]}."
            ) from error

    @cached_property
    def _sizes(self) -> dict[int, tuple[int, int]]:
        return {int(i["id"]): (int(i["width"]), int(i["height"])) for i in self._json["images"]}

    @cached_property
    def _coco(self) -> tuple[dict[str, int], dict[int, list[Mapping[str, Any]]]]:
        by_image: dict[int, list[Mapping[str, Any]]] = {}
        try:
            images = {str(one["file_name"]): int(one["id"]) for one in self._json["images"]}
            for one in self._json["annotations"]:
                box = [float(side) for side in one["bbox"]]
                kept = {"bbox": box, "category_id": int(one["category_id"])}
                kept["iscrowd"] = int(one.get("iscrowd", 0))
                by_image.setdefault(int(one["image_id"]), []).append(kept)
            _ = self._sizes
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(
                f"--targets {self.path} is not JSON of COCO's form, images and annotations:"
                f" {one_line(error)[:200]}."
            ) from error
        return images, by_image


def _plain(picture: Image.Image) -> Image.Image:
    """Class numbers and depths as they are: a palette's indices, not its colours."""
    if picture.mode == "1":
        return picture.convert("L")
    if picture.mode == "P":
        return Image.fromarray(np.asarray(picture))
    if picture.mode.startswith("I"):  # 16 bits: what Pillow can resize
        return Image.fromarray(np.asarray(picture).astype(np.int32))
    return picture
