"""Blocks trained, one after the other, while a walk rounds the weights of a model.

When the walk (``stream_weights.py``) has rounded a block's weights, the block is trained
(``block_training.py``), and the walk goes on with what it gives then. A quarter of the batches is
not trained on; a block whose error on those does not fall stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ptq_onnx.blocks.spans import Span, spans_of
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.bits import Bits
from ptq_onnx.engine.learned import Array
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.engine.output_weights import Weights, output_weights
from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.block_training import BlockTraining, Course
from ptq_onnx.quantizers.finished_blocks import FinishedBlocks, fingerprint
from ptq_onnx.quantizers.importance import RARE, in_words
from ptq_onnx.quantizers.learning import Learning, Trained
from ptq_onnx.quantizers.span_runs import Stream, run_span

STEPS = {"cpu": 80, "cuda": 2000}
"""Of each block."""
FEW = 4
LONGER = 3
"""Times as many on the CPU, where weights or activations have less than ``FEW`` bits: on the sample
models the divergence at 3/3/3 falls by another tenth then, that at 4/4/4 does not."""
IMAGES = 8
"""Of each step, at least; whole batches."""
APART = 4
"""Every so-manieth batch is not trained on."""


class Reconstruction:
    """Trains the blocks of one walk; ``batches`` are those of the walk.

    Raises ConfigError where none can be held apart.
    """

    def __init__(
        self, plan: Plan, batches: Sequence[Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        if len(batches) < 2:
            raise ConfigError(
                "--reconstruct: the calibration images are one batch, of which none can be held"
                " apart; give more images, or a smaller --batch."
            )
        self.plan = plan
        self.clock = clock
        self.device = device_for(plan.config.device)
        self.steps = steps_for(plan.config.widths, self.device)
        self.notes: list[str] = []
        if plan.config.device == "cuda" and self.device == "cpu":
            self.notes.append(
                "--device cuda: torch has no CUDA here; blocks are trained on the CPU."
            )
        self.trained: list[Trained] = []
        self.finished = FinishedBlocks(plan.kept)
        graph = plan.model.graph
        self._spans = {span.nodes[0].name: span for span in spans_of(graph, plan.blocks)}
        self._kernels = NodeKernels(plan.model, {}, plan.config.threads)
        self._end = clock() + 60 * plan.config.minutes
        self._left = sum(bool(span.blocks) for span in self._spans.values())
        feed = str(graph.inputs[0].name)
        self.stream: Stream = {feed: list(batches)}
        """Of the float model: what is still to be read."""
        apart = [i for i in range(len(batches)) if i % APART == APART - 1]
        self.apart = apart or [len(batches) - 1]
        self.used = [i for i in range(len(batches)) if i not in self.apart]
        self.batches = -(-IMAGES // max(len(batches[0]), 1))
        """Of each step."""
        self.weights = self._weights(feed)

    def _weights(self, feed: str) -> dict[str, Weights]:
        """Of what the blocks give."""
        graph = self.plan.model.graph
        form = TorchForm(graph, {}, self.device)
        reason = form.missing()
        if reason is None and form.inputs != [feed]:
            reason = "the model has several inputs"
        if reason is None:
            names = [n for s in self._spans.values() if s.blocks for n in s.outputs]
            outputs = [str(v.name) for v in graph.outputs]
            batches = (self._tensor(self.stream[feed][i]) for i in self.used)
            try:
                return output_weights(form, feed, names, outputs, batches)
            except RARE as error:
                reason = in_words(error)
        self.notes.append(f"--reconstruct: errors count the same everywhere; {reason}.")
        return {}

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def __call__(
        self,
        span: Span,
        feeds: Stream,
        specs: Mapping[str, TensorSpec],
        advance: Callable[[float], None],
    ) -> Learning | None:
        """What the quantized ``span`` learns from its inputs; None where nothing is kept.
        ``advance`` is told the part that is done."""
        original = self._spans[span.nodes[0].name]
        run_span(original, self._kernels, self.stream, lambda node: frozenset())
        if not span.blocks:
            return None
        share = (self._end - self.clock()) / max(self._left, 1)
        self._left -= 1
        form = TorchForm(span.nodes, specs, self.device)
        reason = form.missing() or (None if span.outputs else "it has no output")
        if reason is not None:
            self.notes.append(f"--reconstruct: {span.label} stays as it is; {reason}.")
            return None
        wanted = {name: self.stream[name] for name in original.outputs}
        key = fingerprint(form, [feeds, wanted], (self.steps, self.apart, self.batches))
        found = self.finished.find(key)
        if found is None:
            end = self.clock() + share
            course = Course(self.used, self.apart, self.steps, self.batches, self.clock, end)
            inputs, target = (
                {n: [self._tensor(b) for b in batches] for n, batches in stream.items()}
                for stream in (feeds, wanted)
            )
            training = BlockTraining(form, inputs, target, self.weights, course)
            found = training.run(span.label, float_weights(original.nodes), advance)
            self.finished.keep(key, found)
        self.trained.append(found.trained)
        return found if found.trained.kept else None

    def told(self) -> list[str]:
        """Notes: what was found, what did not help, where the time did not suffice."""
        found = list(self.notes)
        dropped = [one.block for one in self.trained if not one.kept]
        if dropped:
            found.append(
                f"--reconstruct: {', '.join(dropped)} stay as they were; training did not lower"
                " their error on images held apart."
            )
        short = [one.block for one in self.trained if one.steps < self.steps]
        if short:
            found.append(
                f"--minutes {self.plan.config.minutes:g}: {', '.join(short)} had fewer than"
                f" {self.steps} steps; another run may differ."
            )
        resumed = sum(one.resumed for one in self.trained)
        if resumed:
            blocks = "1 block was" if resumed == 1 else f"{resumed} blocks were"
            found.append(f"--reconstruct: {blocks} taken from a run that was stopped.")
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is no longer read."""
        for name in names:
            self.stream.pop(name, None)


def steps_for(widths: Bits, device: str) -> int:
    """Of each block: as many as still help."""
    few = min(widths.weights, widths.activations) < FEW
    return STEPS[device] * (LONGER if few and device == "cpu" else 1)


def device_for(asked: str) -> str:
    """Where blocks are trained: on a GPU where one is asked for, and torch has it."""
    return "cuda" if asked == "cuda" and torch.cuda.is_available() else "cpu"


def float_weights(nodes: Iterable[ir.Node]) -> dict[str, Array]:
    """Weights of linears by name."""
    linears = [node for node in nodes if is_linear(node)]
    values = {
        str(node.inputs[1].name): constant(node.inputs[1]) for node in linears if node.inputs[1]
    }
    return {name: np.array(v, np.float32) for name, v in values.items() if v is not None}


def with_steps(
    specs: Mapping[str, TensorSpec], steps: Mapping[str, Array]
) -> dict[str, TensorSpec]:
    """The specs of the named tensors, with other steps."""
    found = {}
    for name, step in steps.items():
        spec = specs[name]
        ratio = float(np.mean(step / spec.scale))
        low, high = spec.clip
        scale = np.asarray(step, np.float32).reshape(spec.scale.shape)
        found[name] = replace(spec, scale=scale, clip=(low * ratio, high * ratio))
    return found
