"""From a picture to the numbers a Vision Transformer was trained on.

The evaluation transform of timm: resize the shorter side to ``size / crop_pct``, cut out the
centre, then ``(x / 255 - mean) / std``. One exception: a picture at or just above the input size
(both sides at most 10 % larger) was prepared by somebody already and is only cropped, an odd
margin losing its extra line at the right and bottom.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from ptq_onnx.errors import ConfigError, ImageError, one_line

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
FloatArray = NDArray[np.float32]

#: Key of a model's ``metadata_props`` that holds :meth:`Preprocess.to_json`.
METADATA_KEY = "ptq_onnx.preprocess"
#: A picture whose sides are between the input size and this multiple of it is never resized.
CROP_ONLY = 1.1

#: Pixels of a resized picture, beyond what a crop needs of one that is wide or tall.
MOST_PIXELS = 1 << 26

LEAST_CROP, LEAST_STD, LARGEST_NUMBER, LARGEST_SIDE = 0.1, 1e-6, 1e4, 8192
"""Bounds of what options and a model's metadata may ask for."""

_NAMED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
PREPROCESS_NAMES = tuple(_NAMED)
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_OPTIONAL = tuple(name for name in ("WEBP", "AVIF") if features.check(name.lower()))
#: Formats that are decoded, by content, whatever a file is called. Pillow knows some forty more, of
#: which one starts an external program (EPS) and many are hardly ever read by anyone.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM", *_OPTIONAL)
# What Pillow raises on files that are cut short, forged, empty or absurdly large.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model input.

    ``mean`` and ``std`` are per channel on the scale 0…1, ``size`` is (height, width) in pixels,
    ``crop_pct`` in (0, 1] is the part of the resized picture that the crop keeps, ``channels`` is
    3 (RGB) or 1 (grayscale). ``channels_last``: the model takes [H, W, C], and arrays given as its
    inputs have it so; in here images are [C, H, W]. ``squash``: both sides are resized to
    ``size / crop_pct``, whatever the picture's shape. Raises ConfigError.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    channels: int = 3
    channels_last: bool = False
    squash: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"Preprocessing: channels must be 1 or 3, got {self.channels!r}.")
        if not isinstance(self.channels_last, bool):
            raise ConfigError(
                f"Preprocessing: channels_last must be true or false, got {self.channels_last!r}."
            )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if not _finite(values, self.channels):
                raise ConfigError(
                    f"Preprocessing: {field} needs one finite number for each of the "
                    f"{self.channels} channels, got {values!r:.80}."
                )
            object.__setattr__(self, field, tuple(float(value) for value in values))
        if min(self.std) < LEAST_STD:
            raise ConfigError(f"Preprocessing: std must be positive, got {self.std}.")
        if not _sides(self.size):
            raise ConfigError(
                "Preprocessing: size must be (height, width), two positive whole numbers up to "
                f"{LARGEST_SIDE}, got {self.size!r:.80}."
            )
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        if not (_number(self.crop_pct) and LEAST_CROP <= self.crop_pct <= 1):
            raise ConfigError(
                f"Preprocessing: crop_pct must be in (0, 1], at least {LEAST_CROP}, got"
                f" {self.crop_pct!r:.40}."
            )
        if not isinstance(self.interpolation, str) or self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"Preprocessing: interpolation must be one of {', '.join(_RESAMPLING)}, "
                f"got {self.interpolation!r:.40}."
            )

    @classmethod
    def named(cls, name: str, size: int | tuple[int, int] = 224) -> "Preprocess":
        """``'imagenet'``, ``'inception'`` (0.5 everywhere) or ``'none'`` (pixels as they are, 0 to
        255) at ``size``. Raises ConfigError."""
        if name not in _NAMED:
            raise ConfigError(
                f"Unknown normalisation {name!r}: expected one of {', '.join(_NAMED)}."
            )
        mean, std = _NAMED[name]
        return cls(mean, std, (size, size) if isinstance(size, int) else size)

    @property
    def raw(self) -> bool:
        """Whether pictures stay what they are: 0 to 255, not normalised."""
        return not any(self.mean) and all(abs(255 * s - 1) < 1e-6 for s in self.std)

    @property
    def described(self) -> str:
        """In words, for people: its name where it has one, and size, crop and interpolation."""
        numbers = [", ".join(f"{x:.4g}" for x in dict.fromkeys(v)) for v in (self.mean, self.std)]
        same = (n for n, pair in _NAMED.items() if pair == (self.mean, self.std))
        name = next(same, f"mean {numbers[0]}, std {numbers[1]}")
        sides = "x".join(map(str, self.size))
        return f"{name}, {sides}, crop {self.crop_pct:.4g}, {self.interpolation}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one preprocessed picture."""
        return self.channels, *self.size

    @property
    def given(self) -> tuple[int, int, int]:
        """Shape of an array that is one model input, as the model takes it."""
        return (*self.size, self.channels) if self.channels_last else self.shape

    def to_json(self) -> str:
        """One line of JSON, for ``metadata_props[METADATA_KEY]``."""
        values = asdict(self)
        for name in ("channels_last", "squash"):
            if not values[name]:  # as files of earlier versions have it
                del values[name]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Preprocess":
        """The inverse of :meth:`to_json`. Raises ConfigError."""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Preprocessing: not valid JSON ({error}): {text[:60]!r}.") from None
        known = set(cls.__dataclass_fields__)
        required = {"mean", "std", "size"}
        if not isinstance(values, dict) or not required <= set(values) <= known:
            raise ConfigError(
                f"Preprocessing: expected a JSON object with {', '.join(sorted(required))} and "
                f"optionally {', '.join(sorted(known - required))}, got {text[:80]!r}."
            )
        return cls(**values)


def load_image(path: str | Path, preprocess: Preprocess) -> FloatArray:
    """Decode one image file to float32 [C, H, W]. Raises ImageError if it cannot be read.

    Of an animation it is the first frame. The orientation tag is ignored and an alpha channel
    dropped, both as in timm and in torchvision's ImageFolder.
    """
    with opened(path) as image:
        return from_image(image, preprocess)


def open_picture(path: str | Path, channels: int = 3) -> Image.Image:
    """Decode one image file to RGB or gray. Raises ImageError if it cannot be read."""
    with opened(path) as image:
        image.load()
        return _convert(image, channels)


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture in a regular file, of a format that is known here. Raises ImageError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")  # a pipe would be waited for
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except _UNREADABLE as error:
        reason = one_line(error)
        raise ImageError(f"Image '{path}' cannot be read: {reason}.") from error


def from_image(image: Image.Image, preprocess: Preprocess) -> FloatArray:
    """A decoded picture as float32 [C, H, W]: resized (or not), cropped and normalised."""
    image = _crop(_convert(image, preprocess.channels), preprocess)
    height, width = preprocess.size
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels.reshape(height, width, preprocess.channels)
    mean = np.array(preprocess.mean, dtype=np.float32)
    std = np.array(preprocess.std, dtype=np.float32)
    values = pixels if preprocess.raw else (pixels / np.float32(255) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def from_pixels(pixels: NDArray[np.uint8], preprocess: Preprocess) -> FloatArray:
    """Raw pixels uint8 [H, W, 1 | 3 | 4] as float32 [C, H, W]."""
    plain = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return from_image(Image.fromarray(np.ascontiguousarray(plain)), preprocess)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Any mode as 8-bit RGB or gray."""
    if image.mode.startswith("I"):  # 16-bit gray; Pillow would clip it at 255
        deep = np.asarray(image)  # in its own type: a wider one takes gigabytes of a large picture
        gray = np.empty(deep.shape, np.uint8)
        np.clip(deep >> 8 if deep.max() > 255 else deep, 0, 255, out=gray, casting="unsafe")
        image = Image.fromarray(gray)
    if image.mode == "P":  # the palette's transparency would raise a warning on the direct way
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def aligned(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """A picture of numbers (classes, depths) cut out as the picture beside it, none of them
    mixed."""
    return _crop(image, replace(preprocess, interpolation="nearest"))


def placed(width: int, height: int, preprocess: Preprocess) -> tuple[int, int, int, int]:
    """Width and height to which a picture is resized, and left and top of what is cut out of it.
    Raises ValueError for one that is too narrow."""
    across, down = preprocess.size[1], preprocess.size[0]
    sides = (height, width)
    if not preprocess.squash and all(
        s <= side <= CROP_ONLY * s for side, s in zip(sides, preprocess.size, strict=True)
    ):
        return width, height, (width - across) // 2, (height - down) // 2
    target = [math.floor(s / preprocess.crop_pct) for s in preprocess.size]
    height, width = target
    if not preprocess.squash:
        ratio = min(side / t for side, t in zip(sides, target, strict=True))
        # The side that sets the ratio lands on its target exactly, whatever int() makes of it
        height, width = (
            max(t, int(side / ratio + 1e-6)) for side, t in zip(sides, target, strict=True)
        )
    if height * width > MOST_PIXELS:
        raise ValueError(f"resized, it would have {width} by {height} pixels; it is too narrow")
    return width, height, round((width - across) / 2), round((height - down) / 2)


def _crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The centre of the picture at ``preprocess.size``, after resizing it unless it is near: to
    just cover ``size / crop_pct``, rounded as torchvision does."""
    width, height, left, top = placed(image.width, image.height, preprocess)
    if (image.width, image.height) != (width, height):
        image = image.resize((width, height), resampling(preprocess))
    return image.crop((left, top, left + preprocess.size[1], top + preprocess.size[0]))


def resampling(preprocess: Preprocess) -> Image.Resampling:
    """Pillow's name of the interpolation."""
    return _RESAMPLING[preprocess.interpolation]


def _number(value: Any) -> bool:
    kinds = int, float, np.floating, np.integer
    return isinstance(value, kinds) and not isinstance(value, bool) and _is_small(value)


def _is_small(value: Any) -> bool:
    return bool(abs(value) <= LARGEST_NUMBER)  # NaN is not


def _finite(values: object, count: int) -> bool:
    return isinstance(values, tuple | list) and len(values) == count and all(map(_number, values))


def _sides(size: object) -> bool:
    return (
        isinstance(size, tuple | list)
        and len(size) == 2
        and all(isinstance(side, int | np.integer) and 0 < side <= LARGEST_SIDE for side in size)
    )
