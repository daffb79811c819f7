"""The float model rewritten for the target: equalised, or in its form, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir.passes.common as common

from ptq_onnx.blocks.role_map import Role
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import NORMS, name_of
from ptq_onnx.config import stages
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.parity import IMAGES, Off, Parity, Reference
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.pipeline.job import Job

if TYPE_CHECKING:
    from ptq_onnx.equalization.rotation_choice import Codes, Turned, Turns
    from ptq_onnx.numerics.spec import Rule
    from ptq_onnx.quantizers.base import Plan

ROTATION, EQUALISATION, FORM = "rotation", "equalisation", "bringing it into form"
"""What is done to the float model, in the words of notes."""


def rewrite(job: Job, plan: Plan, scales: str | Path | None) -> Plan:
    """The plan for the model equalised, or in the target's form, or as it is: the first that
    computes what the original does (see ``parity.py``)."""
    reference = original_run(job)
    keep_for_pictures(job)
    undone: list[str] = []

    def undo(what: str, measured: Off) -> None:
        undone.append(what)
        job.notes.append(
            f"Undone: {what}. The rewritten model was {measured} against the original on"
            f" {reference.count} calibration images; at most {reference.bound:.0e} is"
            " explained by rounding. Please report it with the model."
        )

    off = reference.fused or Off(0.0, str(plan.model.graph.outputs[0].name))
    changed = job.config.rotates and turn(job, plan, scales)
    if job.turns is not None:
        plan = replace(plan, factors=dict(job.turns.factors))
    if changed:
        after = reference.off(plan.model)
        if reference.accepts(after):
            plan, off = turned(job, plan), after
        else:
            undo(ROTATION, after)
            job.turns = None
            plan = replace(restored(job, plan), factors={})
    ways: list[tuple[str, Callable[[Plan], Plan]]] = [(FORM, bring_into_form)]
    if job.config.equalizes:
        ways.insert(0, (EQUALISATION, lambda plan: equalise(job, plan, scales)))
    for what, way in ways:
        found = way(plan)
        measured = off if found.model is plan.model and not found.forms else None
        measured = measured or reference.off(found.model)
        if reference.accepts(measured) or measured is off:
            plan, off = found, measured
            break
        undo(what, measured)
        if what != FORM:
            plan = restored(job, plan)
    job.notes.extend(reference.notes)
    job.parity = Parity(
        images=reference.count,
        original=reference.fused is not None,
        bound=reference.bound,
        fused=None if reference.fused is None else reference.fused.value,
        rewritten=off.value,
        output=off.output,
        undone=tuple(undone),
    )
    return adopt(job, plan)


def pixel_range(job: Job, plan: Plan) -> dict[str, tuple[float, float]]:
    """The range of an image of pixels, which is known: no image shows more."""
    if not (job.preprocess.raw and job.images.pictures):
        return {}
    return {s.tensor: (0.0, 255.0) for s in plan.sites.values() if s.role == "input"}


def original_run(job: Job) -> Reference:
    """The original on a few calibration images; batches as large as the file takes."""
    fixed = job.prepared.fixed
    size = fixed.size if fixed is not None else job.fixed or IMAGES
    batches: list[Any] = []
    count = 0
    for batch in job.images.batches(size):
        count += len(batch)
        missing = 0 if size == IMAGES else size - len(batch)
        filled = np.repeat(batch[-1:], missing, axis=0)
        batches.append(np.concatenate([batch, filled]) if missing else batch)
        if count + size > IMAGES:
            break
    threads = job.config.threads
    return Reference(job.prepared.path, job.prepared.model, batches, count, threads)


def restored(job: Job, plan: Plan) -> Plan:
    """The plan for the model as it was before it was changed in place, but for the rotation."""
    assert job.again is not None
    prepared = job.again()
    prepared.model.metadata_props.update(job.prepared.model.metadata_props)
    job.prepared = prepared
    plan = replace(
        plan, model=prepared.model, blocks=prepared.blocks, sites=prepared.sites, pixels=None
    )
    if job.turns is None:
        job.original = None
        return plan
    from ptq_onnx.equalization.rotation_choice import turn_again

    turn_again(prepared.model, job.turns.matrices)
    return turned(job, plan)


def turn(job: Job, plan: Plan, scales: str | Path | None) -> bool:
    """Turn the residual streams of the plan's model, in place, where that lowers the expected
    error; whether any was (see ``equalization/rotation_choice.py``). Raises ConfigError."""
    from ptq_onnx.equalization.rotation_choice import turn_streams
    from ptq_onnx.quantizers.by_name import make_quantizer

    if scales is not None:
        raise ConfigError(
            f"--scales {scales}: the rotation is chosen on the images, so that the scales of"
            " another run do not fit; calibrate anew, or use --no-rotate."
        )
    job.turns = turn_streams(
        plan.model,
        job.batches(job.images),
        codes_of(plan, make_quantizer(plan).rules),
        threads=plan.config.threads,
        progress=job.stage(stages.TURNING),
    )
    job.notes.extend(notes_on(job.turns))
    return job.turns.changed


def notes_on(turns: Turns) -> list[str]:
    """What was turned and what that is expected to win; of what stays, the first reason."""
    from ptq_onnx.equalization.rotation_choice import FACTORS

    notes = [
        f"Rotation: the residual stream at '{t.stream}', {t.tensors} tensors, was turned ({t.by});"
        f" its largest value fell from {t.largest_before:.3g} to {t.largest_after:.3g}, the noise"
        f" expected of one scale per tensor by {t.stream_db:.1f} dB, behind norms by"
        f" {t.norm_db:.1f} dB{added_to(t)}."
        for t, matrix in zip(turns.turned, turns.matrices, strict=True)
        if matrix is not None
    ]
    notes += [
        f"Rotation: the residual stream at '{t.stream}', {t.tensors} tensors, stays: with searched"
        f" factors per channel the outputs lose {t.stream_db:.1f} dB less than by the best matrix."
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


def added_to(turned: Turned) -> str:
    """The products that it costs, in words; nothing where there are none."""
    if not turned.products:
        return ""
    return (
        f"; products added for what does not take the matrix in: {turned.products}, or"
        f" {turned.added:.1%} of the stream's own"
    )


def codes_of(plan: Plan, rules: Mapping[str, Rule]) -> Codes:
    """What streams and norms are held in, by the quantizer's rules."""
    from ptq_onnx.equalization.rotation_choice import Codes

    config = plan.config
    norms = [node for node in plan.model.graph if node.op_type in NORMS]
    made = {name_of(node) for node in norms}
    tensors = [str(n.inputs[0].name) for n in norms if n.inputs[0] is not None]
    read = [rules[name] for name in tensors if name in rules]
    behind = [rule for name, rule in rules.items() if plan.sites[name].producer in made]
    return Codes(
        1 << config.widths.activations,
        symmetric=any(rule.symmetric for rule in behind),
        of_stream=bool(read) or config.quantize_residual,
        factors=any(rule.grain == PowersOfTwo() for rule in read),
        max_k=config.ptf_k,
    )


def turned(job: Job, plan: Plan) -> Plan:
    """The plan for its model once the streams were turned."""
    assert job.turns is not None
    common.RemoveUnusedNodesPass()(plan.model)
    added = dict.fromkeys(job.turns.added, Role(None, "other"))
    blocks = replace(plan.blocks, roles={**plan.blocks.roles, **added})
    sites = find_sites(plan.model, blocks)
    return replace(plan, blocks=blocks, sites=sites, searched=dict(job.turns.ranges))


def equalise(job: Job, plan: Plan, scales: str | Path | None) -> Plan:
    """The plan for the equalised model.

    The model as it was is in its file by now.
    """
    from ptq_onnx.equalization.equalize import equalise_in_place

    if scales is not None:
        raise ConfigError(
            f"--scales {scales}: equalisation needs the images, so that the scales of another"
            " run do not fit; calibrate anew, or use --no-equalize."
        )
    mean, std = job.preprocess.mean, job.preprocess.std
    pictures = job.images.pictures
    return equalise_in_place(
        replace(plan, pixels=(mean, std) if pictures else None), job.batches(job.images)
    )


def keep_for_pictures(job: Job) -> None:
    """The model as it is, where it is drawn beside by vanilla and about to be changed."""
    changed = job.config.equalizes or job.config.rotates
    if changed and job.config.report and job.config.pictures:
        job.original = replace(job.prepared, model=job.prepared.model.clone())


def of_copies(plan: Plan) -> dict[str, tuple[float, float]]:
    """The ranges searched, for the copies of their tensors that are quantized instead."""
    found: dict[str, tuple[float, float]] = {}
    for node in plan.model.graph:
        read = node.inputs[0] if node.op_type == "Identity" else None
        if read is not None and read.name in plan.searched:
            found[str(node.outputs[0].name)] = plan.searched[str(read.name)]
    return found


def bring_into_form(plan: Plan) -> Plan:
    """The plan for the model in the form that the target computes in integers."""
    from ptq_onnx.equalization.restructure import in_form

    return in_form(plan)


def adopt(job: Job, plan: Plan) -> Plan:
    """The plan, whose model from here on is the prepared one."""
    plan = replace(
        plan,
        fixed={**pixel_range(job, plan), **plan.fixed},
        searched={**plan.searched, **of_copies(plan)},
    )
    job.prepared = replace(job.prepared, model=plan.model, blocks=plan.blocks, sites=plan.sites)
    return plan


def tell_copies(job: Job) -> None:
    if (job.fixed or 1) > 1:
        job.notes.append(
            f"The graph holds its batch size of {job.fixed} in a way that cannot be taken out:"
            f" every image was run as {job.fixed} copies of it, which takes so many times as"
            " long. Export the model with a dynamic batch."
        )
