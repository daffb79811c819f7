"""Why a graph has no integer form, named by its cause and not by the rule that met it first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers, is_layout, name_of

INSTEAD = "use --target onnxruntime"


def of_batch(image: ir.Value) -> str | None:
    """Why axes join the batch where the graph is one of so many images."""
    size = None if image.shape is None else image.shape[0]
    if not isinstance(size, int) or size < 2:
        return None
    return (
        f"the graph depends on its batch size of {size} in a way that cannot be undone, and the"
        f" integer target takes one image at a time; export with a dynamic batch, or {INSTEAD}"
    )


def of_weight(node: ir.Node) -> str:
    """Why a weight cannot take the factors of what its linear reads."""
    weight = node.inputs[1]
    others = [] if weight is None else [n for n, _ in consumers(weight) if n is not node]
    if not others:
        return "its weight does not take the factors of its input"
    names = " and ".join(f"'{name_of(n)}'" for n in others[:2])
    rest = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return (
        f"its weight is shared with {names}{rest}, whose inputs have other factors, and one weight"
        f" cannot take them all; export every block with a copy of its own, or {INSTEAD}"
    )


def of_padding(value: ir.Value) -> str | None:
    """Why channels behind a value disagree, where zeros are put between them on the way."""
    for node, index in consumers(value):
        if index != 0 or not is_layout(node):
            continue
        if node.op_type == "Pad":
            return (
                f"zeros fill up what stands behind it ('{name_of(node)}', as for windows that do"
                f" not divide the image), which the integer target does not cover; {INSTEAD}"
            )
        for output in node.outputs:
            found = of_padding(output)
            if found is not None:
                return found
    return None


def without_form(
    model: ir.Model, refused: ir.Node, planner: Callable[[ir.Node], object | None]
) -> str:
    """The ops besides the refused one that have no integer form at all, as the end of its
    refusal; empty without any."""
    nodes = [n for n in model.graph if not is_layout(n) and n.op_type != "Constant"]
    found = Counter(n.op_type for n in nodes if n is not refused and planner(n) is None)
    if not found:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common(4))
    return f" It has no integer form of {kinds} either."
