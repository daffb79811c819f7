"""If nodes: those that shapes or constants decide are inlined, in any nesting and order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_graph import SmallGraph, ops, run, sample

from ptq_onnx.errors import ModelError
from ptq_onnx.preparation.model_files import clean, load

SHAPE = ("batch", 3, 8, 8)


def branch(
    *nodes: onnx.NodeProto,
    result: str,
    dtype: int = 1,
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.GraphProto:
    """A branch with one output; ``constants`` are initializers of its own."""
    output = helper.make_tensor_value_info(result, dtype, None)
    tensors = [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    return helper.make_graph(list(nodes), "branch", [], [output], tensors)


def unary(op: str, source: str = "x", result: str = "y") -> onnx.GraphProto:
    return branch(helper.make_node(op, [source], [result]), result=result)


def cleaned(g: SmallGraph, output: str, tmp_path: Path) -> list[str]:
    """The ops that are left, and the same numbers as before, at two batch sizes."""
    g.output_shape = g.output_shape or SHAPE
    path = g.save(tmp_path / "model.onnx", output)
    model = load(path)
    report = clean(model)
    assert any("If nodes inlined" in note for note in report.notes)
    assert model.graph.outputs[0].name == output
    for batch in (1, 3):
        x = sample(batch, 3, 8, 8)
        np.testing.assert_allclose(run(model, x)[0], run(path, x)[0], rtol=1e-5, atol=1e-6)
    return ops(model)


def refused(g: SmallGraph, output: str, tmp_path: Path) -> str:
    g.output_shape = SHAPE
    model = load(g.save(tmp_path / "model.onnx", output))
    with pytest.raises(ModelError) as caught:
        clean(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def tile(g: SmallGraph) -> str:
    """TorchScript's ``torch.tile``: one If brings the repeats, one the tensor to one rank; then a
    third one decides by the shape of what they give."""
    batch = g("Unsqueeze", g("Gather", g("Shape", "x"), np.array(0), axis=0), np.array([0]))
    ones = np.array([1, 1])
    repeats = g("Concat", batch, ones, axis=0)
    missing = g("Sub", np.array(3), g("Size", repeats))
    longer = branch(
        helper.make_node("Reshape", [missing, "flat"], ["n"]),
        helper.make_node("Expand", ["flat", "n"], ["more"]),
        helper.make_node("Concat", ["more", repeats], ["r"], axis=0),
        result="r",
        dtype=7,
        constants={"flat": np.array([1])},
    )
    same = branch(helper.make_node("Identity", [repeats], ["r"]), result="r", dtype=7)
    first = g("If", g("Greater", missing, np.array(0)), then_branch=longer, else_branch=same)
    table = g.const(sample(1, 5, 192), "table")
    wider = branch(
        helper.make_node("Abs", [missing], ["n"]),
        helper.make_node("Reshape", ["n", "flat"], ["m"]),
        helper.make_node("Expand", ["flat", "m"], ["more"]),
        helper.make_node("Concat", ["more", "shape"], ["s"], axis=0),
        helper.make_node("Reshape", [table, "s"], ["t"]),
        result="t",
        constants={"flat": np.array([1]), "shape": np.array([1, 5, 192])},
    )
    kept = branch(helper.make_node("Identity", [table], ["t"]), result="t")
    second = g("If", g("Less", missing, np.array(0)), then_branch=wider, else_branch=kept)
    return g("Tile", second, g("Cast", first, to=TensorProto.INT64))


def test_tile_of_torchscript(tmp_path: Path) -> None:
    """The second condition reads what the first one does; as a real SVTRv2 has it."""
    g = SmallGraph(SHAPE)
    tiled = tile(g)
    rows = g("Gather", g("Shape", tiled), np.array(1), axis=0)
    third = g("If", g("Equal", rows, np.array(5)),
              then_branch=unary("Relu", tiled), else_branch=unary("Neg", tiled))  # fmt: skip
    pooled = g("Reshape", "x", np.array([0, 1, 192]))
    g.output_shape = ("batch", 5, 192)
    assert "If" not in (left := cleaned(g, g("Add", third, pooled), tmp_path))
    assert ("Relu" in left, "Neg" in left) == (True, False)


def test_branches_within_branches(tmp_path: Path) -> None:
    """The inner one is decided by the size of what the outer one makes; names occur twice."""
    g = SmallGraph(SHAPE)
    inner = helper.make_node(
        "If", ["small"], ["z"], "/inner",
        then_branch=unary("Neg", "y", "w"), else_branch=unary("Exp", "y", "w"),
    )  # fmt: skip
    outer = branch(
        helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1]),
        helper.make_node("Shape", ["y"], ["s"]),
        helper.make_node("Gather", ["s", "last"], ["d"], axis=0),
        helper.make_node("Less", ["d", "four"], ["small"]),
        inner,
        result="z",
        constants={"last": np.array(3), "four": np.array(4)},
    )
    rank = g("Size", g("Shape", "x"))
    y = g("If", g("Equal", rank, np.array(4)), then_branch=outer, else_branch=unary("Exp"))
    again = g("If", g("Not", g("Equal", rank, np.array(4))),
              then_branch=unary("Exp", y, "y"), else_branch=unary("Abs", y, "y"))  # fmt: skip
    g.output_shape = ("batch", 8, 8, 3)
    assert cleaned(g, again, tmp_path) == ["Abs", "Neg", "Transpose"]


YES, NO = np.array(True), np.array(False)


def batch(g: SmallGraph) -> str:
    return g("Gather", g("Shape", "x"), np.array(0))


CONSTANTS = {
    "initializer": lambda g: g.const(YES),
    "identity": lambda g: g("Identity", g("Identity", YES)),
    "not": lambda g: g("Not", g("Not", g("Identity", YES))),
    "cast": lambda g: g("Cast", g("Identity", np.array(3)), to=TensorProto.BOOL),
    "logic": lambda g: g("And", g("Or", NO, YES), g("Xor", YES, NO)),
    "batch": lambda g: g("Greater", g("Mul", batch(g), np.array(9)), np.array(1)),
    "at least": lambda g: g("GreaterOrEqual", batch(g), np.array(1)),
    "never": lambda g: g("Not", g("LessOrEqual", g("Size", "x"), np.array(0))),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_conditions(name: str, tmp_path: Path) -> None:
    """What is true for every batch size decides; the wrong branch may hold a loop."""
    g = SmallGraph(SHAPE)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("go", 9))]
        + [helper.make_tensor_value_info("v", 1, None)],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("w", 1, None)],
    )
    loop = branch(helper.make_node("Loop", ["", "go", "x"], ["y"], body=body), result="y",
                  constants={"go": np.array(False)})  # fmt: skip
    y = g("If", CONSTANTS[name](g), then_branch=unary("Relu"), else_branch=loop)
    assert cleaned(g, y, tmp_path) == ["Relu"]


def test_branches_that_agree(tmp_path: Path) -> None:
    """Both hand on the same tensor: no condition matters."""
    g = SmallGraph(SHAPE)
    x = g("Relu", "x")
    y = g("If", g("Greater", g("ReduceMax", "x", keepdims=0), 0.5),
          then_branch=unary("Identity", x), else_branch=unary("Identity", x))  # fmt: skip
    assert cleaned(g, g("Neg", y), tmp_path) == ["Neg", "Relu"]


def test_what_is_refused(tmp_path: Path) -> None:
    """One line names the If, and what its condition depends on."""
    g = SmallGraph(SHAPE)
    y = g("If", g("Greater", g("ReduceMax", "x", keepdims=0), 0.5),
          then_branch=unary("Relu"), else_branch=unary("Neg"))  # fmt: skip
    assert f"'/{y}': If" in (text := refused(g, y, tmp_path))
    assert "its condition depends on the values of the input 'x'" in text

    g = SmallGraph(SHAPE)
    y = g("If", g("Greater", g("Gather", g("Shape", "x"), np.array(0)), np.array(1)),
          then_branch=unary("Relu"), else_branch=unary("Neg"))  # fmt: skip
    assert "depends on the size of the dynamic axis 'batch' of the input" in refused(g, y, tmp_path)

    g = SmallGraph(SHAPE)
    found = g("Gather", g("Shape", g("NonZero", "x")), np.array(1))
    y = g("If", g("Equal", found, np.array(7)),
          then_branch=unary("Relu"), else_branch=unary("Neg"))  # fmt: skip
    assert "depends on the shape of 'nonzero0', which is not known" in refused(g, y, tmp_path)


def test_a_loop_is_refused_when_loaded(tmp_path: Path) -> None:
    g = SmallGraph(SHAPE)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("go", 9))]
        + [helper.make_tensor_value_info("v", 1, None)],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("w", 1, None)],
    )
    y = g("Loop", np.array(3), np.array(True), "x", body=body)
    g.output_shape = SHAPE
    with pytest.raises(ModelError, match=f"'/{y}': Loop is control flow"):
        load(g.save(tmp_path / "model.onnx", y))
