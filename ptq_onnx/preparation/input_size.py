"""The image size of a model with dynamic axes, told from what in its graph has a fixed length.

Exporters that leave every axis dynamic (optimum's) keep the position table of the size they
exported for, so that the file runs at that size alone. A size that meets a table, the rows of a
weight or a fixed Reshape is an equation in height and width; where a square solves all of them,
or a Reshape says how the length is cut, that is the size. The axes are then fixed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ModelError, one_line
from ptq_onnx.graph.branches import has_branches
from ptq_onnx.graph.symbolic_dims import Tie
from ptq_onnx.graph.symbolic_shapes import Symbolic
from ptq_onnx.preparation.cleaning import flatten
from ptq_onnx.preparation.model_sessions import open_plain

LARGEST = 4096
"""Sides that are tried."""
LARGEST_OBLONG = 1024
"""Sides that are tried in pairs, to name some that fit."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Axes:
    """The image input, and which of its axes are channels, height and width."""

    value: ir.Value
    channels: int
    height: int
    width: int

    def dim(self, axis: int) -> int | str | None:
        """A size, or the name of a dynamic one."""
        assert self.value.shape is not None
        dim = self.value.shape[axis]
        return dim if isinstance(dim, int) else dim.value


def fix_size(model: ir.Model, path: Path, size: Size | None, axes: Axes) -> list[str]:
    """Fix the dynamic channels, height and width where the graph runs at one size only, in place;
    returns notes. ``size``: what ``--size`` says. Raises ModelError, ConfigError."""
    names = (axes.dim(axes.height), axes.dim(axes.width))
    if all(isinstance(d, int) for d in (*names, axes.dim(axes.channels))):
        return []
    found = Symbolic(model.graph, trust=False, keep=True).run()
    ties = [t for t in found.ties if isinstance(t.size, sympy.Basic)]
    channels = found.names.get(str(axes.dim(axes.channels)))
    fixed = next((t.fixed for t in ties if t.size == channels and not t.split), None)
    if channels is not None and fixed is not None:
        _set(axes.value, axes.channels, fixed)
    symbols = [n if isinstance(n, int) else found.names.get(str(n)) for n in names]
    dynamic = {s for s in symbols if isinstance(s, sympy.Basic)}
    bound = [t for t in ties if t.size.free_symbols and t.size.free_symbols <= dynamic]
    firm = [t for t in bound if not t.split]
    undecided = size is not None and has_branches(model)
    if not dynamic or None in symbols or not (firm or undecided):
        return []
    equations = _Equations(symbols, firm, [t for t in bound if t.split])
    if size is not None:
        _check(size, equations, path)
    chosen = size or equations.solve()
    what = _describe(firm[0].by) if firm else ""
    if chosen is None:
        fits = " or ".join(f"{h}x{w}" for h, w in equations.some())
        raise ModelError(
            f"Model {path}: its height and width are dynamic ({names[0]}, {names[1]}), but {what}"
            " fits some sizes only, none of them square: give --size HxW"
            + (f", as in {fits}." if fits else ".")
        )
    for axis, side in zip((axes.height, axes.width), chosen, strict=True):
        _set(axes.value, axis, side)
    told = "given by --size" if size is not None else f"inferred from {what}"
    return [
        *flatten(model),
        f"The image size {chosen[0]}x{chosen[1]} is {told}; the dynamic axes"
        f" {names[0]} and {names[1]} of '{axes.value.name}' are fixed to it",
    ]


def try_size(model: ir.Model, path: Path, image: ir.Value, shape: tuple[int, int, int]) -> None:
    """Run the model once on a black image, where its height or width is dynamic.

    Raises ModelError, which names ``--size``, where images of that size do not go through.
    """
    dims = list(image.shape or ())
    if len(dims) != 4 or all(isinstance(d, int) for d in dims[2:]):
        return
    batch = dims[0] if isinstance(dims[0], int) else 1
    try:
        session = open_plain(model)
        session.run(None, {str(image.name): np.zeros((batch, *shape), np.float32)})
    except Exception as error:  # the runtime's exceptions share no base class
        raise ModelError(
            f"Model {path} does not run on images of {shape[1]}x{shape[2]}: give the size it was"
            f" made for with --size HxW ({one_line(_cause(error))})."
        ) from error


def _cause(error: Exception) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def _check(size: Size, equations: _Equations, path: Path) -> None:
    """Raise ConfigError where a size contradicts what is fixed in the graph."""
    for tie in equations.ties:
        made = equations.value(tie, *size)
        if made == tie.fixed:
            continue
        solved = equations.solve()
        fits = [solved] if solved is not None else equations.some()
        advice = " or ".join(f"{h}x{w}" for h, w in fits)
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: images of that size make {made} positions where"
            f" {_describe(tie.by)} of model {path} has {tie.fixed}"
            + (f"; it takes {advice}." if advice else ".")
        )


def _describe(value: ir.Value) -> str:
    """A constant with its shape, or the tensor."""
    dims = None if value.const_value is None else value.const_value.shape.numpy()
    if dims is None:
        return f"the fixed shape of '{value.name}'"
    return f"the table '{value.name}' [{', '.join(map(str, dims))}]"


def _set(value: ir.Value, axis: int, size: int) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([*value.shape[:axis], size, *value.shape[axis + 1 :]])


class _Equations:
    """What height and width must satisfy; either may be a number already."""

    def __init__(self, sides: Sequence[Any], ties: list[Tie], hints: list[Tie]) -> None:
        self.sides, self.ties, self.hints = sides, list(dict.fromkeys(ties)), hints

    def value(self, tie: Tie, height: int, width: int) -> int:
        """What an image of that size makes of the dynamic size."""
        return int(self._of(tie.size, np.array([height]), np.array([width]))[0])

    def solve(self) -> Size | None:
        """The size that fits: square, unless a side is known or a Reshape cuts it otherwise."""
        height, width = self.sides
        sides = np.arange(1, LARGEST + 1)
        if height == width:
            side = _pick(sides, self._fits(self.ties, sides, sides))
            return None if side is None else (side, side)
        own = [self._own(self.ties, symbol, sides) for symbol in (height, width)]
        if None not in own:
            return self._checked(own[0], own[1])
        if own[0] is not None or own[1] is not None:
            known = own[0] or own[1]
            fixed = np.full_like(sides, known)
            pair = (fixed, sides) if own[0] is not None else (sides, fixed)
            other = _pick(sides, self._fits(self.ties, *pair))
            if other is None or known is None:
                return None
            return (known, other) if own[0] is not None else (other, known)
        side = _pick(sides, self._fits(self.ties, sides, sides))
        if side is not None and not self._says_otherwise(side):
            return side, side
        return next((size for hint in self.hints if (size := self._cut(hint, sides))), None)

    def some(self) -> list[Size]:
        """Sizes that fit, those nearest to a square."""
        sides = np.arange(1, LARGEST_OBLONG + 1)
        height, width = (a.reshape(-1) for a in np.meshgrid(sides, sides, indexing="ij"))
        fits = self._fits(self.ties, height, width).reshape(len(sides), -1)
        fits[1:] &= ~fits[:-1]
        fits[:, 1:] &= ~fits[:, :-1]
        pairs = [(int(h) + 1, int(w) + 1) for h, w in np.argwhere(fits)]
        return sorted(pairs, key=lambda p: (max(p) / min(p), p))[:2]

    def _says_otherwise(self, side: int) -> bool:
        """Whether a Reshape cuts the length of a square into something else than a square."""
        return any(
            len(hint.split) == 2
            and hint.split[0] != hint.split[1]
            and self.value(hint, side, side) == hint.fixed
            for hint in self.hints
        )

    def _cut(self, hint: Tie, sides: NDArray[np.int64]) -> Size | None:
        """The size by a Reshape of a length height · width into rows and columns."""
        if len(hint.split) != 2:
            return None
        factors = sympy.Mul.make_args(sympy.factor(hint.size))
        found: list[int] = []
        for symbol, count in zip(self.sides, hint.split, strict=True):
            part = sympy.Mul(*(f for f in factors if symbol in f.free_symbols))
            if part.free_symbols != {symbol}:
                return None
            side = _pick(sides, self._of(part, sides, sides) == count)
            if side is None:
                return None
            found.append(side)
        return self._checked(found[0], found[1])

    def _checked(self, height: int | None, width: int | None) -> Size | None:
        if height is None or width is None:
            return None
        fits = self._fits(self.ties, np.array([height]), np.array([width]))
        return (height, width) if fits[0] else None

    def _own(self, ties: Sequence[Tie], symbol: Any, sides: NDArray[np.int64]) -> int | None:
        """A side by the equations that hold no other."""
        if isinstance(symbol, int):
            return symbol
        alone = [t for t in ties if t.size.free_symbols == {symbol}]
        return _pick(sides, self._fits(alone, sides, sides)) if alone else None

    def _fits(
        self, ties: Sequence[Tie], height: NDArray[np.int64], width: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        fits = np.ones(len(height), np.bool_)
        for tie in ties:
            fits &= self._of(tie.size, height, width) == tie.fixed
        return fits

    def _of(
        self, size: Any, height: NDArray[np.int64], width: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """An expression at many sizes at once."""
        given = {
            s: a
            for s, a in zip(self.sides, (height, width), strict=True)
            if isinstance(s, sympy.Basic)
        }
        names = sorted(size.free_symbols, key=lambda s: s.name)
        plain = [sympy.Symbol(f"side{i}") for i in range(len(names))]
        expression = size.subs(dict(zip(names, plain, strict=True)))
        function = sympy.lambdify(plain, expression, modules="numpy")
        values = function(*(given[name].astype(np.float64) for name in names))
        return np.broadcast_to(np.asarray(values, np.float64), height.shape)


def _pick(sides: NDArray[np.int64], fits: NDArray[np.bool_]) -> int | None:
    """Of the first run of sides that fit: the multiple of its length, the stride; else its first.

    Patches of 8 take 32 to 39 as 4 patches, and 32 is meant; a padded convolution of stride 2
    takes 31 and 32 as 16.
    """
    found = sides[fits]
    if not len(found):
        return None
    first = int(found[0])
    rest = np.flatnonzero(np.diff(found) != 1)
    length = len(found) if not len(rest) else int(rest[0]) + 1
    multiple = -(-first // length) * length
    return multiple if multiple < first + length else first
