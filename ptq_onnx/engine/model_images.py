"""Pictures changed until a float model answers to them as it does to photographs.

The pixels of drawn pictures follow the gradient of

    CE(logits, a class of its own for each) + λ TV(x) - mean over attentions of H,

H being the differential entropy of the cosine similarities between the patch tokens of what an
attention gives to the stream: a photograph has patches alike and patches apart, noise has neither.
Source: PSAQ-ViT (Li, Ma, Chen, Xiao, Gu; arXiv 2203.02250), whose images begin with noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ptq_onnx.engine.torch_form import Tensor, TorchForm
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.progress import Advance, silent

Pixels = NDArray[np.uint8]

STEPS, BATCH = 30, 8
"""Steps of Adam for each picture, and pictures that go through the model and back at a time."""
RATE, LAST = 0.0225, 0.05
"""What a pixel of [0, 1] moves in the first step, and the part of it that remains at the end."""
MOMENTS = 0.5, 0.9
SMOOTH = 0.5
"""λ, for differences in units of DEVIATION."""
DEVIATION = 0.225
"""Of ImageNet's pixels."""
REACH = 14
"""A picture is shifted by up to this part of a side, one in so many, in each step."""
PAIRS = 1024
"""Pairs of tokens, drawn for each attention and step."""
POINTS, WIDTH = 41, 0.05
"""Points of [-1, 1] at which the density is taken, and the deviation of its kernel."""
LEAST = 1e-6
"""Added to a density whose logarithm is taken."""


@dataclass(frozen=True)
class Attended:
    """What an attention gives to the stream, and the axis of its channels."""

    name: str
    axis: int


@dataclass(frozen=True)
class Reads:
    """Tensors of the model that the loss reads. ``logits``: [B, classes], None without;
    ``patches``: what the embedding of patches gives, which tells how many tokens are patches; None
    where that is not known."""

    logits: str | None
    attended: tuple[Attended, ...]
    patches: Attended | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        found = [a.name for a in (*self.attended, self.patches) if a is not None]
        return found if self.logits is None else [self.logits, *found]


def changed(
    form: TorchForm,
    reads: Reads,
    drawn: Pixels,
    preprocess: Preprocess,
    *,
    seed: int = 0,
    fixed: int | None = None,
    advance: Advance = silent,
) -> Pixels:
    """Pictures uint8 [N, H, W, C], made of those ``drawn``; the same for the same arguments on the
    same machine. ``fixed``: the only batch size that the model takes; ``advance`` is told the steps
    done, each of each picture. Raises ValueError where the loss is not finite, and what torch
    raises where an op cannot be run or has no gradient."""
    size = fixed or BATCH
    made = np.empty_like(drawn)
    for first in range(0, len(drawn), size):
        some = drawn[first : first + size]
        filled = np.resize(some, (size, *some.shape[1:])) if fixed else some
        random = np.random.default_rng((seed, first, 1))
        batch = _Batch(form, reads, filled, preprocess, random)
        for _ in batch.losses():
            advance(len(some))
        made[first : first + size] = batch.pixels()[: len(some)]
    return made


class _Batch:
    """Pictures that change together, as torch holds them: [B, C, H, W] in [0, 1]."""

    def __init__(
        self,
        form: TorchForm,
        reads: Reads,
        drawn: Pixels,
        preprocess: Preprocess,
        random: np.random.Generator,
    ) -> None:
        self.form, self.reads, self.random = form, reads, random
        start = drawn.transpose(0, 3, 1, 2).astype(np.float32) / 255
        self.x = torch.from_numpy(start).requires_grad_()
        column = (1, -1, 1, 1)
        self.mean = torch.tensor(preprocess.mean, dtype=torch.float32).reshape(column)
        self.std = torch.tensor(preprocess.std, dtype=torch.float32).reshape(column)
        self.classes = torch.from_numpy(random.random(len(drawn)))
        """A place in [0, 1) for each: how many classes there are, the first run tells."""

    def losses(self) -> Iterator[float]:
        """The loss before each step, which is done when the next is asked for. Raises ValueError
        for one that is not finite."""
        adam = torch.optim.Adam([self.x], lr=RATE, betas=MOMENTS)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS, eta_min=RATE * LAST)
        for _ in range(STEPS):
            loss = self.loss()
            if not torch.isfinite(loss):
                raise ValueError("the loss is not finite")
            (self.x.grad,) = torch.autograd.grad(loss, [self.x])
            adam.step()
            rates.step()
            with torch.no_grad():
                self.x.clamp_(0, 1)
            yield float(loss.detach())

    def loss(self) -> Tensor:
        """The loss of the pictures, shifted and perhaps mirrored at random: a number."""
        height, width = self.x.shape[2:]
        far = [side // REACH for side in (height, width)]
        shift = [int(self.random.integers(-f, f + 1)) for f in far]
        shown = torch.roll(self.x, shift, (2, 3))
        shown = shown.flip(3) if self.random.random() < 0.5 else shown
        shown = (shown - self.mean) / self.std
        found = self.form.run({self.form.inputs[0]: shown}, self.reads.names)
        loss = SMOOTH * variation(self.x / DEVIATION)
        if self.reads.logits is not None:
            logits = found[self.reads.logits].flatten(1)
            loss = loss + F.cross_entropy(logits, (self.classes * logits.shape[1]).long())
        entropies = list(self.entropies(found))
        return loss - torch.stack(entropies).mean() if entropies else loss

    def entropies(self, found: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Of each attention with two patches at least, the mean over the pictures."""
        images, known = len(self.x), self.reads.patches
        patches = None if known is None else tokens_of(found[known.name], known.axis, images)
        for one in self.reads.attended:
            tokens = tokens_of(found[one.name], one.axis, images)
            if tokens is None:
                continue
            tokens = tokens[:, ahead_of_patches(tokens, patches) :]
            if tokens.shape[1] > 1:
                pairs = drawn_pairs(tokens.shape[1], self.random)
                yield entropy(similarities(tokens, pairs)).mean()

    def pixels(self) -> Pixels:
        """As they are by now, uint8 [B, H, W, C]."""
        found = np.rint(255 * self.x.detach().numpy()).astype(np.uint8)
        return np.ascontiguousarray(found.transpose(0, 2, 3, 1))


def tokens_of(x: Tensor, axis: int, images: int) -> Tensor | None:
    """Tokens [B, T, C] of a tensor whose channels stand on ``axis``: all places of an image, of all
    its windows. None for one whose first axis is not that of the images."""
    if x.ndim < 2 or x.shape[0] % images or axis % x.ndim == 0:
        return None
    return x.movedim(axis, -1).reshape(images, -1, x.shape[axis])


def ahead_of_patches(tokens: Tensor, patches: Tensor | None) -> int:
    """How many tokens are none of the patches: class token and registers, which come first."""
    more = 0 if patches is None else tokens.shape[1] - patches.shape[1]
    return more if patches is not None and 0 < more < patches.shape[1] else 0


def drawn_pairs(tokens: int, random: np.random.Generator) -> Tensor:
    """Pairs of two different tokens, int64 [2, P]: PAIRS of them drawn, all where there are no
    more."""
    if tokens * (tokens - 1) // 2 <= PAIRS:
        return torch.from_numpy(np.stack(np.triu_indices(tokens, 1)))
    one = random.integers(tokens, size=PAIRS)
    other = (one + random.integers(1, tokens, size=PAIRS)) % tokens
    return torch.from_numpy(np.stack([one, other]))


def similarities(tokens: Tensor, pairs: Tensor) -> Tensor:
    """Cosine of the angle between the tokens [B, T, C] of each pair [2, P]: [B, P]."""
    unit = F.normalize(tokens, dim=-1)
    return (unit[:, pairs[0]] * unit[:, pairs[1]]).sum(-1)


def entropy(x: Tensor) -> Tensor:
    """Differential entropy in nats of numbers in [-1, 1], [B, P]: [B].

    H = -∫ f log f over [-1, 1] with the kernel density f(u) = 1/(P h √2π) Σ exp(-(u - x)² / 2h²),
    taken at POINTS places with h = WIDTH (arXiv 2203.02250).
    """
    places = torch.linspace(-1, 1, POINTS, dtype=x.dtype)
    far = (places[:, None] - x[:, None, :]) / WIDTH
    density = torch.exp(-0.5 * far**2).mean(-1) / (WIDTH * math.sqrt(2 * math.pi))
    return -(density * torch.log(density + LEAST)).sum(-1) * (2 / (POINTS - 1))


def variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours, down and across, of [B, C, H, W]: a number."""
    steps: Sequence[Tensor] = (x.diff(dim=2), x.diff(dim=3))
    return torch.stack([(step**2).mean() for step in steps if step.numel()]).sum()
