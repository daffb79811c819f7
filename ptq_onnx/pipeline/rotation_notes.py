"""What a rotation did, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptq_onnx.equalization.rotation_choice import Turned, Turns


def notes_on(turns: Turns) -> list[str]:
    """What was turned and what that is expected to win; of what stays, the first reason."""
    from ptq_onnx.equalization.rotation_choice import FACTORS

    notes = [
        f"Rotation: the residual stream at '{t.stream}', {t.tensors} tensors, was turned"
        f" {_gain(t)}{added_to(t)}{refined_by(t)}."
        for t, matrix in zip(turns.turned, turns.matrices, strict=True)
        if matrix is not None
    ]
    notes += [
        f"Rotation: the residual stream at '{t.stream}', {t.tensors} tensors, stays: with searched"
        f" factors per channel the outputs lose {t.stream_db:.1f} dB less than by the best matrix"
        f"{refined_by(t)}."
        for t in turns.turned
        if t.by == FACTORS
    ]
    if turns.refused:
        first, more = turns.refused[0], len(turns.refused) - 1
        others = f" ({more} more stay too: report.json, rotation)" if more else ""
        notes.append(
            f"Rotation: the stream at '{first.norm}' stays as it is: {first.reason}{others}."
        )
    if not turns.changed and not turns.factors:
        notes.append("Rotation: no residual stream was turned.")
    return notes


def _gain(turned: Turned) -> str:
    """By what a stream was turned, and what that is expected to win."""
    from ptq_onnx.equalization.rotation_choice import LEARNED

    if turned.by == LEARNED:
        return (
            "by a matrix learned from gradients of the output: what rounding behind norms costs it"
            f" is expected to fall by {turned.loss_db:.1f} dB, on images held apart"
        )
    return (
        f"({turned.by}); its largest value fell from {turned.largest_before:.3g} to"
        f" {turned.largest_after:.3g}, the noise expected of one scale per tensor by"
        f" {turned.stream_db:.1f} dB, behind norms by {turned.norm_db:.1f} dB"
    )


def added_to(turned: Turned) -> str:
    """The products that it costs, in words; nothing where there are none."""
    if not turned.products:
        return ""
    return (
        f"; products added for what does not take the matrix in: {turned.products}, or"
        f" {turned.added:.1%} of the stream's own"
    )


def refined_by(turned: Turned) -> str:
    """What the choice of its steps by the outputs won, in words; nothing where that is little."""
    if turned.refined_db < 0.05:
        return ""
    return f"; steps chosen by the outputs' error, which fell by {turned.refined_db:.1f} dB"
