"""``--auto``: leaves few, cheap modules in float that keep the loss within a bound, none of which
can be done without.

What can be decided is in ``candidates.py``, what it costs in ``costs.py``, the search in
``search.py``, which knows nothing of models. Every trial is a file, measured in its runtime
(``trials.py``). Calibration is not repeated; the activations of the float model are computed once
for the expectations, its outputs once for the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from ptq_onnx.analysis.comparison_results import Automatic, Closeness, Decision
from ptq_onnx.auto.candidates import Candidate, with_decisions
from ptq_onnx.auto.search import Outcome, Stage, State, search
from ptq_onnx.auto.trial_runs import TrialRuns
from ptq_onnx.auto.trials import Evidence, Trials
from ptq_onnx.config.names import MAX_DROP, MIN_SQNR
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.quantizers.base import Plan

__all__ = ["Automatic", "Evidence", "decide", "notes_on"]


def decide(
    plan: Plan, batches: Iterable[Any], evidence: Evidence, stage: Stage
) -> tuple[Plan, Automatic]:
    """The plan with a config that needs no search, and what was decided. ``batches``: of
    calibration. Raises PtqError."""
    with TrialRuns(plan.config.threads, plan.config.workers) as runs:
        return _decide(plan, batches, evidence, stage, runs)


def _decide(
    plan: Plan, batches: Iterable[Any], evidence: Evidence, stage: Stage, runs: TrialRuns
) -> tuple[Plan, Automatic]:
    started = time.perf_counter()
    metric = evidence.metric
    labelled = evidence.labels_of is not None
    if metric is not None:  # a drop of half a point says nothing of a number without a unit
        labelled = metric.targets is not None and metric.unit == "%"
    bound, limit = _bound(plan.config, labelled=labelled)
    trials = Trials(plan, batches, evidence, stage, runs)

    def met(found: Closeness) -> bool:
        if bound == "max_drop":
            return found.drop is not None and found.drop <= limit
        return found.sqnr_db >= limit

    options = {} if met(trials.measure([])) else trials.options()

    def measure(state: State) -> Closeness:
        return trials.measure([options[o] for o in state.values()])

    # Few are better than many: one more costs as much as a module does on average.
    each = 1 / max(len({o.module for o in options}), 1)
    outcome = search(list(options), measure, met, each=each, stage=stage)
    final = [options[o] for o in outcome.decisions]
    config = with_decisions(plan.config, final)
    reference = trials.reference
    found = Automatic(
        bound=bound,
        limit=limit,
        images=reference.count,
        held_apart=evidence.held_apart,
        float_top1=None if reference.truth is None else 100 * float(reference.hits().mean()),
        before=outcome.start,
        after=outcome.result,
        met=outcome.met,
        minimal=outcome.minimal,
        decisions=_decisions(final, outcome),
        keep_float=config.keep_float,
        more_bits=config.more_bits,
        cost=trials.share(final),
        drop_error=trials.drop_error(final),
        trials=outcome.runs,
        seconds=time.perf_counter() - started,
        metric=None if metric is None else metric.figure,
        float_score=reference.float_score,
    )
    return replace(trials.plan, config=config), found


def _bound(
    config: QuantizeConfig, *, labelled: bool
) -> tuple[Literal["max_drop", "min_sqnr"], float]:
    """The bound that was asked for, else the one that suits."""
    if config.max_drop is not None:
        return "max_drop", float(config.max_drop)
    if config.min_sqnr is not None:
        return "min_sqnr", float(config.min_sqnr)
    return ("max_drop", MAX_DROP) if labelled else ("min_sqnr", MIN_SQNR)


def _decisions(final: Sequence[Candidate], outcome: Outcome[Closeness]) -> tuple[Decision, ...]:
    return tuple(
        Decision(
            step=step,
            module=candidate.module,
            role=candidate.role,
            block=candidate.block,
            decision=candidate.kind,
            tensors=len(candidate.tensors),
            noise=option.gain,
            cost=candidate.operations / 1e6,
            without=outcome.without.get(candidate.module),
        )
        for step, (candidate, option) in enumerate(
            zip(final, outcome.decisions, strict=True), start=1
        )
    )


def notes_on(found: Automatic) -> list[str]:
    """What the user should know of the decisions, besides them."""
    notes = []
    wanted = (
        f"at most {found.limit:g} points of {found.metric or 'top-1'} lost"
        if found.bound == "max_drop"
        else f"an SQNR of at least {found.limit:g} dB"
    )
    if not found.met:
        notes.append(
            f"--auto: even with all that can be decided this is out of reach: {wanted}; nothing was"
            " decided."
        )
    elif not found.decisions:
        notes.append(f"--auto: {wanted} as it is; nothing had to be decided.")
    elif not found.minimal:
        notes.append("--auto: the search was cut short; some decisions may not be needed.")
    error = found.drop_error
    if found.bound == "max_drop" and error is not None and found.limit < error:
        notes.append(
            f"--max-drop {found.limit:g} is finer than {found.images} images can tell: one"
            f" standard error of the drop is {error:.1f} points. Give more images, or bound the"
            " logits with --min-sqnr."
        )
    if not found.held_apart:
        notes.append("--auto: measured on images that calibration used; give --val for others.")
    return notes
