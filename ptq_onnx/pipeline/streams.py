"""The residual streams of the float model: factors for massive tokens, then turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir.passes.common as common

from ptq_onnx.blocks.role_map import TOKEN_FACTOR, Role
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import NORMS, name_of
from ptq_onnx.config import stages
from ptq_onnx.images.synthetic import is_drawn
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.rotation_notes import notes_on

if TYPE_CHECKING:
    from ptq_onnx.equalization.rotation_choice import Codes, Turns
    from ptq_onnx.equalization.token_factors import TokenFactors
    from ptq_onnx.numerics.spec import Rule
    from ptq_onnx.pipeline.earlier_run import Rewrites
    from ptq_onnx.quantizers.base import Plan


def massive_tokens(job: Job, plan: Plan, before: Rewrites | None) -> tuple[TokenFactors, ...]:
    """Factors for tokens far above the rest, where the streams are quantized: those that the run
    ``before`` found, or found on the images. Raises ConfigError."""
    from ptq_onnx.equalization.token_factors import find_token_factors
    from ptq_onnx.quantizers.by_name import make_quantizer

    if before is not None:
        return before.tokens_in(plan.model)
    if not codes_of(plan, make_quantizer(plan).rules).of_stream:
        return ()
    return find_token_factors(
        plan.model,
        job.batches(),
        threads=plan.config.threads,
        progress=job.stage(stages.TOKENS),
    )


def notes_on_tokens(tokens: Sequence[TokenFactors]) -> list[str]:
    """What was found, in words."""
    from ptq_onnx.equalization.token_factors import describe

    return [describe(one) for one in tokens]


def with_factors(plan: Plan, tokens: Sequence[TokenFactors]) -> Plan:
    """The plan for its own model with factors of tokens, put there in place."""
    from ptq_onnx.equalization.token_factors import set_token_factors

    roles = dict(plan.blocks.roles)
    for name, of in set_token_factors(plan.model, tokens).items():
        roles[name] = Role(roles[of].block, TOKEN_FACTOR)
    blocks = replace(plan.blocks, roles=roles)
    sites = find_sites(plan.model, blocks, whole=plan.config.runtime.all_codes)
    return replace(plan, blocks=blocks, sites=sites)


def turn(job: Job, plan: Plan, before: Rewrites | None) -> Turns:
    """Turn the residual streams of the plan's model, in place, where that lowers the expected
    error (see ``equalization/rotation_choice.py``), or as the run ``before`` did. Raises
    ConfigError."""
    from ptq_onnx.equalization.learned_turns import IMAGES, NOTHING, REST, learn_turns
    from ptq_onnx.equalization.rotation_choice import turn_streams
    from ptq_onnx.quantizers.by_name import make_quantizer

    if before is not None:
        turns = before.turned_in(plan.model)
    else:
        learned = NOTHING
        # From made pictures it learns what photographs do not have (docs/rotation.md).
        if plan.config.learns_turns and not is_drawn(job.request.calib):
            steps = min(IMAGES, len(job.inputs.images)) + REST
            told = job.stage(stages.LEARNING, steps)
            learned = learn_turns(plan.model, job.batches(), told)
            job.notes.extend([] if learned.note is None else [learned.note])
        turns = turn_streams(
            plan.model,
            job.batches(),
            codes_of(plan, make_quantizer(plan).rules),
            learned=learned,
            threads=plan.config.threads,
            progress=job.stage(stages.TURNING),
        )
    job.notes.extend(notes_on(turns))
    return turns


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
        levels_of={name: 1 << rules[name].bits for name in tensors if name in rules},
    )


def turned(plan: Plan, turns: Turns) -> Plan:
    """The plan for its model once the streams were turned."""
    common.RemoveUnusedNodesPass()(plan.model)
    added = dict.fromkeys(turns.added, Role(None, "other"))
    blocks = replace(plan.blocks, roles={**plan.blocks.roles, **added})
    sites = find_sites(plan.model, blocks)
    return replace(plan, blocks=blocks, sites=sites, searched=dict(turns.ranges))
