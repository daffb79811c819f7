"""The embedded classifier of digits without all blocks but its first: a quarter of the work, for
tests of whole jobs that ask for no accuracy."""

from __future__ import annotations

from pathlib import Path

import onnx

WHOLE = Path(__file__).resolve().parents[1] / "models/digits_vit.onnx"


def short_digits(path: Path, blocks: int = 1) -> Path:
    """Write it; the final norm reads what block ``blocks`` - 1 gives."""
    model = onnx.load(WHOLE)
    graph = model.graph
    norm = next(node for node in graph.node if node.name == "/norm/LayerNormalization")
    norm.input[0] = f"/blocks.{blocks - 1}/Add_1_output_0"
    needed: set[str] = {graph.output[0].name}
    kept = []
    for node in reversed(graph.node):
        if needed & {*node.output}:
            needed |= {*node.input}
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, left in ((graph.node, kept[::-1]), (graph.initializer, constants)):
        del field[:]
        field.extend(left)
    del graph.value_info[:]
    onnx.save(model, path)
    return path
