"""Blocks trained, one after the other, to give what they give in the float model.

When the walk (``stream_weights.py``) has rounded a block's weights, what of it can be learned
(``engine/learned.py``) is trained: it reads the stream of the *quantized* model, half of its own
activations stay as they are, at random (QDrop, arXiv 2203.05740), and its target is the stream of
the *float* model, errors being weighted by what they cost the output (``output_weights.py``). A
quarter of the batches is not trained on: the block keeps what it learned only if its error on those
has fallen. All starts from the closed form; steps are learned as in LSQ (arXiv 1902.08153), codes
straight through from where GPTQ left them.
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
from ptq_onnx.engine.learned import Array, Learned
from ptq_onnx.engine.output_weights import Weights, even, output_weights
from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.finished_blocks import FinishedBlocks, fingerprint
from ptq_onnx.quantizers.learning import Learning, Trained

STEPS = {"cpu": 80, "cuda": 2000}
"""Of each block."""
IMAGES = 8
"""Of each step, at least; whole batches."""
PARTS = (1.0, 0.5, 0.25)
"""Of the way that was learned: it is gone as far as is best for the batches held apart."""
APART = 4
"""Every so-manieth batch is not trained on."""
DROPPED = 0.5
FIRST = 2
"""Steps by whose time the number of all is found."""

Stream = dict[str, list[Tensor]]


class Reconstruction:
    """Trains the blocks of one walk; ``batches`` are those of the walk."""

    def __init__(
        self, plan: Plan, batches: Sequence[Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan = plan
        self.clock = clock
        self.device = device_for(plan.config.device)
        self.steps = STEPS[self.device]
        self.batches = -(-IMAGES // max(len(batches[0]), 1))
        """Of each step."""
        self.notes: list[str] = []
        self.trained: list[Trained] = []
        self.finished = FinishedBlocks(plan.kept)
        graph = plan.model.graph
        self._spans = {span.nodes[0].name: span for span in spans_of(graph, plan.blocks)}
        self._end = clock() + 60 * plan.config.minutes
        self._left = sum(bool(span.blocks) for span in self._spans.values())
        feed = str(graph.inputs[0].name)
        self.stream: Stream = {feed: [self._tensor(b) for b in batches]}
        """Of the float model: what is still to be read."""
        self.apart = [i for i in range(len(batches)) if i % APART == APART - 1]
        self.apart = self.apart or [len(batches) - 1]
        self.used = [i for i in range(len(batches)) if i not in self.apart]
        self.weights = self._weights(feed)

    def _weights(self, feed: str) -> dict[str, Weights]:
        """Of what the blocks give."""
        graph = self.plan.model.graph
        form = TorchForm(graph, {}, self.device)
        names = [n for s in self._spans.values() if s.blocks for n in s.outputs]
        reason = form.missing()
        if reason is not None:
            self.notes.append(f"--reconstruct: errors count the same everywhere; {reason}.")
            return {}
        batches = (self.stream[feed][i] for i in self.used)
        return output_weights(form, feed, names, str(graph.outputs[0].name), batches)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def __call__(
        self,
        span: Span,
        feeds: Mapping[str, list[NDArray[Any]]],
        specs: Mapping[str, TensorSpec],
        advance: Callable[[float], None],
    ) -> Learning | None:
        """What the quantized ``span`` learns from its inputs; None where nothing is kept.
        ``advance`` is told the part that is done."""
        original = self._spans[span.nodes[0].name]
        real = TorchForm(original.nodes, {}, self.device)
        before = {name: self.stream[name] for name in original.inputs}
        with torch.no_grad():
            made = [
                real.run(_at(before, i), original.outputs)
                for i in range(len(self.used + self.apart))
            ]
        for name in original.outputs:
            self.stream[name] = [one[name] for one in made]
        if not span.blocks:
            return None
        share = (self._end - self.clock()) / max(self._left, 1)
        self._left -= 1
        form = TorchForm(span.nodes, specs, self.device)
        reason = form.missing() or (None if span.outputs else "it has no output")
        if reason is not None:
            self.notes.append(f"--reconstruct: {span.label} stays as it is; {reason}.")
            return None
        key = fingerprint(
            form, feeds, [t.numpy(force=True) for n in original.outputs for t in self.stream[n]],
            (self.steps, self.apart),
        )  # fmt: skip
        found = self.finished.find(key)
        if found is None:
            inputs = {name: [self._tensor(b) for b in feeds[name]] for name in span.inputs}
            found = self._train(span, form, inputs, original, self.clock() + share, advance)
            self.finished.keep(key, found)
        self.trained.append(found.trained)
        return found if found.trained.kept else None

    def _train(
        self,
        span: Span,
        form: TorchForm,
        inputs: Stream,
        original: Span,
        end: float,
        advance: Callable[[float], None],
    ) -> Learning:
        target = {name: self.stream[name] for name in span.outputs}
        weights = {n: self._weights_of(n, target[n]) for n in span.outputs}
        scale = {n: _spread(weights[n], [target[n][i] for i in self.used]) for n in span.outputs}

        def loss(i: int) -> Tensor:
            made = form.run(_at(inputs, i), span.outputs)
            parts = [weights[n].loss(made[n] - target[n][i]) / scale[n] for n in span.outputs]
            return torch.stack(parts).sum()

        def error() -> float:
            with torch.no_grad():
                return float(np.mean([float(loss(i)) for i in self.apart]))

        before = error()
        learned = Learned(form, float_weights(original.nodes))
        steps = self._descend(learned, form, loss, end, advance)
        form.dropped = 0.0
        errors = {}
        for part in PARTS:
            learned.go(part)
            errors[part] = error()
        part = min(PARTS, key=lambda p: errors[p])
        learned.go(part)
        constants, changed = learned.found()
        after = errors[part]
        kept = steps > 0 and after < before
        trained = Trained(span.label, before, after, kept, steps, part)
        return Learning(trained, constants, changed) if kept else Learning(trained)

    def _descend(
        self,
        learned: Learned,
        form: TorchForm,
        loss: Callable[[int], Tensor],
        end: float,
        advance: Callable[[float], None],
    ) -> int:
        """Train; the number of steps, fewer than all where the time does not suffice."""
        adam, order = learned.optimizer(), np.random.default_rng(0)
        form.dropped, started = DROPPED, self.clock()
        done, total, waiting = 0, self.steps, list[int]()
        while done < total and self.clock() < end:
            for group in adam.param_groups:
                rate = (1 + np.cos(np.pi * done / total)) / 2 * min(1.0, (done + 1) / 5)
                group["lr"] = group["rate"] * rate
            adam.zero_grad()
            for _ in range(self.batches):
                waiting = waiting or list(order.permutation(self.used))
                learned.bind()
                (loss(waiting.pop()) / self.batches).backward()
            adam.step()
            done += 1
            if done == FIRST:  # by what these took
                each = max((self.clock() - started) / done, 1e-9)
                total = min(total, max(done, int((end - started) / each)))
            advance(done / total)
        return done

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

    def _weights_of(self, name: str, target: list[Tensor]) -> Weights:
        found = self.weights.get(name)
        fits = found is not None and {t.shape[1:-1] for t in target} == {found.positions.shape}
        return found if found is not None and fits else even(target[0])

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is no longer read."""
        for name in names:
            self.stream.pop(name, None)


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


def _at(stream: Mapping[str, list[Tensor]], i: int) -> dict[str, Tensor]:
    return {name: batches[i] for name, batches in stream.items()}


def _spread(weights: Weights, target: list[Tensor]) -> Tensor:
    """The weighted square of what a tensor is off its mean."""
    mean = torch.stack([t.mean(dim=tuple(range(t.ndim - 1))) for t in target]).mean(dim=0)
    return torch.stack([weights.loss(t - mean) for t in target]).mean().clamp_min(1e-12)
