"""Spans: every node once, in order, with what comes in and goes out."""

from __future__ import annotations

import pytest
from small_transformer import Choices, transformer

from ptq_onnx.blocks.role_map import Blocks, Role
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.spans import spans_of
from ptq_onnx.blocks.walking import name_of


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_are_spans_that_hand_on_the_stream(count: int) -> None:
    model = transformer(Choices(), count)
    graph = model.graph
    spans = spans_of(graph, find_blocks(model))
    assert [node for span in spans for node in span.nodes] == list(graph)
    inside = [span for span in spans if span.blocks]
    assert [span.label for span in inside] == [f"blocks.{i}" for i in range(count)]
    for span, behind in zip(inside, spans[1:], strict=False):
        assert len(span.outputs) == 1
        assert set(span.outputs) <= set(behind.inputs)
    assert spans[-1].outputs == (graph.outputs[0].name,)
    assert spans[0].inputs == (graph.inputs[0].name,)


def test_blocks_that_are_mixed_are_one() -> None:
    graph = transformer(Choices(), 1).graph
    names = [name_of(node) for node in graph]
    roles = {n: Role((0, 1, 0, 1)[i], "fc1") for i, n in enumerate(names[:4])}
    roles |= {n: Role(None, "other") for n in names[4:]}
    spans = spans_of(graph, Blocks(roles, 2))
    assert [len(span.nodes) for span in spans] == [4, len(names) - 4]
    assert spans[0].label == "blocks.0-1"


def test_without_blocks_all_is_one_span() -> None:
    graph = transformer(Choices(), 1).graph
    (span,) = spans_of(graph, Blocks({}, 0))
    assert list(span.nodes) == list(graph)
    assert span.blocks == ()
