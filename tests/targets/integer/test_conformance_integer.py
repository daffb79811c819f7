"""The rules of the target integer on a good file and on broken ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from prepared_models import DIGITS, prepared, quantized

from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.targets.integer.builder import RANGE_KEY
from ptq_onnx.targets.integer.lowering import lower_integer
from ptq_onnx.targets.integer.ranges import integer_ranges
from ptq_onnx.targets.integer.rules import (
    RULES,
    facts,
    histogram,
    no_float_inside,
    violations,
    widest,
)


@pytest.fixture(scope="module")
def file() -> ir.Model:
    return lower_integer(prepared(DIGITS).model, quantized(target="integer").specs)


def node_of(model: ir.Model, op_type: str, index: int = 0) -> ir.Node:
    return [n for n in model.graph if n.op_type == op_type][index]


def behind(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Put a chain of nodes behind a value, before its readers."""
    uses = [(use.node, use.idx) for use in value.uses() if use.node is not nodes[0]]
    model.graph.insert_after(value.producer(), nodes)  # type: ignore[arg-type]
    for node, index in uses:
        node.replace_input_with(index, nodes[-1].outputs[0])


def named(node: ir.Node, name: str) -> ir.Node:
    node.name = name
    node.outputs[0].name = f"{name}_out"
    return node


def rules(model: ir.Model) -> set[tuple[str, str]]:
    return {(found.rule, found.node) for found in violations(model)}


def test_a_file_of_the_exporter_has_none(file: ir.Model) -> None:
    assert violations(file) == []


def test_rules_take_a_model_inside_something(file: ir.Model) -> None:
    @dataclass
    class Holder:
        model: ir.Model

    assert [list(rule(Holder(file))) for rule in RULES] == [[], [], []]


def test_a_float_op_inside_is_found(file: ir.Model) -> None:
    model = file.clone()
    value = node_of(model, "ReduceMax").outputs[0]
    to = named(ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}), "to_float")
    root = named(ir.node("Sqrt", [to.outputs[0]]), "sqrt")
    back = named(ir.node("Cast", [root.outputs[0]], {"to": int(ir.DataType.UINT8)}), "back")
    behind(model, value, [to, root, back])
    found = rules(model)
    assert {("no-float-inside", name) for name in ("to_float", "sqrt", "back")} <= found


def test_a_second_dequantization_inside_is_found(file: ir.Model) -> None:
    model = file.clone()
    node = node_of(model, "Transpose")
    value = node.outputs[0]
    scale = ir.Value(name="s", const_value=ir.Tensor(np.array(0.1, np.float32), name="s"))
    zero = ir.Value(name="z", const_value=ir.Tensor(np.array(3, np.uint8), name="z"))
    for constant in (scale, zero):
        model.graph.register_initializer(constant)
    dq = named(ir.node("DequantizeLinear", [value, scale, zero]), "dq")
    q = named(ir.node("QuantizeLinear", [dq.outputs[0], scale, zero]), "q")
    behind(model, value, [dq, q])
    assert {("no-float-inside", "dq"), ("no-float-inside", "q")} <= rules(model)


def test_a_factor_before_and_a_scale_behind_are_allowed(file: ir.Model) -> None:
    """A factor per channel on the image; the logits as Cast and Mul."""
    model = file.clone()
    image = model.graph.inputs[0]
    factor = ir.Value(name="f", const_value=ir.Tensor(np.array([2.0], np.float32), name="f"))
    model.graph.register_initializer(factor)
    quantize = node_of(model, "QuantizeLinear")
    scaled = named(ir.node("Mul", [image, factor]), "factor")
    model.graph.insert_before(quantize, scaled)
    quantize.replace_input_with(0, scaled.outputs[0])
    end = node_of(model, "DequantizeLinear")
    codes = end.inputs[0]
    cast = named(ir.node("Cast", [codes], {"to": int(ir.DataType.FLOAT)}), "cast")
    by = ir.node("Mul", [cast.outputs[0], factor], name="by")
    by.outputs[0].name = "scaled_logits"
    model.graph.insert_before(end, [cast, by])
    model.graph.outputs[0] = by.outputs[0]
    model.graph.remove(end, safe=True)
    assert violations(model) == []


def small(*behind: str) -> ir.Model:
    """Floats x to codes and back, by hand, and ops behind the codes in the order of the graph."""
    x, y = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in "xy")
    x.shape = ir.Shape([2, 3])
    arrays = {"scale": np.array(0.1, np.float32), "zero": np.array(3, np.uint8)}
    scale, zero = (
        ir.Value(name=n, const_value=ir.Tensor(a, name=n), type=ir.TensorType(ir.DataType(k)),
                 shape=ir.Shape([]))
        for (n, a), k in zip(arrays.items(), (1, 2), strict=True)
    )  # fmt: skip
    nodes = [named(ir.node("QuantizeLinear", [x, scale, zero]), "q")]
    codes = nodes[0].outputs[0]
    last: list[ir.Value] = []
    for op in behind:
        if op == "DequantizeLinear":
            node = ir.node(op, [codes, scale, zero], name="end", outputs=[y])
        elif op == "Cast":
            node = named(ir.node(op, [codes], {"to": int(ir.DataType.INT32)}), op)
        else:
            node = named(ir.node(op, [codes]), op)
        nodes.append(node)
        last.append(node.outputs[0])
    graph = ir.Graph([x], last, nodes=nodes, initializers=[scale, zero], opset_imports={"": 21},
                     name="small")  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "behind",
    [("DequantizeLinear",), ("DequantizeLinear", "Shape"), ("Shape", "DequantizeLinear"),
     ("DequantizeLinear", "Cast"), ("Cast", "DequantizeLinear"), ("DequantizeLinear", "Max"),
     ("Max", "DequantizeLinear", "Cast", "Shape")],
    ids="-".join,
)  # fmt: skip
def test_outputs_of_integers_stand_anywhere(behind: tuple[str, ...]) -> None:
    """Before the scale of the logits or behind it: it remains the one of the outputs' floats."""
    assert list(no_float_inside(small(*behind))) == []


def test_a_foreign_op_is_found(file: ir.Model) -> None:
    model = file.clone()
    node = node_of(model, "MatMulInteger")
    node.domain = "com.microsoft"
    assert ("standard-domain", str(node.name)) in rules(model)


def test_a_multiplier_that_overflows_is_found(file: ir.Model) -> None:
    model = file.clone()
    node = next(
        n for n in model.graph if n.op_type == "Mul" and n.inputs[1].const_value is not None
    )
    wide = ir.Tensor(np.array(1 << 60), name="wide")
    value = ir.Value(name="wide", const_value=wide)
    model.graph.register_initializer(value)
    node.replace_input_with(1, value)
    assert ("no-overflow", str(node.name)) in rules(model)


def test_without_the_exporters_proofs_a_file_is_not_believed(file: ir.Model) -> None:
    model = file.clone()
    for node in model.graph:
        node.metadata_props.pop(RANGE_KEY, None)
    found = rules(model)
    assert found
    assert {rule for rule, _ in found} == {"no-overflow"}


def test_a_file_for_onnx_runtime_is_full_of_floats() -> None:
    model = to_standard(lower(prepared(DIGITS).model, quantized().specs))
    found = [v for v in violations(model) if v.rule == "no-float-inside"]
    assert len(found) > 100
    assert any("LayerNormalization has the float tensor" in v.text for v in found)


def test_histogram_and_widest(file: ir.Model) -> None:
    assert histogram(file)["MatMulInteger"] == 37
    found = widest(integer_ranges(file))
    assert found["accumulator"][1:] == (23, 32)
    assert found["int64"][1] <= 63
    assert found["uint32"][1] <= 30
    told = facts(file)
    assert told["widest accumulator"] == dict(
        zip(("tensor", "bits", "of"), found["accumulator"], strict=True)
    )
    assert {name.removeprefix("widest ") for name in told} == set(found)
