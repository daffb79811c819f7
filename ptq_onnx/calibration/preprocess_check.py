"""Whether the pictures reach the model as it was trained: by how sure it is of its answers.

A classifier fed with the wrong mean and deviation still answers, a little worse and less surely.
Its mean top-1 confidence under the common normalisations shows which one it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.images.preprocess import FloatArray, Preprocess

STAGES = (4, 8, 16, 32)
"""Numbers of images after which only those normalisations go on that may yet be ahead of the one
in force by the margin: where none is, 4 images are all it takes. Over 500 draws of 32 of 96 images
ViT-Ti under imagenet's is told inception's in 483, in 489 with 8 images at first; the right one
raised no warning on ViT-Ti and DeiT-Ti."""
MOST = STAGES[-1]
MARGIN = 0.05
"""Confidence by which another one must be ahead: ViT-Ti shows 0.15 under the wrong one of
imagenet and inception, DeiT-Ti 0.28; CLIP's, which costs DeiT-Ti no accuracy, 0.04."""
ERRORS = 2.0
"""And by so many standard errors of the mean difference."""
NAMED = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "[0, 255]": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Mean and deviation, on the scale 0 to 1, of the common normalisations."""
OPTIONS = ("imagenet", "inception")
"""Those that --preprocess knows."""

_TURN = (0, 2, 1, 3)
Array = NDArray[np.float64]
Norm = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Confidence:
    """Mean largest probability under one normalisation, over ``images`` images."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    confidence: float
    images: int


@dataclass(frozen=True)
class PreprocessCheck:
    """The normalisation in force, the others, and a sentence where one is clearly better."""

    in_force: Confidence
    others: tuple[Confidence, ...]
    warning: str | None


def check_preprocess(
    classify: Callable[[FloatArray], FloatArray], pictures: FloatArray, preprocess: Preprocess
) -> PreprocessCheck:
    """Compare the normalisation of ``preprocess`` with the common ones.

    ``pictures`` [N, C, H, W] on the scale 0 to 1; at most :data:`MOST` of them are used, spread
    evenly. ``classify`` gives logits or probabilities [N, classes].
    """
    count = min(MOST, len(pictures))
    pictures = pictures[np.arange(count) * len(pictures) // max(count, 1)]
    order = sorted(range(count), key=lambda i: (_TURN[i % 4], i))  # every part is spread evenly
    force = (preprocess.mean, preprocess.std)
    rivals = {n: _channels(norm, preprocess.channels) for n, norm in NAMED.items()}
    name = next((n for n, norm in rivals.items() if np.allclose(norm, force, atol=1e-3)), "yours")
    rivals.pop(name, None)

    def more(before: Array, norm: Norm, chosen: list[int]) -> Array:
        surer = top_confidence(classify(_normalised(pictures[chosen], norm)))
        return np.concatenate([before, surer])

    own, found = np.zeros(0), {n: np.zeros(0) for n in rivals}
    ahead, done = list(rivals), 0
    for stage in STAGES:
        chosen, done = order[done:stage], stage
        if not (ahead and chosen):
            break
        own = more(own, force, chosen)
        for n in ahead:
            found[n] = more(found[n], rivals[n], chosen)
        ahead = [n for n in ahead if may_be_surer(found[n], own)]
    return PreprocessCheck(
        _confidence(name, force, own),
        tuple(_confidence(n, rivals[n], c) for n, c in found.items()),
        _warning(name, own, {n: found[n] for n in ahead}, rivals),
    )


def top_confidence(outputs: FloatArray) -> Array:
    """Largest softmax probability of each row of logits; of probabilities, the largest."""
    values = outputs.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        return np.asarray(values.max(axis=1))
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(1 / powers.sum(axis=1))


def may_be_surer(other: Array, own: Array) -> bool:
    """Whether ``other`` is ahead by the margin, give or take one standard error of the mean
    difference: more images may show it. A model that does not mind costs no more images."""
    difference = other - own
    if len(difference) < 2:
        return True
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(difference.mean() + error > MARGIN)


def clearly_surer(other: Array, own: Array) -> bool:
    """Whether ``other`` is ahead by the margin, and by more than chance, image by image."""
    difference = other - own
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(difference.mean() > max(MARGIN, ERRORS * error))


def _warning(name: str, own: Array, ahead: dict[str, Array], norms: dict[str, Norm]) -> str | None:
    better = {n: c for n, c in ahead.items() if clearly_surer(c, own)}
    if not better:
        return None
    best = max(better, key=lambda n: float(better[n].mean()))
    mean, std = (",".join(f"{v:.4g}" for v in values) for values in norms[best])
    option = f"--preprocess {best}" if best in OPTIONS else f"--mean {mean} --std {std}"
    return (
        f"The preprocessing looks wrong: the float model is more confident with the"
        f" normalisation {best} than with {name}, which is in force (mean top-1 confidence"
        f" {better[best].mean():.2f} against {own.mean():.2f} on {len(own)} images). If it was"
        f" trained with that, give {option}; --no-check-preprocess leaves this test out."
    )


def _confidence(name: str, norm: Norm, values: Array) -> Confidence:
    mean, std = norm
    return Confidence(name, mean, std, float(values.mean()), len(values))


def _channels(norm: Norm, channels: int) -> Norm:
    """The normalisation of one gray channel is the mean over the colours."""
    if channels == 3:
        return norm
    mean, std = norm
    return (float(np.mean(mean)),) * channels, (float(np.mean(std)),) * channels


def _normalised(pictures: FloatArray, norm: Norm) -> FloatArray:
    mean, std = (np.array(v, np.float32)[:, None, None] for v in norm)
    return ((pictures - mean) / std).astype(np.float32, copy=False)
