"""Factors per channel against a matrix: by what the outputs lose."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.equalization import stream_suffix
from ptq_onnx.equalization.rotation_choice import FACTORS, Codes, turn_streams
from ptq_onnx.equalization.stream_rows import sensitivities
from ptq_onnx.equalization.stream_suffix import part_behind
from ptq_onnx.equalization.stream_trial import (
    BATCHES,
    PARTS,
    Steps,
    StreamTrial,
    losses,
    outputs_of,
    refined,
    some_of,
)
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.ptf import Factors

D = 16


def network(small: float) -> ir.Model:
    """Patches, one channel of which is a thousand times as large → norm → head; γ of that channel
    is ``small``."""
    g = SmallGraph(("batch", 3, 8, 8))
    weight = sample(D, 3, 4, 4, seed=1)
    weight[5] *= 1000
    patches = g("Conv", "x", weight, sample(D, seed=2), strides=[4, 4])
    x = g("Transpose", g("Reshape", patches, np.array([0, D, 4])), perm=[0, 2, 1])
    x = g("Add", x, sample(1, 4, D, seed=3))
    scale = np.ones(D, np.float32)
    scale[5] = small
    n = g("LayerNormalization", x, scale, sample(D, seed=4), axis=-1)
    out = g("Add", g("MatMul", n, sample(D, 5, seed=6)), sample(5, seed=7))
    model = g.model(out)
    fuse(model)
    return model


def batches() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((4, 3, 8, 8)).astype(np.float32) for _ in range(4)]


def stream_of(model: ir.Model) -> str:
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    return str(norm.inputs[0].name)


def test_outputs_are_those_of_the_rounded_tensor() -> None:
    model = network(1.0)
    tapped = model.clone()
    name = stream_of(tapped)
    tapped.graph.outputs.append(next(v for n in tapped.graph for v in n.outputs if v.name == name))
    steps = Steps(np.linspace(1, 2, D).astype(np.float32), -8, 7)
    images = batches()[0]
    output, stream = run(tapped, images)
    rounded = np.clip(np.rint(stream / steps.step), -8, 7) * steps.step
    centred = rounded - rounded.mean(-1, keepdims=True)
    normed = centred / np.sqrt(rounded.var(-1, keepdims=True) + 1e-5) + sample(D, seed=4)
    expected = normed @ sample(D, 5, seed=6) + sample(5, seed=7)
    original = outputs_of(model, [images], 1)
    np.testing.assert_allclose(original[0][0], output, atol=1e-5)
    trial = StreamTrial(model, [name], [images], 1, original)
    found = trial.outputs({name: steps})
    np.testing.assert_allclose(found[0][0], expected, atol=1e-4 * np.abs(expected).max())
    lost = np.sum((expected - output) ** 2) / np.sum(output**2)
    assert trial.lost({name: steps}) == pytest.approx([lost], rel=1e-3)
    wider = trial.outputs({name: steps.times(2.0)})
    rounded = np.clip(np.rint(stream / steps.step / 2), -8, 7) * steps.step * 2
    centred = rounded - rounded.mean(-1, keepdims=True)
    normed = centred / np.sqrt(rounded.var(-1, keepdims=True) + 1e-5) + sample(D, seed=4)
    expected = normed @ sample(D, 5, seed=6) + sample(5, seed=7)
    np.testing.assert_allclose(wider[0][0], expected, atol=1e-4 * np.abs(expected).max())


def test_steps_are_refined_by_what_the_outputs_lose() -> None:
    """The best of all that is tried, and what is said of it is so."""
    model = network(1.0)
    name = stream_of(model)
    images = batches()[:2]
    trial = StreamTrial(model, [name], images, 1, outputs_of(model, images, 1))
    steps = {name: Steps(np.full(D, 0.5, np.float32), -4096, 4095)}
    found = refined(trial, steps)
    assert found.before == trial.lost(steps)[-1]
    assert found.after == trial.lost({name: steps[name].times(found.factors[name])})[-1]
    assert found.after < 0.6 * found.before
    eighths = 2.0 ** (np.arange(-4, 8) / 8)
    lost = {k: trial.lost({name: steps[name].times(k)})[-1] for k in eighths}
    best = min(lost, key=lambda k: lost[k])
    for k in best * 2.0 ** (np.array([-1, 1, 2]) / 4):
        lost[k] = trial.lost({name: steps[name].times(k)})[-1]
    assert lost[found.factors[name]] == found.after
    assert found.after <= min(lost.values()) / 0.98


def test_steps_without_hope_are_given_up() -> None:
    """What loses 3 % more on the first batches, or already as much as the best on all."""
    model = network(1.0)
    name = stream_of(model)
    images = batches()
    trial = StreamTrial(model, [name], images, 1, outputs_of(model, images, 1))
    steps = {name: Steps(np.full(D, 0.5, np.float32), -4096, 4095)}
    found = trial.lost(steps)
    assert found == sorted(found)
    assert len(found) == 4
    assert trial.lost(steps, [*found[:-1], found[-1] * 1.001]) == found
    assert trial.lost(steps, found) == [*found[:-1], np.inf]
    assert trial.lost(steps, [*found[:2], found[2] / 1.04, np.inf]) == [*found[:2], np.inf]
    assert trial.lost(steps, [*found[:2], found[2] / 1.02, np.inf]) == found
    assert trial.lost(steps, [1.0, 1.0, 1.0, found[0] / 2]) == [np.inf]


class Counted:
    """Outputs that lose the square of tensor a's step, 4 where it is not rounded; b costs nothing,
    and without c's rounding they lose more."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    def start_at(self, tensor: str, steps: Mapping[str, Steps]) -> None:
        assert tensor in steps

    def lost(self, steps: Mapping[str, Steps], best: Sequence[float] = ()) -> list[float]:
        fine = [name for name, one in steps.items() if one.step[0] == 2.0**-20]
        self.tried += fine
        found = 4 + float(steps["a"].step[0]) ** 2 * ("a" not in fine) + ("c" in fine)
        return [found if not best or found < best[-1] else np.inf]


def test_what_costs_nothing_is_passed_over() -> None:
    trial, one = Counted(), Steps(np.ones(1, np.float32), -8, 7)
    found = refined(trial, dict.fromkeys("abc", one))  # type: ignore[arg-type]
    assert trial.tried == ["c", "b", "a"]
    assert found.factors["b"] == found.factors["c"] == 2**-0.5
    assert found.factors["a"] == 2**-0.75
    assert (found.before, found.after) == (5.0, pytest.approx(4 + 2**-1.5))


class Wanted:
    """Outputs that lose 1 but for steps of tensors a and b times these factors; nothing where a is
    not rounded, and all where b is not."""

    def __init__(self, a: float, b: float) -> None:
        self.wanted = {"a": a, "b": b}

    def start_at(self, tensor: str, steps: Mapping[str, Steps]) -> None:
        assert tensor in steps

    def lost(self, steps: Mapping[str, Steps], best: Sequence[float] = ()) -> list[float]:
        found = {name: float(one.step[0]) for name, one in steps.items()}
        if 2.0**-20 in found.values():
            return [np.inf if found["b"] == 2.0**-20 else 0.0]
        return [1 - 0.5 * all(abs(found[n] / v - 1) < 1e-5 for n, v in self.wanted.items())]


@pytest.mark.parametrize("eighths", range(-5, 9))
def test_all_steps_are_tried_from_half_an_octave_down_to_one_up(eighths: int) -> None:
    factor, one = 2.0 ** (eighths / 8), Steps(np.ones(1, np.float32), -8, 7)
    found = refined(Wanted(factor, factor), dict.fromkeys("ab", one))  # type: ignore[arg-type]
    tried = -5 < eighths < 8
    assert found.after == (0.5 if tried else 1.0)
    assert list(found.factors.values()) == pytest.approx([factor if tried else 1.0] * 2)


@pytest.mark.parametrize("quarters", range(-2, 4))
def test_steps_of_one_tensor_are_tried_a_quarter_down_to_half_an_octave_up(quarters: int) -> None:
    factor, one = 2.0 ** (quarters / 4), Steps(np.ones(1, np.float32), -8, 7)
    found = refined(Wanted(factor, 1.0), dict.fromkeys("ab", one))  # type: ignore[arg-type]
    tried = -2 < quarters < 3
    assert found.after == (0.5 if tried else 1.0)
    assert found.factors == pytest.approx({"a": factor if tried else 1.0, "b": 1.0})


def test_unrounded_steps_lose_nothing() -> None:
    model = network(1.0)
    name = stream_of(model)
    images = batches()[:1]
    trial = StreamTrial(model, [name], images, 1, outputs_of(model, images, 1))
    assert trial.lost({name: Steps.unrounded()})[-1] < 1e-11


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 16, 31, 100])
def test_a_trial_takes_batches_from_everywhere(count: int) -> None:
    found = some_of(range(count))
    assert len(found) == min(BATCHES, count) == min(4, count)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] >= count * (1 - 1 / BATCHES) - 1
    assert np.diff(found).max(initial=0) <= -(-count // 2)


def test_the_loss_of_several_outputs_is_added() -> None:
    original = [[np.ones((2, 3), np.float32), np.full((2, 2), 2.0, np.float32)]] * 2
    rounded = [[np.full((2, 3), 1.5, np.float32), np.full((2, 2), 3.0, np.float32)]] * 2
    assert list(losses(rounded, original)) == pytest.approx([0.125 + 0.125, 0.25 + 0.25])
    classes = [[np.array([1, 2])]]
    assert list(losses(classes, classes)) == [0]


def test_codes_of_a_range_and_of_factors() -> None:
    whole = Steps.of_range(-1.0, 3.0, 5)
    assert (whole.step.tolist(), whole.lowest, whole.highest) == ([1.0], -1.0, 3.0)
    found = Factors(0.5, 100, np.array([0, 3], np.int32), 0.0)
    each = Steps.of_factors(found, 256)
    assert (each.step.tolist(), each.lowest, each.highest) == ([0.5, 4.0], -100, 155)


def test_factors_where_the_massive_channel_is_not_read() -> None:
    model = network(1e-3)
    name = stream_of(model)
    codes = Codes(256, symmetric=False, factors=True)
    found = turn_streams(model, batches(), codes, threads=1)
    assert found.matrices == (None,)
    assert [one.by for one in found.turned] == [FACTORS]
    assert found.turned[0].stream_db > 10
    assert list(found.factors) == [name]
    assert found.factors[name].alpha.argmax() == 5
    plain = turn_streams(network(1e-3), batches(), Codes(256, symmetric=False), threads=1)
    assert plain.factors == {}
    assert plain.turned[0].by != FACTORS


def test_a_stream_that_stays_has_no_steps_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a matrix or factors its ranges are those of calibration: nothing is tried."""
    monkeypatch.setattr("ptq_onnx.equalization.rotation_choice.SEEDS", 0)  # no matrix is tried
    found = turn_streams(network(1.0), batches(), Codes(16, symmetric=False), threads=1)
    (one,) = found.turned
    assert (one.by, one.refined_db) == ("none", 0.0)
    assert (found.matrices, found.ranges, found.factors) == ((None,), {}, {})


def test_a_channel_counts_by_what_reads_it() -> None:
    model = network(0.5)
    (stream,), _ = find_streams(model.graph)
    expected = (sample(D, 5, seed=6).astype(np.float64) ** 2).sum(axis=1)
    expected[5] *= 0.25
    (found,) = sensitivities(stream).values()
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-5)


# --- runs that begin at a tensor ---------------------------------------------------------------


def tokens(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.standard_normal((2, TOKENS, WIDTH)).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def deep() -> tuple[ir.Model, dict[str, Steps]]:
    """Three blocks, and steps for all that their norms read but for the input."""
    model = transformer(Choices(), blocks=3)
    read = [n.inputs[0] for n in model.graph if n.op_type == "LayerNormalization"]
    names = [str(v.name) for v in read if v is not None and v.producer() is not None]
    return model, {name: Steps(np.array([0.2], np.float32), -64, 63) for name in names}


def trial_of(model: ir.Model, steps: Mapping[str, Steps]) -> StreamTrial:
    batches = tokens(3)
    return StreamTrial(model, steps, batches, 1, outputs_of(model, batches, 1))


@pytest.mark.parametrize("held", [2**28, 1])
def test_a_run_from_a_tensor_on_gives_what_the_whole_gives(
    deep: tuple[ir.Model, dict[str, Steps]], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whether all is kept at once or each tensor's own."""
    monkeypatch.setattr(stream_suffix, "HELD", held)
    model, steps = deep
    whole, part = trial_of(model, steps), trial_of(model, steps)
    assert len(steps) == 6
    for name in reversed(steps):
        part.start_at(name, steps)
        assert part._behind is not None
        read = {value.name for value in part._behind[0].get_inputs()}
        later = list(steps)[list(steps).index(name) :]
        assert read == {name, *(f"{n}_{end}" for n in later for end in PARTS)}
        changed = {**steps, name: steps[name].times(1.7)}
        for one, other in zip(part.outputs(changed), whole.outputs(changed), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
        assert part.lost(changed) == whole.lost(changed) != whole.lost(steps)
        assert set(part._kept) == (set(list(steps)[: -len(later)]) if held > 1 else set())


def test_what_was_kept_is_run_again_where_steps_before_changed(
    deep: tuple[ir.Model, dict[str, Steps]],
) -> None:
    model, steps = deep
    whole, part = trial_of(model, steps), trial_of(model, steps)
    first, *_, last = steps
    part.start_at(last, steps)
    coarse = {**steps, first: steps[first].times(3.0)}
    part.start_at(list(steps)[-2], coarse)
    assert part.lost(coarse) == whole.lost(coarse) != whole.lost(steps)


def test_steps_are_refined_alike_from_each_tensor_on(
    deep: tuple[ir.Model, dict[str, Steps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = deep
    found = refined(trial_of(model, steps), steps)
    assert len(set(found.factors.values())) > 1
    assert found.after < found.before
    assert refined(trial_of(model, steps), steps, trial_of(model, steps).lost(steps)) == found
    monkeypatch.setattr(StreamTrial, "start_at", lambda *_: None)
    assert refined(trial_of(model, steps), steps) == found


def test_a_part_that_cannot_be_run_by_itself_is_not_cut_out() -> None:
    g = SmallGraph(("batch", 4, 8))
    a = g("Relu", "x")
    b = g("Sigmoid", a)
    model = g.model(g("Add", b, g("Tanh", a)), g("Neg", a))
    assert part_behind(model, b, frozenset()) is None  # an output does not depend on it
    assert part_behind(model, "no such tensor", frozenset()) is None
    g = SmallGraph(("batch", 4, 8))
    b = g("Sigmoid", g("Relu", "x"))
    model = g.model(g("Add", b, "x"))
    assert part_behind(model, b, frozenset()) is None  # the input is read again
    found = part_behind(model, b, frozenset({"x"}))
    assert found is not None
    assert [v.name for v in found.graph.inputs] == [b, "x"]
    assert [n.op_type for n in found.graph] == ["Add"]
    assert len(list(model.graph)) == 3
    g = SmallGraph(("batch", 4, 8))
    a = g("Relu", "x")
    b, c = g("Sigmoid", a), g("Tanh", a)
    found = part_behind(g.model(g("Add", g("Neg", b), c)), b, frozenset())
    assert found is not None
    assert [v.name for v in found.graph.inputs] == [b, c]


def test_a_loss_takes_no_more_batches_than_it_is_asked_for() -> None:
    original = [[np.ones((1, 2), np.float32)]] * 4
    taken: list[int] = []

    def runs() -> Iterator[list[np.ndarray]]:
        for number in range(4):
            taken.append(number)
            yield [np.full((1, 2), 2.0, np.float32)]

    assert list(losses(runs(), original)) == [0.25, 0.5, 0.75, 1.0]
    taken.clear()
    assert next(losses(runs(), original)) == 0.25
    assert taken == [0]


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 2.0), (-4.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("levels", [4, 256])
def test_codes_of_a_range(low: float, high: float, levels: int) -> None:
    """As many as there are levels, from one end to the other, zero among them."""
    one = Steps.of_range(low, high, levels)
    step = float(one.step[0])
    assert step == pytest.approx(max((high - low) / (levels - 1), 1e-30))
    assert one.highest - one.lowest == levels - 1
    assert one.lowest * step == pytest.approx(low, abs=step / 2)
    assert one.lowest == round(one.lowest)


def test_codes_of_factors() -> None:
    found = Steps.of_factors(Factors(0.5, 3, np.array([0, 1, 4], np.int32), 0.0), 16)
    assert found.step.tolist() == [0.5, 1.0, 8.0]
    assert (found.lowest, found.highest) == (-3, 12)
