"""The float model rewritten for the target: equalised, or in its form, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ptq_onnx.config import stages
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.parity import IMAGES, Off, Parity, Reference
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.mixing import with_mixed_widths
from ptq_onnx.pipeline.reading import prepared_anew
from ptq_onnx.pipeline.streams import massive_tokens, notes_on_tokens, turn, turned, with_factors
from ptq_onnx.preparation.prepare import Prepared

if TYPE_CHECKING:
    from ptq_onnx.analysis.mixed_results import Mixed
    from ptq_onnx.equalization.hidden_pieces import Pieces
    from ptq_onnx.equalization.rotation_choice import Turns
    from ptq_onnx.equalization.token_factors import TokenFactors
    from ptq_onnx.pipeline.earlier_run import Rewrites
    from ptq_onnx.quantizers.base import Plan

TOKENS, ROTATION, PIECES, EQUALISATION, FORM = (
    "factors of tokens",
    "rotation",
    "hidden channels in pieces",
    "equalisation",
    "bringing it into form",
)
"""What is done to the float model, in the words of notes."""
BOUNDS_TRIED = (1.0, 1.6, 2.5)
"""Least bounds of pieces, over where their function is linear: larger ones are passed less often
(and then the sum is not off)."""


@dataclass(frozen=True)
class Rewritten:
    """The float model that is quantized, the plan for it, and what was done to the original."""

    plan: Plan
    prepared: Prepared
    """The plan's model, its blocks and sites, and what is known of the file."""
    parity: Parity
    turns: Turns | None
    """What rotation turned, and by what; None where it was not asked for, or undone."""
    tokens: tuple[TokenFactors, ...]
    """The massive tokens that have factors of their own."""
    pieces: tuple[Pieces, ...]
    """The hidden channels that are held in pieces."""
    original: Prepared | None
    """The model before it was changed, where its attention is drawn beside."""
    mixed: Mixed | None = None
    """The widths of single modules, where they were chosen."""


@dataclass(frozen=True)
class _Attempt:
    """A plan on the way there: how far its model is off the original, and what was undone."""

    plan: Plan
    prepared: Prepared
    off: Off
    turns: Turns | None = None
    tokens: tuple[TokenFactors, ...] = ()
    pieces: tuple[Pieces, ...] = ()
    original: Prepared | None = None
    undone: tuple[str, ...] = ()


def rewrite(job: Job, plan: Plan) -> Rewritten:
    """The plan for the model equalised, or in the target's form, or as it is: the first that
    computes what the original does (see ``parity.py``)."""
    reference = original_run(job)
    off = reference.fused or Off(0.0, str(plan.model.graph.outputs[0].name))
    found = _Attempt(plan, job.inputs.prepared, off, original=kept_for_pictures(job))
    before = earlier_rewrites(job)
    if job.config.rotates:
        found = _with_token_factors(job, found, reference, before)
        found = _rotated(job, found, reference, before)
    if job.config.splits_hidden:
        found = _split(job, found, reference, before)
    mixed = None
    if job.config.mixes_widths:
        found, mixed = _mixed(job, found)
    found = _in_form(job, found, reference)
    job.notes.extend(reference.notes)
    parity = Parity(
        images=reference.count,
        original=reference.fused is not None,
        bound=reference.bound,
        fused=None if reference.fused is None else reference.fused.value,
        rewritten=found.off.value,
        output=found.off.output,
        undone=found.undone,
    )
    plan = with_known_ranges(job, found.plan)
    prepared = replace(found.prepared, model=plan.model, blocks=plan.blocks, sites=plan.sites)
    return Rewritten(
        plan, prepared, parity, found.turns, found.tokens, found.pieces, found.original, mixed
    )


def earlier_rewrites(job: Job) -> Rewrites | None:
    """Those of the run whose scales are used; None where there is none. Raises ConfigError where
    this run would leave them out."""
    if job.request.scales is None:
        return None
    from ptq_onnx.pipeline.earlier_run import Rewrites

    before = Rewrites(job.request.scales)
    before.check(job.config)
    return before


def _with_token_factors(
    job: Job, found: _Attempt, reference: Reference, before: Rewrites | None
) -> _Attempt:
    """With factors for massive tokens of the streams, unless that made it another function."""
    tokens = massive_tokens(job, found.plan, before)
    if not tokens:
        return found
    scaled = with_factors(found.plan, tokens)
    off = reference.off(scaled.model)
    if not reference.accepts(off):
        return _restored(job, _undone(job, found, TOKENS, off, reference))
    job.notes.extend(notes_on_tokens(tokens))
    return replace(found, plan=scaled, tokens=tokens, off=off)


def _rotated(job: Job, found: _Attempt, reference: Reference, before: Rewrites | None) -> _Attempt:
    """With its residual streams turned, unless that made it another function."""
    turns = turn(job, found.plan, before)
    found = replace(found, plan=replace(found.plan, factors=dict(turns.factors)))
    if not turns.changed:
        return replace(found, turns=turns)
    off = reference.off(found.plan.model)
    if reference.accepts(off):
        return replace(found, plan=turned(found.plan, turns), turns=turns, off=off)
    found = replace(found, plan=replace(found.plan, factors={}))
    return _restored(job, _undone(job, found, ROTATION, off, reference))


def _split(job: Job, found: _Attempt, reference: Reference, before: Rewrites | None) -> _Attempt:
    """With its massive hidden channels in pieces, where that is the same function."""
    from ptq_onnx.equalization.hidden_pieces import describe, held_in_one, split_hidden
    from ptq_onnx.quantizers.by_name import make_quantizer

    plan = found.plan
    if plan.config.quantizer == "deploy" and not plan.config.runtime.all_codes:
        job.notes.append("--split-hidden: deploy gives these channels factors of their own.")
        return found
    rules = make_quantizer(plan).rules
    if before is not None:
        return _split_as(job, found, reference, before.pieces_in(plan, rules))
    advance = job.stage(stages.SPLITTING)
    held, off = held_in_one(plan, rules, job.batches(), advance), None
    for least in BOUNDS_TRIED:
        split, pieces = split_hidden(plan, held, least)
        if not pieces:
            break
        off = reference.off(split.model)
        if reference.accepts(off):
            job.notes.extend(describe(one) for one in pieces)
            return replace(found, plan=split, pieces=pieces, off=off)
    if off is not None:
        return _undone(job, found, PIECES, off, reference)
    if job.config.split_hidden:
        job.notes.append(
            "--split-hidden: no hidden channel is so far above the rest that pieces pay."
        )
    return found


def _split_as(
    job: Job, found: _Attempt, reference: Reference, pieces: tuple[Pieces, ...]
) -> _Attempt:
    """With the massive hidden channels of an earlier run in its pieces."""
    from ptq_onnx.equalization.hidden_pieces import describe, in_pieces

    if not pieces:
        return found
    split = in_pieces(found.plan, pieces)
    off = reference.off(split.model)
    if not reference.accepts(off):
        return _undone(job, found, PIECES, off, reference)
    job.notes.extend(describe(one) for one in pieces)
    return replace(found, plan=split, pieces=pieces, off=off)


def _mixed(job: Job, found: _Attempt) -> tuple[_Attempt, Mixed]:
    """With a width for each module, which is chosen on an equalised copy."""
    plan = found.plan
    copy = replace(plan, model=plan.model.clone(), progress=None)
    plan, mixed = with_mixed_widths(job, plan, equalise(job, copy))
    return replace(found, plan=plan), mixed


def _in_form(job: Job, found: _Attempt, reference: Reference) -> _Attempt:
    """Equalised, or in the target's form, or as it is."""
    ways: list[tuple[str, Callable[[Plan], Plan]]] = [(FORM, bring_into_form)]
    if job.config.equalizes:
        ways.insert(0, (EQUALISATION, partial(equalise, job)))
    for what, way in ways:
        plan = way(found.plan)
        same = plan.model is found.plan.model and not plan.forms
        off = found.off if same else reference.off(plan.model)
        if same or reference.accepts(off):
            return replace(found, plan=plan, off=off)
        found = _undone(job, found, what, off, reference)
        if what != FORM:
            found = _restored(job, found)
    return found


def _undone(job: Job, found: _Attempt, what: str, off: Off, reference: Reference) -> _Attempt:
    """The attempt, in which something was undone, with a note that says so."""
    job.notes.append(
        f"Undone: {what}. The rewritten model was {off} against the original on"
        f" {reference.count} calibration images; at most {reference.bound:.0e} is"
        " explained by rounding. Please report it with the model."
    )
    return replace(found, undone=(*found.undone, what))


def pixel_range(job: Job, plan: Plan) -> dict[str, tuple[float, float]]:
    """The range of an image of pixels, which is known: no image shows more."""
    if not (job.inputs.preprocess.raw and job.inputs.images.pictures):
        return {}
    return {s.tensor: (0.0, 255.0) for s in plan.sites.values() if s.role == "input"}


def original_run(job: Job) -> Reference:
    """The original on a few calibration images; batches as large as the file takes."""
    prepared = job.inputs.prepared
    fixed = prepared.fixed
    size = fixed.size if fixed is not None else job.fixed or IMAGES
    batches: list[Any] = []
    count = 0
    for batch in job.inputs.images.batches(size):
        count += len(batch)
        missing = 0 if size == IMAGES else size - len(batch)
        filled = np.repeat(batch[-1:], missing, axis=0)
        batches.append(np.concatenate([batch, filled]) if missing else batch)
        if count + size > IMAGES:
            break
    return Reference(prepared.path, prepared.model, batches, count, job.config.threads)


def _restored(job: Job, found: _Attempt) -> _Attempt:
    """With the model as it was before it was changed in place, but for the rotation: massive
    hidden channels are whole again."""
    prepared = prepared_anew(job.request)
    prepared.model.metadata_props.update(found.prepared.model.metadata_props)
    plan = replace(
        found.plan,
        model=prepared.model,
        blocks=prepared.blocks,
        sites=prepared.sites,
        pixels=None,
        fixed={},
    )
    found = replace(found, pieces=())
    if found.tokens:
        plan = with_factors(plan, found.tokens)
    if found.turns is None:
        return replace(found, plan=plan, prepared=prepared, original=None)
    from ptq_onnx.equalization.rotation_choice import turn_again

    turn_again(prepared.model, found.turns.matrices)
    return replace(found, plan=turned(plan, found.turns), prepared=prepared)


def equalise(job: Job, plan: Plan) -> Plan:
    """The plan for the equalised model.

    The model as it was is in its file by now.
    """
    from ptq_onnx.equalization.by_quantizer import rewrite_in_place

    if job.request.scales is not None:
        raise ConfigError(
            f"--scales {job.request.scales}: equalisation needs the images, so that the scales of"
            " another run do not fit; calibrate anew"
            + (", or use --no-equalize." if plan.config.quantizer == "deploy" else ".")
        )
    mean, std = job.inputs.preprocess.mean, job.inputs.preprocess.std
    pictures = job.inputs.images.pictures
    return rewrite_in_place(replace(plan, pixels=(mean, std) if pictures else None), job.batches())


def kept_for_pictures(job: Job) -> Prepared | None:
    """The model as it is, where it is drawn beside by vanilla and about to be changed."""
    changed = job.config.equalizes or job.config.rotates
    if not (changed and job.config.report and job.config.pictures):
        return None
    return replace(job.inputs.prepared, model=job.inputs.prepared.model.clone())


def of_copies(
    plan: Plan, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """The ranges, for the copies of their tensors that are quantized instead."""
    found: dict[str, tuple[float, float]] = {}
    for node in plan.model.graph:
        read = node.inputs[0] if node.op_type == "Identity" else None
        if read is not None and read.name in ranges:
            found[str(node.outputs[0].name)] = ranges[str(read.name)]
    return found


def bring_into_form(plan: Plan) -> Plan:
    """The plan for the model in the form that the target computes in integers."""
    from ptq_onnx.equalization.restructure import in_form

    return in_form(plan)


def with_known_ranges(job: Job, plan: Plan) -> Plan:
    """The plan with the ranges of the image, and of copies of what was turned."""
    return replace(
        plan,
        fixed={**pixel_range(job, plan), **plan.fixed, **of_copies(plan, plan.fixed)},
        searched={**plan.searched, **of_copies(plan, plan.searched)},
    )


def tell_copies(job: Job) -> None:
    """Note a batch size that stays in the graph: every image is run as so many copies."""
    if (job.fixed or 1) > 1:
        job.notes.append(
            f"The graph depends on its batch size of {job.fixed} in a way that cannot be undone:"
            f" every image was run as {job.fixed} copies, which takes {job.fixed} times as long."
            " Export the model with a dynamic batch."
        )
