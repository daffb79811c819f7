"""Graph fusion before and after, on graphs as exporters write them: LayerNorm, GELU, MatMul + Add.

python benchmarks/figures/fusion_drawing.py --output img/fusion.png

The graphs are real: each goes through the project's own fusion rules, and what is drawn is what
stood there before and what stands there after.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import onnx_ir as ir
from boxes import arrow, box
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from onnx_ir import tape
from subject import table

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.report.plots import GREY, STYLE, save_png

TOKENS, WIDTH = 4, 8
AFTER = "#cfe8d5"


@dataclass(frozen=True)
class Drawn:
    """Ops of a graph in order, and which of them reads which; -1 is the input."""

    ops: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]


def constant(values: object, name: str) -> ir.Value:
    """An initializer."""
    tensor = ir.tensor(np.asarray(values, np.float32), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
                    const_value=tensor)  # fmt: skip


def layer_norm(op: Callable[..., ir.Value], x: ir.Value) -> ir.Value:
    """As TorchScript writes it below opset 17."""
    axes = constant([0], "unused")
    axes.const_value = ir.tensor(np.array([-1]), name="axes")
    centred = op("Sub", [x, op("ReduceMean", [x, axes], {"keepdims": 1})])
    square = op("Pow", [centred, constant(2.0, "two")])
    variance = op("ReduceMean", [square, axes], {"keepdims": 1})
    deviation = op("Sqrt", [op("Add", [variance, constant(1e-6, "epsilon")])])
    scaled = op("Mul", [op("Div", [centred, deviation]), constant(np.ones(WIDTH), "gamma")])
    return op("Add", [scaled, constant(np.zeros(WIDTH), "beta")])


def gelu(op: Callable[..., ir.Value], x: ir.Value) -> ir.Value:
    """x · ½ · (1 + erf(x / √2))."""
    inner = op("Erf", [op("Div", [x, constant(np.sqrt(2.0), "root")])])
    outer = op("Mul", [x, op("Add", [inner, constant(1.0, "one")])])
    return op("Mul", [outer, constant(0.5, "half")])


def linear(op: Callable[..., ir.Value], x: ir.Value) -> ir.Value:
    """A product with a constant, and a bias."""
    weight = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    return op("Add", [constant(np.zeros(WIDTH), "bias"), op("MatMul", [x, constant(weight, "w")])])


GRAPHS = {"LayerNorm": layer_norm, "GELU": gelu, "MatMul + Add": linear}


def build(make: Callable[..., ir.Value]) -> ir.Model:
    """A model of one sub-graph."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", TOKENS, WIDTH])
    held = tape.Tape()

    def op(kind: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
        value = held.op(kind, inputs, attributes)
        value.name = f"{kind}_{len(list(held.nodes))}"
        return value

    y = make(op, x)
    y.shape, y.type = x.shape, x.type
    constants = {v.name: v for n in held.nodes for v in n.inputs if v is not None and v.const_value}
    for value in constants.values():
        assert value.const_value is not None
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
    graph = ir.Graph(
        [x], [y], nodes=list(held.nodes), initializers=list(constants.values()),
        opset_imports={"": 21},
    )  # fmt: skip
    for node in graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            reduced = node.op_type in ("ReduceMean", "Sqrt") or value.name == "reduced"
            value.shape = value.shape or ir.Shape(["batch", TOKENS, 1 if reduced else WIDTH])
    return ir.Model(graph, ir_version=10)


def drawn(model: ir.Model) -> Drawn:
    """What stands in a graph."""
    nodes = list(model.graph)
    index = {v: i for i, n in enumerate(nodes) for v in n.outputs}
    index[model.graph.inputs[0]] = -1
    edges = [(index[v], i) for i, n in enumerate(nodes) for v in n.inputs if v in index]
    return Drawn(tuple(n.op_type for n in nodes), tuple(dict.fromkeys(edges)))


def main() -> None:
    """Print ops before and after; draw them where asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="a .png to write")
    args = parser.parse_args()
    pairs: dict[str, tuple[Drawn, Drawn]] = {}
    for name, make in GRAPHS.items():
        model = build(make)
        before = drawn(model)
        fuse(model)
        pairs[name] = before, drawn(model)
    table(
        ("pattern", "before", "after"),
        [[name, " ".join(a.ops), " ".join(b.ops)] for name, (a, b) in pairs.items()],
    )
    if args.output:
        draw(pairs, Path(args.output))


def draw(pairs: dict[str, tuple[Drawn, Drawn]], path: Path) -> None:
    """A panel a pattern: the ops before on the left, after on the right."""
    longest = max(len(before.ops) for before, _ in pairs.values())
    tall = (longest + 2) * 0.62
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(pairs), tall))
        FigureCanvasAgg(figure)
        for index, (name, (before, after)) in enumerate(pairs.items()):
            axes = figure.add_axes((index / len(pairs), 0, 1 / len(pairs), 1))
            axes.set_axis_off()
            axes.set_xlim(0, 3.6)
            axes.set_ylim(-tall, 0)
            axes.text(1.8, -0.22, name, ha="center", va="center", fontsize=13, fontweight="bold")
            stack(axes, before, 1.2, 1.05)
            arrow(axes, (1.82, -1.97), (2.12, -1.97))
            stack(axes, after, 2.84, 1.38, AFTER)
            axes.text(
                2.85, -3.1, f"{len(before.ops)} ops → {len(after.ops)}", ha="center", fontsize=11
            )
        save_png(figure, path, 120)


def stack(axes: Axes, one: Drawn, x: float, wide: float, fill: str | None = None) -> None:
    """Ops under each other; what skips some is an arc on the left."""
    at = {-1: -0.62, **{i: -1.22 - i * 0.62 for i in range(len(one.ops))}}
    if fill is not None:
        at = {key: value - 0.75 for key, value in at.items()}
    axes.text(x, at[-1], "x", ha="center", va="center", fontsize=11, style="italic", color=GREY)
    for start, end in one.edges:
        if end - start == 1:
            top = at[start] - (0.12 if start < 0 else 0.19)
            arrow(axes, (x, top), (x, at[end] + 0.19))
        else:
            side = x - (0.12 if start < 0 else wide / 2)
            bend = 0.75 if start < 0 and end == 1 else 0.4 if start < 0 else 0.2
            arrow(axes, (side, at[start]), (x - wide / 2, at[end]), bend=bend)
    for index, op in enumerate(one.ops):
        more = {} if fill is None else {"fill": fill}
        box(axes, x, at[index], wide, 0.38, op, size=8.5 if len(op) > 12 else 9.5, **more)


if __name__ == "__main__":
    main()
