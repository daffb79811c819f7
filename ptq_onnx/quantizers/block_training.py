"""One block trained to give what it gives in the float model.

It reads the stream of the *quantized* model, half of its own activations stay as they are, at
random (QDrop, arXiv 2203.05740), and its target is the stream of the *float* model, errors being
weighted by what they cost the output (``engine/output_weights.py``). All starts from the closed
form; steps are learned as in LSQ (arXiv 1902.08153), codes straight through from where GPTQ left
them. Of the way that was learned it goes as far as is best for batches that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptq_onnx.engine.learned import Array, Learned
from ptq_onnx.engine.output_weights import Weights, even
from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.quantizers.learning import Learning, Trained

PARTS = (1.0, 0.5, 0.25)
"""Of the way that was learned."""
DROPPED = 0.5
WARM = 5
"""Steps in which the rates rise; they then fall as a cosine."""
FIRST = 3
"""Steps by the fastest of which the number of all is found."""

Tensors = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Course:
    """How a block is trained: the batches to train on and those held apart, the number of steps,
    batches of a step, a clock in seconds, and when it has to end by that."""

    used: Sequence[int]
    apart: Sequence[int]
    steps: int
    batches: int
    clock: Callable[[], float]
    end: float


class BlockTraining:
    """The training of one block: its form, what it reads, and its outputs in the float model."""

    def __init__(
        self,
        form: TorchForm,
        inputs: Tensors,
        target: Tensors,
        weights: Mapping[str, Weights],
        course: Course,
    ) -> None:
        self.form, self.inputs, self.target, self.course = form, inputs, target, course
        self.weights = {n: _fitting(weights.get(n), target[n]) for n in target}
        self.spread = {
            n: _spread(self.weights[n], [target[n][i] for i in course.used]) for n in target
        }

    def loss(self, batch: int) -> Tensor:
        """The weighted square of the error of a batch, over that of the target off its mean."""
        made = self.form.run({n: v[batch] for n, v in self.inputs.items()}, self.target)
        parts = [
            self.weights[n].loss(made[n] - values[batch]) / self.spread[n]
            for n, values in self.target.items()
        ]
        return torch.stack(parts).sum()

    def error(self) -> float:
        """The mean loss of the batches held apart."""
        with torch.no_grad():
            return float(np.mean([float(self.loss(i)) for i in self.course.apart]))

    def run(
        self, label: str, exact: Mapping[str, Array], advance: Callable[[float], None]
    ) -> Learning:
        """Train; ``exact``: the float weights; ``advance`` is told the part that is done."""
        before = self.error()
        learned = Learned(self.form, exact)
        self.form.dropped = DROPPED
        steps = self._descend(learned, advance)
        self.form.dropped = 0.0
        errors = {}
        for part in PARTS if steps else ():
            learned.go(part)
            errors[part] = self.error()
        part = min(errors, key=lambda p: errors[p], default=0.0)
        after = errors.get(part, before)
        trained = Trained(label, before, after, after < before, steps, part)
        if not trained.kept:
            return Learning(trained)
        learned.go(part)
        return Learning(trained, *learned.found())

    def _descend(self, learned: Learned, advance: Callable[[float], None]) -> int:
        """The number of steps, fewer than all where the time does not suffice."""
        course = self.course
        clock, end = course.clock, course.end
        adam, order = learned.optimizer(), np.random.default_rng(0)
        done, total, waiting, looked = 0, course.steps, list[int](), [clock()]
        while done < total and looked[-1] < end:
            for group in adam.param_groups:
                rate = (1 + np.cos(np.pi * done / total)) / 2 * min(1.0, (done + 1) / WARM)
                group["lr"] = group["rate"] * rate
            adam.zero_grad()
            for _ in range(course.batches):
                waiting = waiting or list(order.permutation(course.used))
                learned.bind()
                (self.loss(waiting.pop()) / course.batches).backward()
            adam.step()
            done += 1
            looked.append(clock())
            if done == FIRST:
                each = max(float(np.diff(looked).min()), 1e-9)
                total = min(total, done + max(0, int((end - looked[-1]) / each)))
            advance(done / total)
        return done


def _fitting(weights: Weights | None, target: Sequence[Tensor]) -> Weights:
    """The weights where there are some for all batches, else even ones."""
    fits = weights is not None and {t.shape[1:-1] for t in target} == {weights.positions.shape}
    return weights if weights is not None and fits else even(target[0])


def _spread(weights: Weights, target: Sequence[Tensor]) -> Tensor:
    """The weighted square of what a tensor is off its mean."""
    mean = torch.stack([t.mean(dim=tuple(range(t.ndim - 1))) for t in target]).mean(dim=0)
    return torch.stack([weights.loss(t - mean) for t in target]).mean().clamp_min(1e-12)
