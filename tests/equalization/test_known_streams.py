"""What a stream may meet, turned to the same numbers, and what keeps it as it is, and why."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_shapes, run, sample, text

from ptq_onnx.equalization.rotation import turn
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.rotations import spreading

D, T = 8, 6
Part = Callable[[SmallGraph, str], str]


def linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int) -> str:
    product = g("MatMul", x, sample(rows, columns, seed=seed) * 0.4)
    return g("Add", product, sample(columns, seed=seed + 50))


def norm(g: SmallGraph, x: str, width: int = D, shift: bool = True, axis: int = -1) -> str:
    scale = 1 + sample(width, seed=4) * 0.2
    return g("LayerNormalization", x, scale, sample(width, seed=5) * float(shift), axis=axis)


def network(
    between: Part = lambda g, x: x,
    behind: Part = lambda g, x: x,
    *,
    width: int = D,
    shift: bool = True,
    outputs: tuple[str, ...] = (),
) -> ir.Model:
    """x [b, 6, 5] → linear (the stream) → ``between`` → norm → ``behind`` → linear [.., 3]."""
    g = SmallGraph(("batch", T, 5))
    g.const(np.array(0.5), "half")
    stream = between(g, linear(g, "x", 5, D, 1))
    normed = norm(g, stream, width, shift)
    out = linear(g, behind(g, normed), width, 3, 9)
    given = {"stream": stream, "normed": normed}
    model = g.model(out, *(given[name] for name in outputs))
    fuse(model)
    return model


def more(op: str, *others: object, first: bool = False, **attributes: object) -> Part:
    def part(g: SmallGraph, x: str) -> str:
        inputs = [*others, x] if first else [x, *others]
        return g(op, *inputs, **attributes)

    return part


def chain(*parts: Part) -> Part:
    def whole(g: SmallGraph, x: str) -> str:
        for part in parts:
            x = part(g, x)
        return x

    return whole


def twice(g: SmallGraph, x: str) -> str:
    """Tokens before and behind what a second linear makes of the input."""
    return g("Concat", linear(g, "x", 5, D, 20), x, axis=1)


def residual(g: SmallGraph, x: str) -> str:
    hidden = g("Gelu", linear(g, norm(g, x), D, 12, 30))
    return g("Add", x, g("Mul", linear(g, hidden, 12, D, 31), sample(D, seed=32)))


def read_plainly(g: SmallGraph, x: str) -> str:
    return g("Add", x, linear(g, g("Tanh", linear(g, x, D, 4, 33)), 4, D, 34))


def sized(g: SmallGraph, x: str) -> str:
    g("Shape", x)
    return g("Gather", x, np.array(0), axis=1)


TOKENS = np.array([1])
TURNED: dict[str, tuple[Part, Part]] = {
    "nothing": (chain(), chain()),
    "a number": (more("Mul", np.array(0.5)), chain()),
    "a number, first": (more("Mul", np.array(0.5), first=True), chain()),
    "divided": (more("Div", np.array(3.0)), chain()),
    "a table": (more("Add", sample(1, T, D, seed=7)), chain()),
    "less a table": (more("Sub", sample(T, D, seed=7)), chain()),
    "the same for all": (more("Add", sample(T, 1, seed=7)), chain()),
    "one for all": (more("Add", np.array(0.7)), chain()),
    "tokens first": (
        chain(more("Transpose", perm=[1, 0, 2]), more("Transpose", perm=[1, 0, 2])), chain()),
    "channels first": (
        chain(more("Transpose", perm=[0, 2, 1]), more("Add", sample(D, 1, seed=7)),
              more("Transpose", perm=[0, 2, 1])), chain()),
    "channels before all": (
        chain(more("Transpose", perm=[2, 0, 1]), more("Add", sample(D, 1, 1, seed=7)),
              more("Transpose", perm=[1, 2, 0])), chain()),
    "a grid": (
        chain(more("Reshape", np.array([0, 2, 3, D])), more("Reshape", np.array([0, T, D]))),
        chain()),
    "some tokens": (more("Slice", np.array([1]), np.array([4]), TOKENS), chain()),
    "a token": (more("Gather", np.array(2), axis=1), chain()),
    "the mean": (more("ReduceMean", TOKENS, keepdims=0), chain()),
    "the sum": (more("ReduceSum", TOKENS, keepdims=0), chain()),
    "twice": (twice, chain()),
    "a residual": (residual, chain()),
    "a plain reader": (read_plainly, chain()),
    "a token behind": (chain(), more("Gather", np.array(0), axis=1)),
    "the mean behind": (chain(), more("ReduceMean", TOKENS, keepdims=0)),
    "its sizes too": (chain(), sized),
    "padded before": (more("Pad", np.array([0, 1, 0, 0, 0, 0])), chain()),
    "padded behind": (chain(), more("Pad", np.array([0, 1, 0, 0, 0, 0]))),
    "the sum behind": (chain(), more("ReduceSum", TOKENS, keepdims=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_turned_to_the_same_numbers(name: str) -> None:
    model, x = network(*TURNED[name]), sample(2, T, 5, seed=3)
    before = run(model, x)[0]
    (stream,), refused = find_streams(model.graph)
    assert not refused
    assert stream.width == D
    turn(model.graph, stream, spreading(D, 1))
    after = run(model, x)[0]
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    assert_shapes(model, x)
    fresh = find_streams(network(*TURNED[name]).graph)[0][0]
    assert len(stream.readers) == len(fresh.readers)


def test_sums_and_pads_behind_a_norm_without_a_shift() -> None:
    x = sample(2, T, 5, seed=3)
    for behind in (
        more("ReduceSum", TOKENS, keepdims=0), more("Pad", np.array([0, 1, 0, 0, 0, 0])),
    ):  # fmt: skip
        model = network(behind=behind, shift=False)
        before = run(model, x)[0]
        (stream,), _ = find_streams(model.graph)
        turn(model.graph, stream, spreading(D, 2))
        np.testing.assert_allclose(run(model, x)[0], before, atol=2e-5 * np.abs(before).max())


def squared(g: SmallGraph, x: str) -> str:
    return g("Mul", x, x)


def mixed_tokens(g: SmallGraph, x: str) -> str:
    """A factor per token behind a linear over the tokens."""
    y = linear(g, g("Transpose", x, perm=[0, 2, 1]), T, T, 41)
    return g("Transpose", g("Mul", y, sample(T, seed=42)), perm=[0, 2, 1])


def scaled_beside(g: SmallGraph, x: str) -> str:
    """A factor per channel of a linear that something else, outside the stream, reads too."""
    return g("Add", g("Mul", x, sample(D, seed=35)), linear(g, g("Tanh", x), D, D, 36))


def wider(g: SmallGraph, x: str) -> str:
    return g("Concat", x, linear(g, "x", 5, 12, 40), axis=2)


def normed_again(g: SmallGraph, x: str) -> str:
    return g("Add", x, norm(g, x))


def joined(g: SmallGraph, x: str) -> str:
    return g("Concat", x, linear(g, "x", 5, D, 40), axis=1)


def second_norm(g: SmallGraph, x: str) -> str:
    return g("Concat", x, norm(g, linear(g, "x", 5, D, 40)), axis=1)


STAYS: list[tuple[Part, Part, dict[str, object], str]] = [
    (more("Relu"), chain(), {}, "(Relu) makes a part of it"),
    (squared, chain(), {}, "multiplies two tensors"),
    (chain(more("Identity"), more("Mul", sample(D, seed=2))), chain(), {},
     "multiplies each channel by another factor"),
    (more("Mul", sample(T, D, seed=2)), chain(), {}, "multiplies each channel by another factor"),
    (scaled_beside, chain(), {}, "multiplies each channel by another factor"),
    (more("Div", sample(D, seed=2)), chain(), {}, "multiplies each channel by another factor"),
    (more("Div", np.array(3.0), first=True), chain(), {}, "multiplies two tensors"),
    (normed_again, chain(), {}, "mixes channels with others"),
    (chain(), more("Relu"), {}, "(Relu) reads the norm"),
    (chain(), joined, {}, "with other data"),
    (chain(), second_norm, {}, "with other data"),
    (chain(), more("Add", sample(D)), {}, "(Add) reads the norm"),
    (chain(), more("Slice", np.array([0]), np.array([D]), np.array([2])), {}, "reads the norm"),
    (chain(), chain(), {"outputs": ("stream",)}, "is an output of the model"),
    (chain(), chain(), {"outputs": ("normed",)}, "', is an output"),
    (more("Slice", np.array([0]), np.array([4]), np.array([2])), chain(), {"width": 4},
     "the channels cannot be followed through"),
    (mixed_tokens, chain(), {}, "(Linear) makes a part of it"),
    (wider, chain(), {"width": 20}, "has 8 channels, others 20"),
    (more("Pad", np.array([0, 0, 0, 0, 0, 1])), chain(), {"width": 9}, "cannot be followed"),
]  # fmt: skip


@pytest.mark.parametrize(("between", "behind", "options", "reason"), STAYS,
                         ids=[s[3][:24] or str(i) for i, s in enumerate(STAYS)])  # fmt: skip
def test_stays(between: Part, behind: Part, options: dict[str, object], reason: str) -> None:
    model = network(between, behind, **options)  # type: ignore[arg-type]
    before = text(model)
    streams, refused = find_streams(model.graph)
    assert text(model) == before
    assert not streams
    assert any(reason in one.reason for one in refused), refused
    assert "LayerNormalization" not in refused[0].norm
