"""Files whose nodes are not in order, as onnxruntime's float16 converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graph import SmallGraph, run, sample

from ptq_onnx.errors import ModelError
from ptq_onnx.graph.ordering import sort_nodes
from ptq_onnx.preparation.model_files import clean, load, outline

CASE = Path(__file__).resolve().parents[3] / "shared/cases/fp16_converter.onnx"


def half() -> onnx.ModelProto:
    """A graph whose input Cast stands last, with a branch that reads it too."""
    g = SmallGraph((2, 3, 8, 8))
    f = g("Cast", "x", to=10)
    branch = [
        helper.make_graph([helper.make_node(op, [f], ["y"])], op, [],
                          [helper.make_tensor_value_info("y", 10, [2, 3, 8, 8])])
        for op in ("Neg", "Exp")
    ]  # fmt: skip
    y = g("If", np.array(True), then_branch=branch[0], else_branch=branch[1])
    out = g("Cast", g("Relu", y), to=1)
    proto = g.proto(out)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[1:], nodes[0]])
    return proto


def test_a_cast_at_the_end_is_sorted(tmp_path: Path) -> None:
    proto = half()
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    model = load(path)
    assert [n.op_type for n in outline(path).graph] == ["Cast", "If", "Relu", "Cast"]
    clean(model)
    x = sample(2, 3, 8, 8)
    np.testing.assert_allclose(run(model, x)[0], np.maximum(-x, 0), rtol=1e-3, atol=1e-3)


def test_what_is_in_order_stays(tmp_path: Path) -> None:
    proto = half()
    assert sort_nodes(proto.graph)
    again = proto.SerializeToString()
    assert not sort_nodes(proto.graph)
    assert proto.SerializeToString() == again


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    g = SmallGraph((2, 3, 8, 8))
    out = g("Add", g("Relu", "x"), "x")
    proto = g.proto(out)
    proto.graph.node[0].input[0] = out
    assert not sort_nodes(proto.graph)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="topologically sorted"):
        load(tmp_path / "model.onnx")


@pytest.mark.skipif(not CASE.is_file(), reason="needs ../shared/cases")
def test_the_case() -> None:
    model = load(CASE)
    assert any(n.op_type == "Cast" and n.inputs[0] in model.graph.inputs for n in model.graph)
    assert clean(model).notes == ("converted float16 to float32",)
