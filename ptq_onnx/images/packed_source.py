"""Images with what a model takes besides them, or without any image: every input by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.source import ImageSource, IndexedSource, Item, evenly
from ptq_onnx.runtime.packed import pack

NO_PICTURE = Preprocess((0.0,), (1.0,), (1, 1), crop_pct=1.0, channels=1)
"""Stands for the preprocessing of what is no picture."""


class PackedSource(IndexedSource):
    """The inputs of a model, packed (``runtime/packed.py``), entry by entry.

    ``arrays``: [N, …] by input, in the order of the model's; None in the place of the images, which
    ``images`` gives: entry i belongs to its i-th image. An array with one entry serves all.
    Raises ImageError.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any] | None],
        images: ImageSource | None,
        limit: int | None = None,
    ) -> None:
        self._arrays, self._images = dict(arrays), images
        self.preprocess = NO_PICTURE if images is None else images.preprocess
        self.pictures = images is not None and images.pictures
        self.skipped = []
        counts = {name: len(a) for name, a in self._arrays.items() if a is not None and len(a) != 1}
        self._all = None if images is None else list(images.names)
        self._places = None if images is None else list(images._slots())
        count = max(counts.values(), default=1) if self._all is None else len(self._all)
        for name, found in counts.items():
            if found != count:
                what = "images" if self._all is not None else "entries of the other inputs"
                raise ImageError(
                    f"--input {name}: {found} entries for {count} {what}: give one for each, or"
                    " one for all."
                )
        self._count, self._indices = count, evenly(count, limit)

    @property
    def pictures_of(self) -> ImageSource | None:
        """Where the images are from; None without any."""
        return self._images

    @property
    def inputs(self) -> list[str]:
        """The model's inputs, in order."""
        return list(self._arrays)

    @property
    def names(self) -> list[str]:
        """The images' names, or the places in the arrays."""
        if self._all is None:
            return super().names
        return [self._all[index] for index in self._indices]

    def _slots(self) -> Sequence[int]:
        return list(self._indices)

    def _read(self, slot: int) -> Item:
        values = []
        for array in self._arrays.values():
            if array is None:
                assert self._images is not None
                assert self._places is not None
                values.append(self._images._read(self._places[slot])[1])
            else:
                values.append(np.asarray(array[slot if len(array) > 1 else 0]))
        return (str(slot) if self._all is None else self._all[slot]), pack(values)

    def _retry(self, slot: int, error: ImageError) -> Item | None:
        self.skipped.append(str(error))
        self._indices = [index for index in self._indices if index != slot]
        if not self._indices:
            raise error
        return None
