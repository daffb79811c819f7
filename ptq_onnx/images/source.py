"""What every source of images can do: tell names, and stream batches again and again."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.preprocess import FloatArray, Preprocess

NOISE = "noise"
"""What --calib calls a :class:`NoiseSource`."""
NOISE_SEED = 0
PIXEL_MEAN, PIXEL_DEVIATION = np.float32(127.5), np.float32(58)
"""Of noise for models that take pixels; the deviation is that of ImageNet's."""
THREADS = 2  # Pillow releases the GIL while it decodes; two keep a CPU session fed

Item = tuple[str, FloatArray]


class ImageSource(ABC):
    """Images in a fixed order, readable as often as needed, a batch or two in memory at a time.

    ``len()`` and ``names`` tell the images in the order of :meth:`batches`; ``skipped`` grows with
    the unreadable files that a pass meets. After one full pass all three stand still.
    """

    preprocess: Preprocess
    skipped: list[str]
    pictures = False
    """Whether the images are pictures of 8 bits, normalised as ``preprocess`` says."""
    labels: NDArray[np.int64] | None = None
    """Class of each image, where the images came with it."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """One name per image: its path relative to the folder, or its index in the array."""

    @abstractmethod
    def _slots(self) -> Sequence[int]:
        """The places in the order, to be read one by one."""

    @abstractmethod
    def _read(self, slot: int) -> Item:
        """Name and pixels [C, H, W] of a place. Raises ImageError; runs in a worker thread."""

    @abstractmethod
    def drawn(self, limit: int, seed: int) -> ImageSource:
        """``limit`` of all images there are, drawn at random by ``seed``, in their order."""

    @abstractmethod
    def reopened(self, limit: int | None = None) -> ImageSource:
        """All images there are once more, of which ``limit`` chooses anew."""

    def others(self, limit: int) -> ImageSource | None:
        """Up to ``limit`` of the images that this source does not use; None if there are none."""
        return None

    def part(self, first: int, last: int) -> ImageSource | None:
        """The images from ``first`` up to ``last`` of the order alone; None where they can only be
        read from the beginning."""
        return None

    def _retry(self, slot: int, error: ImageError) -> Item | None:
        """What stands in for an unreadable image, if anything; runs in the caller's thread."""
        raise error

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, batch_size: int) -> Iterator[FloatArray]:
        """Yield float32 [B, C, H, W], B = ``batch_size`` but for the last. Raises ImageError."""
        for _, batch in self.named_batches(batch_size):
            yield batch

    def named_batches(self, batch_size: int) -> Iterator[tuple[list[str], FloatArray]]:
        """As :meth:`batches`, each with the names of its images."""
        if batch_size < 1:
            raise ConfigError(f"The batch size must be at least 1, got {batch_size}.")
        items: list[Item] = []
        for item in self._prefetched(ahead=max(batch_size, THREADS)):
            items.append(item)
            if len(items) == batch_size:
                yield _stack(items)
                items = []
        if items:
            yield _stack(items)

    def _prefetched(self, ahead: int) -> Iterator[Item]:
        """Images in order, up to ``ahead`` of them read before they are asked for."""
        slots = iter(tuple(self._slots()))
        waiting: deque[tuple[int, Future[Item]]] = deque()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="images") as pool:
            try:
                while True:
                    while len(waiting) < ahead and (slot := next(slots, None)) is not None:
                        waiting.append((slot, pool.submit(self._read, slot)))
                    if not waiting:
                        return
                    slot, future = waiting.popleft()
                    item: Item | None
                    try:
                        item = future.result()
                    except ImageError as error:
                        item = self._retry(slot, error)
                    if item is not None:
                        yield item
            finally:
                pool.shutdown(cancel_futures=True)


class IndexedSource(ImageSource):
    """Images that are told by their index, of which some are used."""

    _count: int
    """All there are."""
    _indices: list[int]

    @property
    def names(self) -> list[str]:
        """The place of each chosen image in the array, as text."""
        return [str(index) for index in self._indices]

    def _slots(self) -> Sequence[int]:
        return self._indices

    def reopened(self, limit: int | None = None) -> Self:
        """The source once more, with at most ``limit`` of all its images, spread evenly."""
        return self._with(evenly(self._count, limit))

    def drawn(self, limit: int, seed: int) -> Self:
        """``limit`` of all images, drawn at random, in their order."""
        return self._with(at_random(self._count, limit, seed))

    def others(self, limit: int) -> Self | None:
        """At most ``limit`` images that this source does not have, spread evenly; None without
        any."""
        used = set(self._indices)
        left = [index for index in range(self._count) if index not in used]
        return self._with([left[i] for i in evenly(len(left), limit)]) if left else None

    def _with(self, indices: list[int]) -> Self:
        """The same images, others chosen; as long as it lives, so does what they lie in."""
        other = copy.copy(self)
        other._indices, other.skipped, other.labels, other._origin = indices, [], None, self
        return other

    _origin: ImageSource | None = None


class NoiseSource(ImageSource):
    """Standard Gaussian model inputs, or Gaussian pixels where the model takes pixels, always the
    same: calibration data that shows nothing."""

    kind: ClassVar[str] = NOISE

    def __init__(self, preprocess: Preprocess, count: int, seed: int = NOISE_SEED) -> None:
        self.preprocess, self.count, self.seed, self.skipped = preprocess, count, seed, []

    @property
    def names(self) -> list[str]:
        """``noise 0``, ``noise 1``, …"""
        return [f"{self.kind} {index}" for index in range(self.count)]

    def _slots(self) -> Sequence[int]:
        return range(self.count)

    def reopened(self, limit: int | None = None) -> Self:
        """The same noise, at most ``limit`` images of it."""
        count = self.count if limit is None else min(limit, self.count)
        return type(self)(self.preprocess, count, self.seed)

    def drawn(self, limit: int, seed: int) -> Self:
        """Noise of another seed."""
        return type(self)(self.preprocess, min(limit, self.count), seed)

    def _read(self, slot: int) -> Item:
        random = np.random.default_rng((self.seed, slot))
        noise = random.standard_normal(self.preprocess.shape, dtype=np.float32)
        if self.preprocess.raw:  # pixels of middle gray, as far from it as pictures'
            noise = np.rint(np.clip(PIXEL_MEAN + PIXEL_DEVIATION * noise, 0, 255))
        return f"{self.kind} {slot}", noise


def evenly(count: int, limit: int | None) -> list[int]:
    """``min(limit, count)`` indices spread evenly over ``range(count)``. Raises ConfigError."""
    if limit is not None and limit < 1:
        raise ConfigError(f"The number of images must be at least 1, got {limit}.")
    chosen = count if limit is None else min(limit, count)
    return [index * count // chosen for index in range(chosen)]


def at_random(count: int, limit: int, seed: int) -> list[int]:
    """``min(limit, count)`` of ``range(count)``, drawn without replacement, ascending."""
    drawn = np.random.default_rng(seed).permutation(count)[:limit]
    return [int(index) for index in np.sort(drawn)]


def _stack(items: list[Item]) -> tuple[list[str], FloatArray]:
    return [name for name, _ in items], np.stack([pixels for _, pixels in items])
