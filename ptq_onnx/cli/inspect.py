"""``ptq-onnx inspect``: what is in a model, and what was not understood."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import simple_table
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.pipeline.model_path import find_model

if TYPE_CHECKING:
    from ptq_onnx.preparation.inspection import Inspection, Tensor

SHOWN = 20
"""Ops without a role that are listed; ``--json`` has all."""


def inspect(model: o.Model, as_json: o.Json = False) -> None:
    """Show inputs, blocks and roles of a model, and what was not recognised."""
    path = find_model(model)
    from ptq_onnx.preparation.inspection import inspect as look

    found = look(path)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    show(found)


def show(found: Inspection) -> None:
    """Print it as tables."""
    console = stdout()
    console.print(simple_table((found.path, ""), _summary(found), words=True))
    if found.refused is not None:
        console.say(f"not prepared: {found.refused}")
        return
    console.print(simple_table(("block", "roles"), _blocks(found), words=True))
    if found.unrecognised:
        rows = [(u.node, u.op_type) for u in found.unrecognised[:SHOWN]]
        rest = len(found.unrecognised) - len(rows)
        console.print(
            simple_table((f"without a role: {len(found.unrecognised)}", "op"), rows, words=True)
        )
        if rest:
            console.print(f"and {rest} more; --json lists all.")
    if found.near_misses:
        misses = [(m.node, f"{m.op_type}: {m.family}? {m.reason}") for m in found.near_misses]
        console.print(
            simple_table(("left as it is", "closest, and why not"), misses[:SHOWN], words=True)
        )
    for note in found.notes:
        console.say(f"note: {note}")


def _summary(found: Inspection) -> list[tuple[str, str]]:
    rows = [
        *(("input", _line(t)) for t in found.inputs),
        *(("output", _line(t)) for t in found.outputs),
        ("producer", found.producer or "not stated"),
        ("opset", str(found.opset)),
        ("size", f"{found.bytes / 1e6:.2f} MB, {found.parameters / 1e6:.2f} M parameters"),
    ]
    if found.refused is not None:
        ops = ", ".join(f"{count} {name}" for name, count in list(found.ops.items())[:SHOWN])
        return [*rows, ("nodes", f"{found.nodes_before}: {ops}")]
    fused = ", ".join(f"{count} {name}" for name, count in found.fusions.items() if count)
    return [
        *rows,
        ("nodes", f"{found.nodes_before}, {found.nodes} cleaned and fused"),
        ("fused", fused or "nothing"),
        ("blocks", str(found.blocks)),
    ]


def _line(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _blocks(found: Inspection) -> list[tuple[str, str]]:
    """Blocks with the same roles share a row."""
    rows: list[tuple[list[str], str]] = []
    for block, roles in found.roles.items():
        text = ", ".join(n if count == 1 else f"{count} {n}" for n, count in roles.items())
        if rows and rows[-1][1] == text and block != "outside":
            rows[-1][0].append(block)
        else:
            rows.append(([block], text))
    return [(b[0] if len(b) == 1 else f"{b[0]} to {b[-1]}", text) for b, text in rows]
