"""If nodes, inlined where shapes or constants decide them; the rest is refused by name.

TorchScript writes ``squeeze``, ``tile`` and the like as If nodes on the rank or the sizes of a
tensor. Which branch is taken is known as soon as the sizes are, and the shape of what it gives
may decide the next one, so that deciding and inlining take turns.
"""

from __future__ import annotations

import onnx_ir as ir

from ptq_onnx.errors import ModelError
from ptq_onnx.graph.symbolic_dims import dynamic_names
from ptq_onnx.graph.symbolic_shapes import Symbolic

LOOPS = frozenset(("Loop", "Scan"))
CONTROL_FLOW = frozenset(("If", *LOOPS))
CANNOT_BRANCH = "Export the model with fixed branches and loops unrolled."


def has_branches(model: ir.Model) -> bool:
    """Whether the graph itself holds control flow."""
    return any(_is_control_flow(node) for node in model.graph)


def inline_branches(model: ir.Model, *, inferred: bool = False) -> int:
    """Replace every If that can be decided by its branch, in place; returns how many.

    Takes turns: an inlined branch may hold Ifs, and decide others by the shape of its result.
    ``inferred``: shapes are those of an inference, not the file's, and may decide.
    """
    graph, count = model.graph, 0
    while True:
        pending = [node for node in graph if _is_control_flow(node) and node.op_type == "If"]
        if not pending:
            return count
        found = Symbolic(graph, trust=inferred).run()
        decided = [(node, taken) for node in pending if (taken := _taken(found, node)) is not None]
        if not decided:
            return count
        for node, taken in decided:
            _inline(graph, node, taken)
        count += len(decided)


def refuse_branches(model: ir.Model) -> None:
    """Raise :class:`ModelError` for control flow that is left, and say what it depends on."""
    left = next((node for node in model.graph if _is_control_flow(node)), None)
    if left is None:
        return
    where = f"Node '{left.name or left.outputs[0].name}': {left.op_type} is control flow"
    if left.op_type in LOOPS:
        raise ModelError(f"{where}, which cannot be quantized. {CANNOT_BRANCH}")
    reason = _reason(Symbolic(model.graph).run(), left.inputs[0])
    raise ModelError(f"{where}, and its condition {reason}. {CANNOT_BRANCH}")


def _is_control_flow(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in CONTROL_FLOW


def _taken(found: Symbolic, node: ir.Node) -> ir.Graph | None:
    """The branch that is always taken; None where that cannot be told."""
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    content = found.content(node.inputs[0])
    if content is not None and content.size == 1:
        value = content.reshape(-1)[0]
        if isinstance(value, (bool, int)):
            return branches[0] if value else branches[1]
    ways = [[_origin(value) for value in branch.outputs] for branch in branches]
    inner = {id(v) for branch in branches for node in branch for v in node.outputs}
    same = all(a is b and id(a) not in inner for a, b in zip(*ways, strict=True))
    return branches[0] if same else None


def _origin(value: ir.Value) -> ir.Value:
    """What a value is, behind Identities."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Put the nodes of a branch in the place of its If."""
    taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    taken.update(v.name for n in graph for v in n.outputs)

    def rename(value: ir.Value) -> None:
        base, number = str(value.name), 1
        while value.name in taken:
            value.name, number = f"{base}_{number}", number + 1
        taken.add(value.name)

    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        rename(value)
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.register_initializer(value)
    results = list(branch.outputs)
    branch.outputs.clear()
    nodes = list(branch)
    branch.remove(nodes)
    for inner in nodes:
        for value in inner.outputs:
            if value.name:
                rename(value)
    for old, result in zip(node.outputs, results, strict=True):
        copy = ir.node("Identity", [result], name=f"{node.name or old.name}_taken")
        new = copy.outputs[0]
        new.name, new.type = old.name, old.type or result.type
        new.shape = old.shape if old.is_graph_output() else result.shape
        nodes.append(copy)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(node, nodes)
    graph.remove(node, safe=True)


def _reason(found: Symbolic, condition: ir.Value | None) -> str:
    """What a condition depends on, that neither shapes nor constants tell."""
    seen: set[ir.Value] = set()
    todo = [] if condition is None else [condition]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        content, node = found.content(value), value.producer()
        if content is not None:
            names = sorted({name for x in content.ravel() for name in dynamic_names(x)})
            if names:
                dims = " and ".join(f"'{name}'" for name in names)
                batch = {str(v.shape[0]) for v in found.graph.inputs if v.shape}
                advice = "" if batch & set(names) else ", which --size HxW may fix"
                return f"depends on the size of the dynamic axis {dims} of the input{advice}"
            continue
        if value.is_graph_input():
            return f"depends on the values of the input '{value.name}'"
        if node is None:
            continue
        if node.op_type in ("Shape", "Size") and node.inputs[0] is not None:
            return f"depends on the shape of '{node.inputs[0].name}', which is not known"
        if _is_control_flow(node):
            name = node.name or node.outputs[0].name
            return f"depends on the result of {node.op_type} '{name}'"
        todo.extend(v for v in reversed(node.inputs) if v is not None)
    return "is not known"
