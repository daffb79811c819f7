"""Where the codes of an activation with an upper bound make it superfluous, and what 16 bits leave
out of a file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from test_known_lowering import activation

from ptq_onnx.graph.bounded import bound_of, set_bound
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.numerics.around.run_time import RunTimeRange
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.half import to_float16
from ptq_onnx.qdq.lowering import lower, release_bounds

BOUND = 4.0


def ending_at(name: str, top: float) -> TensorSpec:
    """Codes 0 … 255 of 0 … ``top``."""
    return replace(activation(name, scale=top / 255, zero=0), clip=(0.0, top))


def bounded(readers: tuple[str, ...] = ("Neg",), shown: bool = False) -> tuple[ir.Model, ir.Node]:
    """x → Relu up to 4 → each of the readers."""
    g = SmallGraph((2, 8))
    made = g("Relu", "x")
    outputs = [g("Neg", g(op, made)) if op == "Identity" else g(op, made) for op in readers]
    model = g.model(*outputs, *([made] if shown else []))
    (node,) = [n for n in model.graph if n.op_type == "Relu"]
    set_bound(node, BOUND)
    return model, node


@pytest.mark.parametrize(
    ("top", "kept"),
    [(BOUND, False), (3.0, False), (BOUND * (1 + 9e-6), False), (BOUND * (1 + 3e-5), True),
     (5.0, True), (8.0, True), (None, True)],
)  # fmt: skip
def test_codes_that_end_at_the_bound_are_it(top: float | None, kept: bool) -> None:
    """One part of 100,000 more is rounding."""
    model, node = bounded()
    specs = {} if top is None else {"relu0": ending_at("relu0", top)}
    release_bounds(model.graph, specs)
    assert bound_of(node) == (BOUND if kept else None)


def test_an_output_keeps_its_bound() -> None:
    model, node = bounded(shown=True)
    release_bounds(model.graph, {"relu0": ending_at("relu0", BOUND)})
    assert bound_of(node) == BOUND


@pytest.mark.parametrize(
    ("readers", "coded", "kept"),
    [
        (("Identity",), (1,), False),
        (("Identity", "Identity"), (1, 3), False),
        (("Identity", "Identity"), (1,), True),
        (("Identity", "Identity"), (3,), True),
        (("Identity", "Exp"), (1,), True),
        (("Exp", "Identity"), (2,), True),
    ],
)
def test_copies_stand_for_what_they_copy(
    readers: tuple[str, ...], coded: tuple[int, ...], kept: bool
) -> None:
    """All of them, and nothing beside them."""
    model, node = bounded(readers)
    names = {f"identity{place}" for place in coded}
    assert names <= {v.name for n in model.graph for v in n.outputs}
    release_bounds(model.graph, {name: ending_at(name, BOUND) for name in names})
    assert bound_of(node) == (BOUND if kept else None)


def test_a_bound_of_one_activation_is_no_other_s() -> None:
    """Those before and behind it in the graph have their own answers."""
    g = SmallGraph((2, 8))
    first = g("Relu", g("Neg", "x"))
    second = g("Relu", g("Neg", first))
    model = g.model(g("Neg", second))
    nodes = [n for n in model.graph if n.op_type == "Relu"]
    for node in nodes:
        set_bound(node, BOUND)
    release_bounds(model.graph, {second: ending_at(second, BOUND)})
    assert [bound_of(n) for n in nodes] == [BOUND, None]
    lowered = lower(model, {second: ending_at(second, BOUND)})
    assert [bound_of(n) for n in lowered.graph if n.op_type == "Relu"] == [BOUND, None]


def test_codes_of_a_range_at_run_time_bound_nothing() -> None:
    """Their ends are those of each run's values, in parts of the largest."""
    model, node = bounded()
    spec = ending_at("relu0", 1.0)
    rule = replace(spec.rule, around=(RunTimeRange(),))
    release_bounds(model.graph, {"relu0": replace(spec, rule=rule)})
    assert bound_of(node) == BOUND


def test_constants_that_nothing_reads_are_left_out_of_a_file_of_16_bits() -> None:
    """One that is an output stays, as it was."""
    g = SmallGraph((2, 8))
    g.const(sample(3), "unread")
    g.const(sample(5), "given")
    model = g.model(g("Add", "x", g.const(sample(8), "read")))
    model.graph.outputs.append(model.graph.initializers["given"])
    halves = to_float16(model)
    assert set(halves.graph.initializers) == {"read", "given"}
    assert halves.graph.initializers["read"].dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(halves.graph.initializers["given"].const_value, sample(5))
    assert set(model.graph.initializers) == {"read", "given", "unread"}


@pytest.mark.parametrize("op", ["RMSNormalization", "L2Normalization"])
def test_a_norm_of_squares_that_is_an_output_among_others(op: str) -> None:
    """Each output keeps its place, its name and its numbers."""
    g = SmallGraph((2, 8))
    gamma = [g.const(1 + 0.1 * sample(8, seed=3), "gamma")] if op == "RMSNormalization" else []
    norm = g(op, "x", *gamma, domain="ptq_onnx", epsilon=1e-6)
    model = g.model(g("Mul", norm, 2.0), norm, g("Add", norm, 1.0))
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([2, 8])
    x = sample(2, 8, seed=5)
    expected, names = run(to_standard(model), x), [v.name for v in model.graph.outputs]
    halves = to_float16(model)
    assert [v.name for v in halves.graph.outputs] == names
    for found, wanted in zip(run(halves, x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
