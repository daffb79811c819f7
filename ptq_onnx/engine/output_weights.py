"""What errors of inner tensors cost the output: Fisher information of the float model.

With g the gradient by a tensor [B, …, C] of log p(y), y drawn from the model's own distribution p,
E[g gᵀ] is the curvature of the KL divergence of the output (as used by FIMA-Q, arXiv 2506.11543).
It is taken as (a number per position) x (a matrix over channels): in the last block of a ViT the
first token has it all, and a few directions of the channels have most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ptq_onnx.engine.torch_form import Tensor, TorchForm

Double = NDArray[np.float64]

SOFTNESS = 4.0
"""Temperature of the classes' distribution, for matrices over channels from some hundred images."""
EVENLY = 0.2
"""Part of the weight that all positions share."""
DAMPING = 0.1
"""Of the mean over channels, added to each."""


@dataclass(frozen=True, eq=False)
class Weights:
    """``positions`` [...] with mean one, and ``root`` [C, C], Lᵀ of LLᵀ with mean diagonal one."""

    positions: Tensor
    root: Tensor

    def loss(self, error: Tensor) -> Tensor:
        """Mean weighted square of an error [B, …, C]."""
        return (self.positions[..., None] * (error @ self.root) ** 2).mean()


def even(like: Tensor) -> Weights:
    """All the same, for a tensor [B, …, C]."""
    channels = like.shape[-1]
    return Weights(
        torch.ones(like.shape[1:-1], device=like.device), torch.eye(channels, device=like.device)
    )


def output_weights(
    form: TorchForm,
    feed: str,
    names: Sequence[str],
    outputs: Sequence[str],
    batches: Iterable[Tensor],
) -> dict[str, Weights]:
    """Weights of the named tensors of a float model, from batches of its input ``feed``; none for
    tensors that are no vectors of channels, or whose shape is not always the same.

    An output [B, N] holds logits; of any other a random sign of every element stands for y.
    """
    power: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    uneven: set[str] = set()
    for _, found in slopes(form, feed, names, outputs, batches):
        for name, slope in found.items():
            if slope.ndim < 2:
                continue
            _add(power, uneven, name, (slope**2).sum(dim=(0, -1)))
            rows = slope.reshape(-1, slope.shape[-1])
            outer[name] = outer.get(name, 0.0) + rows.T @ rows
    return {n: _weights(power[n], outer[n]) for n in power if n not in uneven}


def position_weights(
    form: TorchForm,
    feed: str,
    axes: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    batches: Iterable[Tensor],
) -> dict[str, Double]:
    """The mean of g² over the images and over the named ``axes`` of each tensor, by position: an
    array over all other axes but the first, with mean one. None for a tensor that no output
    depends on, or whose shape is not always the same."""
    power: dict[str, Tensor] = {}
    uneven: set[str] = set()
    for _, gradients in slopes(form, feed, list(axes), outputs, batches):
        for name, slope in gradients.items():
            _add(power, uneven, name, (slope**2).sum(dim=(0, *axes[name])))
    found = {n: p.cpu().numpy().astype(np.float64) for n, p in power.items() if n not in uneven}
    return {n: p / p.mean() for n, p in found.items() if p.mean() > 0}


def _add(power: dict[str, Tensor], uneven: set[str], name: str, more: Tensor) -> None:
    """Add to a tensor's power, or note that its shape is not always the same."""
    if name in power and power[name].shape != more.shape:
        uneven.add(name)
    else:
        power[name] = power.get(name, torch.zeros_like(more)) + more


def slopes(
    form: TorchForm,
    feed: str,
    names: Sequence[str],
    outputs: Sequence[str],
    batches: Iterable[Tensor],
    softness: float = 1.0,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The named tensors and g of them, batch by batch; nothing for an input of whole numbers.

    ``softness``: the temperature of p. At 1 a few images that the model is unsure of have nearly
    all of E[g gᵀ]; from some images it is told better at a higher one (FIMA-Q takes 20).
    """
    for batch in batches:
        if not batch.is_floating_point():
            return
        found = form.run({feed: batch.clone().requires_grad_()}, [*names, *outputs])
        drawn = [_drawn(found[n], form.random, softness) for n in outputs if found[n].requires_grad]
        inner = {n: found[n] for n in names if found[n].requires_grad}
        if not drawn or not inner:
            return
        total = torch.stack(drawn).sum()
        gradients = torch.autograd.grad(total, list(inner.values()), allow_unused=True)
        yield found, {n: s for n, s in zip(inner, gradients, strict=True) if s is not None}


def _drawn(output: Tensor, random: torch.Generator, softness: float) -> Tensor:
    """log p of a class drawn for each image, p at a temperature; where there are none, a random sum
    of the elements over their norm."""
    if output.ndim != 2:
        signs = torch.empty_like(output).uniform_(-1, 1, generator=random).sign()
        total: Tensor = (signs * output).sum() / output.detach().norm().clamp_min(1e-12)
        return total
    shares = F.softmax(output.detach() / softness, dim=-1)
    drawn = torch.multinomial(shares, 1, generator=random)
    return F.log_softmax(output / softness, dim=-1).gather(1, drawn).sum() * softness


def _weights(power: Tensor, outer: Tensor) -> Weights:
    positions = power / power.mean().clamp_min(1e-30)
    channels = outer / outer.diagonal().mean().clamp_min(1e-30)
    damped = channels + DAMPING * torch.eye(len(channels), device=channels.device)
    root: Tensor = torch.linalg.cholesky(damped)
    return Weights(positions * (1 - EVENLY) + EVENLY, root)
