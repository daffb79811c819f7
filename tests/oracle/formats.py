"""The numbers of report.json as plain arithmetic on real values; nothing of the package is used.

    units  u = x / (scale · factor) + zero_point
    code   c = round(u), held within the bits
    value  x' = (c - zero_point) · scale · factor

``log2`` codes of an attention weight a: t = round(1 / a), c = ⌊log2 t⌋, one more from 1.5 · 2^c on;
value 2^-c, of the last code (``limits``) zero. ``e4m3``: u is rounded to one sign, four exponent
and three mantissa bits, up to 448. ``twin``: two steps, scale and 2^ratio · scale; with a sign the
first below zero, the other above; else codes 0 … H - 1 of the first and H … 2H - 1 of the other,
whichever is nearer. ``logarithmic``: levels l(c) = scale · 2^(-8 c / eighths), the last zero, value
l(c) - l(zero_point), the nearest. ``row``: x is divided by the largest of its last axis before,
multiplied behind. ``centred``: the mean over the tokens of x, in whole steps, is taken out before;
a product with it adds the mean to its result. ``dynamic``: s = (max - min) / 255 of the whole
tensor, zero among them, in place of scale and zero point. ``token`` and ``column``: x is divided by
the largest magnitude of its last axis, or of the one before, and multiplied behind.
``token_skewed``: by the largest value, or the least one below zero as many times as there are more
codes above zero than below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TOKENS = -2
VECTORS = {"token": -1, "column": -2}
SLACK = 1e-4
"""How far 1/a may be off before its code counts as wrong: the exponential of a softmax is an
approximation, and 1.5 · 2^c is a step."""


@dataclass(frozen=True)
class Coded:
    """A tensor and what its format makes of it."""

    part: Array
    """What is coded: x, its rows divided by their largest, or x without its mean."""
    units: Array
    codes: Array
    values: Array
    """What readers get."""
    removed: Array | None = None
    """The mean that was taken out."""
    step: Array | None = None
    """Of codes whose range is that of the tensor."""


@dataclass(frozen=True)
class Format:
    """One entry of ``tensors``."""

    name: str
    role: str
    parameter: bool
    limits: tuple[int, int]
    """The smallest and the largest code."""
    signed: bool
    code: str
    granularity: str
    renormalize: bool
    centred: bool
    block: int
    stored: str
    axis: int | None
    scale: Array
    zero: Array
    factor: Array
    ratio: int = 0
    """Of ``twin`` codes."""
    eighths: int = 0
    """Of ``logarithmic`` codes."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Format:
        """Reads an entry; every key is needed."""
        factor = np.float64(1)
        if "alpha" in entry:
            factor = np.exp2(np.array(entry["alpha"]["values"], np.float64))
            factor = factor.reshape(entry["alpha"]["shape"])
        elif "factor" in entry:
            factor = np.array(entry["factor"]["values"], np.float64)
            factor = factor.reshape(entry["factor"]["shape"])
        return cls(
            name=entry["tensor"],
            role=entry["role"],
            parameter=entry["parameter"],
            limits=(entry["limits"][0], entry["limits"][1]),
            signed=entry["signed"],
            code=entry["code"],
            granularity=entry["granularity"],
            renormalize=entry["renormalize"],
            centred=entry["centred"],
            block=entry["block_size"],
            stored=entry["stored"],
            axis=entry["axis"],
            scale=np.array(entry["scale"], np.float64),
            zero=np.array(entry["zero_point"], np.float64),
            factor=np.asarray(factor),
            ratio=entry.get("ratio", 0),
            eighths=entry.get("eighths", 0),
        )

    def spread(self, numbers: Array, shape: tuple[int, ...]) -> Array:
        """Scales or zero points against a tensor of ``shape``."""
        if self.block:
            return np.repeat(numbers, self.block, axis=0)[: shape[0]]
        if numbers.ndim == 0 or self.axis is None:
            return numbers
        form = [1] * len(shape)
        form[self.axis] = -1
        return numbers.reshape(form)

    def apply(self, x: Array) -> Coded:
        """Codes of a tensor and the values that they stand for."""
        x = np.asarray(x, np.float64)
        if self.code == "log2":
            codes = log2_codes(x, self.limits[1])
            values = np.where(codes == self.limits[1], 0, np.exp2(-codes))
            return Coded(x, x, codes, values)
        if self.code == "twin":
            codes, values = self.twin(x)
            return Coded(x, x / self.scale, codes, values)
        if self.code == "logarithmic":
            top = x.max(axis=-1, keepdims=True) if self.granularity == "row" else np.float64(1)
            codes, values = self.logarithmic(x / top)
            return Coded(x / top, x / top, codes, values * top)
        if self.granularity == "dynamic":
            low, high = min(x.min(), 0.0), max(x.max(), 0.0)
            step = np.float64(np.float32(high - low) / np.float32(255))
            point = np.rint(-low / step)
            units = x / step + point
            codes = np.clip(np.rint(x / step) + point, 0, 255)
            return Coded(x, units, codes, (codes - point) * step, step=step)
        scale, zero = self.spread(self.scale, x.shape), self.spread(self.zero, x.shape)
        part, top, mean = x, np.float64(1), None
        if self.granularity == "row":
            top = x.max(axis=-1, keepdims=True)
            part = x / top
        if self.granularity in VECTORS:
            top = np.abs(x).max(axis=VECTORS[self.granularity], keepdims=True)
            top = np.maximum(top, 1e-30)
            part = x / top
        if self.granularity == "token_skewed":
            skew = (self.limits[1] - zero) / zero
            ends = x.max(axis=-1, keepdims=True), -skew * x.min(axis=-1, keepdims=True)
            top = np.maximum(np.maximum(*ends), 1e-30)
            part = x / top
        if self.centred:
            # The mean of whole steps, in single precision: half a step more or less is another
            # rounding of everything.
            steps = np.rint(np.float32(1) / np.float32(scale) * x.astype(np.float32))
            mean = steps.mean(axis=TOKENS, keepdims=True) * scale
            part = x - mean
        units = part / (scale * self.factor) + zero
        codes = e4m3(units) if self.code == "e4m3" else np.clip(np.rint(units), *self.limits)
        values = (codes - zero) * scale * self.factor * top
        return Coded(part, units, codes, values, mean)

    def twin(self, x: Array) -> tuple[Array, Array]:
        """The nearest of all levels, of two that are as near the one of the finer step."""
        every = np.arange(self.limits[0], self.limits[1] + 1)
        levels = self.twin_values(every)
        order = np.argsort(levels, kind="stable")
        levels, first = np.unique(levels[order], return_index=True)
        every = every[order][first]
        place = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
        down, up = x - levels[place - 1], levels[place] - x
        even = every[place] % 2 == 0
        chosen = np.where((up < down) | ((up == down) & even), place, place - 1)
        return every[chosen], levels[chosen]

    def twin_values(self, codes: Array) -> Array:
        """What twin codes stand for."""
        coarse, half = self.scale * 2.0**self.ratio, (self.limits[1] + 1) // 2
        if self.signed:
            return np.where(codes < 0, codes * self.scale, codes * coarse)
        return np.where(codes < half, codes * self.scale, (codes - half) * coarse)

    def levels(self) -> Array:
        """What logarithmic codes stand for, falling."""
        codes = np.arange(self.limits[1] + 1)
        held = self.scale * np.exp2(-8 * codes / self.eighths)
        held[-1] = 0
        return np.asarray(held - held[int(self.zero)])

    def logarithmic(self, x: Array) -> tuple[Array, Array]:
        """The nearest of all levels."""
        levels = self.levels()
        middles = (levels[1:] + levels[:-1]) / 2
        codes = len(middles) - np.searchsorted(middles[::-1], x)
        return codes, levels[codes]

    def beyond(self, coded: Coded, codes: Array) -> Array:
        """How far other codes are from the tensor, in steps, but for what rounding explains."""
        if self.code == "log2":
            near = [log2_codes(coded.part * (1 + s), self.limits[1]) for s in (SLACK, -SLACK)]
            return np.maximum(np.maximum(near[0] - codes, codes - near[1]), 0)
        if self.code == "e4m3":
            held = np.clip(coded.units, -448, 448)
            step = e4m3_step(np.maximum(np.abs(held), np.abs(codes)))
            return np.maximum(np.abs(codes - held) - step / 2, 0)
        if self.code == "twin":
            least = np.abs(coded.part - self.twin(coded.part)[1])
            return np.maximum(np.abs(coded.part - self.twin_values(codes)) - least, 0) / self.scale
        if self.code == "logarithmic":
            levels = self.levels()
            gaps = np.append(-np.diff(levels), levels[-2] - levels[-1])
            near = self.logarithmic(coded.part)[0]
            off = np.abs(coded.part - levels[codes.astype(np.int64)])
            return np.maximum(off - np.abs(coded.part - levels[near]), 0) / gaps[near]
        low, high = self.limits
        off = np.abs(codes - np.clip(coded.units, low, high))
        return np.maximum(off - 0.5, 0)

    def error(self, coded: Coded, codes: Array) -> Array:
        """The same in the tensor's own units; of log2 from what 2^-c stands for."""
        if self.code == "log2":
            highest = np.where(codes == 0, np.inf, 4 / 3 * np.exp2(-codes))
            lowest = np.where(codes == self.limits[1], 0, 2 / 3 * np.exp2(-codes))
            off = np.maximum(lowest - coded.part, coded.part - highest)
            return np.where(self.beyond(coded, codes) > 0, np.maximum(off, 0), 0)
        if self.code == "logarithmic":
            levels = self.levels()
            least = np.abs(coded.part - levels[self.logarithmic(coded.part)[0]])
            return np.maximum(np.abs(coded.part - levels[codes.astype(np.int64)]) - least, 0)
        step = self.spread(self.scale, codes.shape) if coded.step is None else coded.step
        return self.beyond(coded, codes) * step * self.factor


def log2_codes(a: Array, last: int) -> Array:
    """Log-Int-Softmax codes of values in [0, 1]."""
    with np.errstate(divide="ignore", over="ignore"):
        t = np.rint(1 / np.asarray(a, np.float64))
        t = np.minimum(t, 2.0**300)
    exponent = np.floor(np.log2(t))
    return np.minimum(exponent + (t >= 1.5 * np.exp2(exponent)), last)


def e4m3_step(size: Array) -> Array:
    """The distance of neighbours around a magnitude."""
    _, exponent = np.frexp(np.maximum(size, 2.0**-6))
    return np.exp2(exponent - 1.0 - 3)


def e4m3(x: Array) -> Array:
    """The nearest numbers of 8-bit floats, half to even."""
    held = np.clip(x, -448, 448)
    step = e4m3_step(np.abs(held))
    return np.rint(held / step) * step
