"""Pictures that no camera took, with the statistics of those that one did.

Dead leaves: shapes of all sizes that hide one another, with edges, flat parts and shading, and a
texture whose amplitude falls with frequency. Such images have the spectra and the heavy tails of
photographs, which Gaussian noise has not. Sources: Lee, Mumford, Huang, "Occlusion models for
natural images" (2001), for sizes r with density r⁻³; Baradad et al., "Learning to See by Looking
at Noise" (arXiv 2106.05963), for their use in place of photographs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.images.preprocess import from_pixels
from ptq_onnx.images.source import NOISE, Item, NoiseSource

Array = NDArray[np.float32]
SYNTHETIC = "synthetic"
"""What --calib calls a :class:`SyntheticSource`."""
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


DRAWN: dict[str, type[NoiseSource]] = {NOISE: NoiseSource, SYNTHETIC: SyntheticSource}
"""What --calib calls images that are drawn."""


def is_drawn(images: object) -> bool:
    """True for the name of images that are drawn."""
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
