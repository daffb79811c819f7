"""What every code owes: its nodes compute what its arithmetic says, and it rounds to the nearest.

A new code in ``CODES`` is taken up by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from small_graph import SmallGraph

from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.network import open_with_fp8
from ptq_onnx.numerics.codes.by_name import CODES, code_named
from ptq_onnx.numerics.codes.code import Code, Numbers, Storage
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.qdq.nodes import Behind, Nodes

Array = NDArray[Any]
BOUNDS = ((-3.0, 5.0), (-0.2, 4.0), (0.0, 1.0), (-1e-3, 2e-3), (-40.0, 0.0), (0.0, 0.0))


def numbers_of(code: Code, bits: int, signed: bool, bounds: tuple[float, float]) -> Numbers:
    low, high = (np.array([edge], np.float32) for edge in bounds)
    found = code.solve(low, high, bits, signed, signed)
    stored: Storage = "uint8" if bits <= 8 else "uint16"
    return Numbers(bits, signed, found.scale[0], found.zero_point[0], found.details, stored)


def cases() -> Iterator[tuple[Code, Numbers]]:
    for code in CODES:
        wide = [bits for bits in (12, 16) if bits <= code.widest]
        for bits in (8,) if code.floating else (8, 6, 4, 3, *wide):
            for signed in (True, False):
                for bounds in BOUNDS[: 1 if code.fixed else 2 if bits in wide else None]:
                    yield code, numbers_of(code, bits, signed, bounds)


CASES = list(cases())
NAMES = [f"{c.name} {n.bits} {n.signed} {float(n.scale):.2g}" for c, n in CASES]


def levels(code: Code, numbers: Numbers) -> Array:
    """Every value, ascending, float64."""
    low, high = (0, 255) if code.floating else code.limits(numbers.bits, numbers.signed)
    found = code.values(np.arange(low, high + 1, dtype=np.int32), numbers).astype(np.float64)
    return np.unique(found[np.isfinite(found)])


def data(code: Code, numbers: Numbers) -> Array:
    """[rows, 64]: zero, every level, half way to the next, tiny, huge, and a constant row."""
    grid = levels(code, numbers)
    ties = (grid[1:] + grid[:-1]) / 2
    if isinstance(code, Logarithmic):  # float32 decides which of two is as near: see its own test
        ties = ties[:0]
    span = np.abs(grid).max()
    random = np.random.default_rng(0).normal(size=512) * span
    x = np.concatenate(
        [[0.0, -0.0], grid, ties, random, random * 1e-3, [1e-30, -1e-30, 1e30, -1e30, 3e38]]
    ).astype(np.float32)
    x = np.pad(x, (0, -len(x) % 64)).reshape(-1, 64)
    x = np.concatenate([x, np.full((1, 64), np.float32(0.3 * span))])
    return np.minimum(np.abs(x), 1) if code == Log2() else x  # of attention maps alone


def run_emitted(code: Code, numbers: Numbers, x: Array, optimise: bool = True) -> list[Array]:
    """Codes and values by ONNX Runtime; the values are read through another op."""
    small = SmallGraph(x.shape, opset=21)
    model = small.model(small("Identity", "x"))
    graph = model.graph
    source = graph.outputs[0]
    nodes = Nodes(graph, names={str(source.name), "x"})
    out = code.emit(Behind(nodes, source, source.producer()), source, numbers)
    graph.outputs[0] = out
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = open_with_fp8(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return [np.asarray(v) for v in opened.run(None, {"x": x})]


@pytest.mark.parametrize(("code", "numbers"), CASES, ids=NAMES)
def test_the_nodes_compute_the_same(code: Code, numbers: Numbers) -> None:
    x = data(code, numbers)
    with np.errstate(over="ignore"):
        expected = code.values(code.codes(x, numbers), numbers)
    (found,) = run_emitted(code, numbers, x)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("code", "numbers"), CASES, ids=NAMES)
def test_values_are_the_nearest(code: Code, numbers: Numbers) -> None:
    """In float64, but for what float32 cannot tell apart; beyond the last level that one."""
    x = data(code, numbers)
    codes = code.codes(x, numbers)
    found = code.values(codes, numbers).astype(np.float64)
    grid, real = levels(code, numbers), x.astype(np.float64)
    low, high = code.reach(numbers)
    assert (grid[0], grid[-1]) == pytest.approx((float(np.min(low)), float(np.max(high))))
    if code == Log2():  # half way is meant on 1/x
        assert set(np.unique(found)) <= set(grid)
        return
    place = np.clip(np.searchsorted(grid, real), 1, len(grid) - 1)
    nearest = np.minimum(np.abs(real - grid[place - 1]), np.abs(real - grid[place]))
    slack = 1e-6 * np.abs(real) + 1e-37
    assert (np.abs(real - found) <= nearest + slack).all()
    outside = code.clipped(x, numbers)
    half = np.diff(grid).max() / 2 * (1 + 1e-4) + 1e-37 + np.abs(real) * 2.0**-22
    assert (np.abs(real - found) <= half)[~outside].all()
    assert outside[real > 2 * np.abs(grid).max() + 1e-30].all()


@pytest.mark.parametrize(("code", "numbers"), CASES, ids=NAMES)
def test_zero_is_exact_and_codes_are_within_their_limits(code: Code, numbers: Numbers) -> None:
    zeros = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(code.values(code.codes(zeros, numbers), numbers), 0)
    codes = code.codes(data(code, numbers), numbers)
    low, high = (0, 255) if code.floating else code.limits(numbers.bits, numbers.signed)
    assert low <= codes.min() <= codes.max() <= high
    assert code.codes(np.zeros((0, 4), np.float32), numbers).shape == (0, 4)
    assert code.misfit(numbers) is None


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.name)
@given(data=st.data())
@settings(max_examples=60)
def test_rounding_twice_is_rounding_once(code: Code, data: st.DataObject) -> None:
    finite = st.floats(-(2.0**100), 2.0**100, width=32)
    bits = 8 if code.floating else data.draw(st.integers(3, code.widest))
    low, high = sorted(data.draw(st.tuples(finite, finite)))
    numbers = numbers_of(code, bits, data.draw(st.booleans()), (low, high))
    inside = st.floats(0, 1, width=32) if code == Log2() else finite
    x = data.draw(npst.arrays(np.float32, npst.array_shapes(max_dims=3), elements=inside))
    with np.errstate(over="ignore"):
        codes = code.codes(x, numbers)
        values = code.values(codes, numbers)
        again = code.codes(values, numbers)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(code.values(again, numbers), values)


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.name)
def test_a_constant_and_an_all_zero_tensor(code: Code) -> None:
    for value in (0.0, 0.25, 1e-20, 1e20):
        numbers = numbers_of(code, 8, False, (min(value, 0.0), value))
        x = np.full((3, 4), value, np.float32)
        x = np.minimum(x, 1) if code == Log2() else x
        found = code.values(code.codes(x, numbers), numbers)
        assert np.isfinite(found).all()
        assert len(np.unique(found)) == 1


def test_names_are_the_report_s_and_no_other() -> None:
    assert [code_named(code.name) for code in CODES] == list(CODES)
    assert len({code.name for code in CODES}) == len(CODES)
    with pytest.raises(ValueError, match="no codes 'log3'"):
        code_named("log3")


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.name)
def test_weights_are_held_or_refused(code: Code) -> None:
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    if type(code).weight_scale is Code.weight_scale:
        with pytest.raises(ConfigError, match=f"^Codes '{code.name}' hold no weights.$"):
            code.weight_scale(weight, 1, 8)
        with pytest.raises(ConfigError, match="hold no weights"):
            code.stored(np.zeros(2, np.int32), "int8", True)
        return
    scale = code.weight_scale(weight, 1, 8)
    numbers = Numbers(8, True, scale, np.zeros(4, np.int32))
    held = code.values(code.codes(weight, numbers), numbers)
    assert np.abs(held - weight).max() <= 0.07
    assert code.stored(code.codes(weight, numbers), "int8", True).dtype.itemsize == 1


@pytest.mark.parametrize(("code", "numbers"), CASES, ids=NAMES)
def test_a_table_is_recognised_by_its_code_alone(code: Code, numbers: Numbers) -> None:
    """What the checker knows it by; a table of anything else is no code's."""
    small = SmallGraph((2, 3), opset=21)
    model = small.model(small("Identity", "x"))
    source = model.graph.outputs[0]
    code.emit(Behind(Nodes(model.graph), source, source.producer()), source, numbers)
    for node in model.graph:
        if node.op_type == "Gather":
            table = node.inputs[0].const_value.numpy()  # type: ignore[union-attr]
            assert code.recognise(table)
            assert not any(c.recognise(table + np.float32(0.3)) for c in CODES)
            bent = table * np.linspace(1, 2, len(table), dtype=np.float32)
            assert not any(c.recognise(bent) for c in CODES)


def test_the_stated_type_of_codes_is_written() -> None:
    """Signed codes are stored 128 higher in uint8, as they are in int8."""
    numbers = numbers_of(code_named("uniform"), 8, True, (-1.0, 1.0))
    for stored in ("uint8", "int8"):
        small = SmallGraph((2, 3), opset=21)
        model = small.model(small("Identity", "x"))
        source = model.graph.outputs[0]
        code_named("uniform").emit(
            Behind(Nodes(model.graph), source, source.producer()),
            source,
            replace(numbers, stored=stored),  # type: ignore[arg-type]
        )
        (quantize,) = [n for n in model.graph if n.op_type == "QuantizeLinear"]
        zero = quantize.inputs[2].const_value.numpy()  # type: ignore[union-attr]
        assert (zero.dtype.name, int(zero)) == (stored, 128 if stored == "uint8" else 0)
