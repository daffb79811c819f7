"""Pictures that no camera took, with the statistics of those that one did.

Dead leaves: shapes of all sizes that hide one another, with edges, flat parts and shading, and a
texture whose amplitude falls with frequency. Such images have the spectra and the heavy tails of
photographs, which Gaussian noise has not. Sources: Lee, Mumford, Huang, "Occlusion models for
natural images" (2001), for sizes r with density r⁻³; Baradad et al., "Learning to See by Looking
at Noise" (arXiv 2106.05963), for their use in place of photographs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.images.preprocess import Preprocess, from_pixels
from ptq_onnx.images.source import NOISE, NOISE_SEED, Item, NoiseSource

Array = NDArray[np.float32]
SYNTHETIC = "synthetic"
"""What --calib calls a :class:`SyntheticSource`."""
PSAQ = "psaq"
"""What --calib calls a :class:`MadeSource`."""
SHAPES = 600
"""At most; what they leave free has the colour that all vary about."""
SMALLEST, LARGEST = 3.0, 0.6
"""Radii, in pixels and over the shorter side."""
BOXES = 0.35
"""Share of shapes with corners."""


class SyntheticSource(NoiseSource):
    """Drawn by seed, always the same: calibration data that shows nothing, but looks alike."""

    kind = SYNTHETIC
    pictures = True

    def _read(self, slot: int) -> Item:
        random = np.random.default_rng((self.seed, slot))
        return f"{self.kind} {slot}", from_pixels(
            picture(random, *self.preprocess.size), self.preprocess
        )


class MadeSource(SyntheticSource):
    """Pictures that are made from a model; until they are, the drawn ones that they begin with.

    ``made``: uint8 [N, H, W, C], held in memory (150 kB each at 224 x 224).
    """

    kind = PSAQ

    def __init__(
        self,
        preprocess: Preprocess,
        count: int,
        seed: int = NOISE_SEED,
        made: NDArray[np.uint8] | None = None,
    ) -> None:
        super().__init__(preprocess, count, seed)
        self.made = made

    def filled(self, made: NDArray[np.uint8]) -> Self:
        """The source with its pictures."""
        return type(self)(self.preprocess, len(made), self.seed, made)

    def reopened(self, limit: int | None = None) -> Self:
        """The same pictures, at most ``limit`` of them."""
        found = super().reopened(limit)
        found.made = self.made
        return found

    def drawn_pixels(self) -> NDArray[np.uint8]:
        """What they begin with, uint8 [N, H, W, C]."""
        channels = self.preprocess.channels
        plain = replace(self.preprocess, mean=(0.0,) * channels, std=(1 / 255,) * channels)
        drawn = SyntheticSource(plain, self.count, self.seed).batches(1)
        found = np.concatenate([np.rint(one).astype(np.uint8) for one in drawn])
        return np.ascontiguousarray(found.transpose(0, 2, 3, 1))

    def _read(self, slot: int) -> Item:
        if self.made is None:
            return super()._read(slot)
        return f"{self.kind} {slot}", from_pixels(self.made[slot], self.preprocess)


DRAWN: dict[str, type[NoiseSource]] = {
    NOISE: NoiseSource,
    SYNTHETIC: SyntheticSource,
    PSAQ: MadeSource,
}
"""What --calib calls images that no camera took."""


def is_drawn(images: object) -> bool:
    """True for the name of images that no camera took."""
    return isinstance(images, str) and images in DRAWN


def picture(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """One picture, [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    middle, spread = random.uniform(40, 215, 3), random.uniform(20, 75)
    made = np.empty((height, width, 3), np.float32)
    made[:] = middle
    free = np.ones((height, width), bool)
    for _ in range(SHAPES):
        place, inside = _shape(random, rows, columns)
        new = inside & free
        if not new.any():
            continue
        color = middle + spread * (random.normal() + 0.45 * random.normal(size=3))
        made[new] = color * (1 + 0.35 * random.normal() * place[new])[:, None]
        free &= ~new
        if not free.any():
            break
    made += random.uniform(5, 20) * _texture(random, height, width)[:, :, None]
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


def _shape(
    random: np.random.Generator, rows: Array, columns: Array
) -> tuple[Array, NDArray[np.bool_]]:
    """How far along its axis each pixel is, one at its end, and which pixels an ellipse or a box
    has."""
    height, width = rows.shape
    ends = np.array([SMALLEST, max(LARGEST * min(height, width), SMALLEST + 1)]) ** -2
    radius = float(ends[0] + random.random() * (ends[1] - ends[0])) ** -0.5
    down = rows - random.uniform(-radius, height + radius)
    right = columns - random.uniform(-radius, width + radius)
    angle = random.uniform(0, np.pi)
    along = (np.cos(angle) * right + np.sin(angle) * down) / radius
    across = (np.cos(angle) * down - np.sin(angle) * right) / (radius * random.uniform(0.4, 1))
    if random.random() < BOXES:
        return along, np.maximum(np.abs(along), np.abs(across)) < 1
    return along, along**2 + across**2 < 1


def _texture(random: np.random.Generator, height: int, width: int) -> Array:
    """Noise of deviation 1 whose amplitude falls as 1 / f^a, [H, W]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    parts = random.normal(size=(2, *frequency.shape)) / frequency ** random.uniform(0.8, 1.3)
    parts[:, 0, 0] = 0
    made = np.fft.irfft2(parts[0] + 1j * parts[1], (height, width))
    return np.asarray(made / max(float(made.std()), 1e-6), np.float32)
