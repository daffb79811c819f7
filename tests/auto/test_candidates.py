"""What can be decided, what it changes and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from prepared_models import DIGITS, images, prepared, quantized

from ptq_onnx.auto.candidates import Candidate, find_candidates, with_decisions
from ptq_onnx.auto.closeness import drop_error, hits, points_lost
from ptq_onnx.auto.costs import cost, macs
from ptq_onnx.auto.decide import notes_on
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.outputs import Tallies, top_classes
from ptq_onnx.numerics.spec import Rule
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

TOKENS, WIDTH, HIDDEN, HEADS, BLOCKS = 65, 64, 256, 4, 6


def plan_of(**options: object) -> Plan:
    p = prepared(DIGITS)
    return Plan(p.model, p.blocks, p.sites, QuantizeConfig(threads=1, **options))


def batches() -> list[np.ndarray]:
    return [images()[i : i + 8] for i in range(0, 16, 8)]


@pytest.fixture(scope="module")
def vanilla() -> SiteQuantizer:
    return quantized(quantizer="vanilla", bits="8/8/8", method="minmax")


@pytest.fixture(scope="module")
def deploy() -> SiteQuantizer:
    return quantized(quantizer="deploy", bits="4/8/8")


def by_name(quantizer: SiteQuantizer) -> dict[tuple[str, str], Candidate]:
    found = find_candidates(quantizer, quantizer.specs)
    assert len({(c.module, c.kind) for c in found}) == len(found)
    return {(c.module, c.kind): c for c in found}


def test_macs_of_the_model() -> None:
    """Against the formulas of a ViT."""
    p = prepared(DIGITS)
    total = sum(macs(node) for node in p.model.graph)
    block = TOKENS * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 2 * TOKENS**2 * WIDTH
    embed, head = (TOKENS - 1) * WIDTH * 3 * 4 * 4, WIDTH * 10
    assert total == BLOCKS * block + embed + head


def test_what_a_decision_costs(vanilla: SiteQuantizer) -> None:
    """A linear: its MACs, and the output that GELU reads; a residual add: its elements."""
    found = by_name(vanilla)
    product, output = TOKENS * WIDTH * HIDDEN, TOKENS * HIDDEN
    assert found["blocks.2.fc1", "float"].operations == product + output
    assert found["blocks.2.residual1", "float"].operations == TOKENS * WIDTH
    assert found["blocks.2.norm1", "float"].operations == 3 * TOKENS * WIDTH**2
    assert {kind for _, kind in found} == {"float"}
    assert len({c.module for c in found.values()}) > 12 * BLOCKS


def test_more_bits_cost_less_than_float(deploy: SiteQuantizer) -> None:
    """A linear of 4-bit weights on 8-bit inputs: the weights alone gain bits, the width does not
    change; with both at 4 bits a sixth of the MACs."""
    found = by_name(deploy)
    product = TOKENS * WIDTH * HIDDEN
    assert found["blocks.2.fc1", "float"].operations == product
    assert found["blocks.2.fc1", "8 bits"].operations == 0
    narrow = make_quantizer(replace(deploy.plan, config=replace(deploy.plan.config, bits="4/4/4")))
    wide = narrow.rules_under(replace(narrow.plan.config, more_bits=("fc1@2",)))
    assert cost(narrow.plan.model, narrow.plan.sites, narrow.rules, wide) == product * 4 / 24


def test_a_decision_holds_all_that_it_changes(deploy: SiteQuantizer) -> None:
    """Deploy leaves a product in float with both inputs: so the norm takes q, k and v with it."""
    found = by_name(deploy)
    norm = found["blocks.2.norm1", "float"]
    roles = sorted(deploy.plan.sites[t].role for t in norm.tensors)
    assert roles == ["k.weight", "norm1", "q.weight", "v.weight"]
    for candidate in found.values():
        config = with_decisions(deploy.plan.config, [candidate])
        after = make_quantizer(replace(deploy.plan, config=config)).rules
        changed = {t for t, rule in deploy.rules.items() if after.get(t) != rule}
        assert changed == candidate.tensors
        for tensor in candidate.tensors:
            assert tensor not in after or after[tensor].bits == 8


def test_no_two_decisions_do_the_same(deploy: SiteQuantizer) -> None:
    found = by_name(deploy)
    effects = [(c.kind, c.tensors) for c in found.values()]
    assert len(set(effects)) == len(effects)
    assert ("blocks.2.fc1", "float") in found  # rather than norm2, which does the same
    assert ("blocks.2.norm2", "float") not in found


def test_all_decisions_together_are_the_float_model(vanilla: SiteQuantizer) -> None:
    chosen = [c for (_, kind), c in by_name(vanilla).items() if kind == "float"]
    after = vanilla.rules_under(with_decisions(vanilla.plan.config, chosen))
    assert after == {}


def test_rules_under_changes_nothing(deploy: SiteQuantizer) -> None:
    rules, floats = dict(deploy.rules), dict(deploy.floats)
    assert deploy.rules_under(replace(deploy.plan.config, keep_float=("all",))) == {}
    assert (deploy.rules, deploy.floats) == (rules, floats)


def test_with_decisions_keeps_what_the_user_asked_for() -> None:
    config = QuantizeConfig(
        keep_float=("head",), more_bits=("fc1",), auto=True, max_drop=1, bits="4/8/8"
    )
    none = frozenset[str]()
    found = with_decisions(
        config,
        [
            Candidate("blocks.3.fc2", "fc2", 3, "float", none, 1.0),
            Candidate("blocks.1.fc2", "fc2", 1, "float", none, 1.0),
            Candidate("norm", "norm", None, "8 bits", none, 1.0),
        ],
    )
    assert found == replace(
        config,
        auto=False,
        max_drop=None,
        keep_float=("head", "fc2@1,3"),
        more_bits=("fc1", "norm"),
    )


# On codes alone


def test_what_has_no_float_part_decides_sixteen_bits() -> None:
    """Each costs its elements; a weight's 4 bits become 8."""
    quantizer = make_quantizer(plan_of(target="qnn", auto=True, bits="4/8/8"))
    assert not quantizer.plan.config.mixes
    found = {(c.module, c.kind): c for c in find_candidates(quantizer, quantizer.rules)}
    assert {kind for _, kind in found} == {"8 bits", "16 bits"}
    sites = quantizer.plan.sites
    for (_, kind), one in found.items():
        acts = [t for t in one.tensors if not sites[t].is_parameter]
        weights = [t for t in one.tensors if sites[t].is_parameter]
        gained = sum(sites[t].elements for t in acts) + sum(sites[t].elements for t in weights) / 2
        assert one.operations == gained
        assert bool(acts) == (kind == "16 bits")
    config = with_decisions(quantizer.plan.config, [found["blocks.3.fc2", "16 bits"]])
    assert (config.auto, config.mixed, config.mixes) == (False, False, False)
    assert config.more_bits == ("fc2@3=16",)
    assert make_quantizer(plan_of(**_given(config))).rules == quantizer.rules_under(config)


def _given(config: QuantizeConfig) -> dict[str, object]:
    return {
        "target": config.target, "bits": config.bits, "mixed": config.mixed,
        "more_bits": config.more_bits,
    }  # fmt: skip


# More bits


@pytest.mark.parametrize("name", ["vanilla", "channelwise", "fqvit"])
def test_more_bits_for_a_role(name: str) -> None:
    quantizer = make_quantizer(plan_of(quantizer=name, bits="4/5/6", more_bits=("qkv@1", "k@1")))
    sites = quantizer.plan.sites
    wide = {t for t, rule in quantizer.rules.items() if rule.bits == 8}
    assert {(sites[t].role, sites[t].block) for t in wide} >= {("qkv.weight", 1), ("k", 1)}
    plain = make_quantizer(plan_of(quantizer=name, bits="4/5/6"))
    assert {t for t in plain.rules if plain.rules[t] != quantizer.rules[t]} == wide
    assert len(wide) <= 5
    specs = quantizer.calibrate(batches())
    for tensor in wide:
        assert specs[tensor].rule.bits == 8
        assert np.isfinite(specs[tensor].scale).all()


def test_sixteen_bits_for_a_role_are_of_its_activations() -> None:
    quantizer = make_quantizer(
        plan_of(quantizer="vanilla", bits="4/5/6", more_bits=("fc1@1=16", "fc1", "fc2@1"))
    )
    sites, rules = quantizer.plan.sites, quantizer.rules
    by_site = {(sites[t].role, sites[t].block): rule for t, rule in rules.items()}
    assert by_site["fc1", 1].bits == 16
    assert by_site["fc1", 1].limits == (-32768, 32767)
    assert by_site["fc1", 1].stored == "uint16"
    assert (by_site["fc1.weight", 1].bits, by_site["fc1.weight", 1].stored) == (8, "uint8")
    assert by_site["fc1", 0].bits == by_site["fc2", 1].bits == 8


def test_log_codes_have_no_sixteen_bits() -> None:
    for options in ({"bits": "8/8/16"}, {"more_bits": ("softmax=16",)}):
        with pytest.raises(ConfigError, match=r"'log2' codes have at most 8 bits, not 16"):
            make_quantizer(plan_of(quantizer="fqvit", lis=True, **options))


def test_a_rule_s_type_is_as_wide_as_its_bits() -> None:
    rule = Rule(16, stored="int8")
    assert (rule.stored, Rule(9).stored) == ("int16", "uint16")
    assert replace(rule, bits=8).stored == "int8"


def test_more_bits_make_a_weight_finer() -> None:
    """16 times as many levels on the same range."""
    narrow = quantized(quantizer="deploy", bits="4/8/8").specs
    wide = quantized(quantizer="deploy", bits="4/8/8", more_bits=("fc1@0",)).specs
    changed = [t for t in narrow if narrow[t].rule != wide[t].rule]
    assert len(changed) == 1
    ratio = narrow[changed[0]].scale / wide[changed[0]].scale
    assert 14 < float(ratio.mean()) < 22


# Once calibrated


def test_statistics_serve_every_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(quantizer="vanilla")
    first = make_quantizer(plan)
    stats = first.measure(batches())
    specs = first.solve(stats)
    plan = replace(plan, statistics=stats, config=replace(plan.config, keep_float=("fc1",)))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("ptq_onnx.quantizers.base.collect", refuse)
    monkeypatch.setattr("ptq_onnx.quantizers.base.add_histograms", refuse)
    again = make_quantizer(plan).calibrate(batches())
    assert again.keys() < specs.keys()
    for tensor, spec in again.items():
        np.testing.assert_array_equal(spec.scale, specs[tensor].scale)


def test_weights_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(quantized(quantizer="deploy").plan)
    plan = replace(plan, config=replace(plan.config, rounding="gptq"))
    first = make_quantizer(plan)
    first.calibrate(batches())
    monkeypatch.setattr("ptq_onnx.quantizers.rounded_weights.collect_moments", None)
    fewer = make_quantizer(replace(plan, config=replace(plan.config, keep_float=("fc1@0",))))
    specs = fewer.calibrate(batches())
    weights = [t for t in specs if fewer.plan.sites[t].is_parameter]
    assert len(weights) == len([t for t in first.rules if first.plan.sites[t].is_parameter]) - 1
    for tensor in weights:
        one, other = (
            q.model.graph.initializers[tensor].const_value.numpy() for q in (first, fewer)
        )
        np.testing.assert_array_equal(one, other)


# Numbers


def test_closeness_against_counting() -> None:
    truth = np.array([0, 1, 2, 2])
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    found = np.eye(3, dtype=np.float32)[[0, 2, 1, 2]]
    before, after = (hits(top_classes(logits), truth) for logits in (reference, found))
    tallies = Tallies(["logits", "again"])
    tallies.add(
        {"logits": found, "again": reference}, set(), {"logits": reference, "again": reference}
    )
    one, same = (tally.figures() for tally in tallies.each.values())
    assert (points_lost(before, after), one.agreement) == (25.0, 25.0)
    assert one.sqnr_db == pytest.approx(10 * np.log10(4 / 6)) == tallies.worst
    assert same.sqnr_db == 200
    # b = 2, c = 1: √(3 - 1/4) / 4
    assert drop_error(before, after) == pytest.approx(100 * np.sqrt(2.75) / 4)
    assert drop_error(before, before) == 25


def test_the_error_of_a_drop_is_its_deviation() -> None:
    """Drawn again and again: the deviation of the drop is what is said of one draw."""
    draw = np.random.default_rng(0)
    count, runs = 500, 400
    drops, errors = [], []
    for _ in range(runs):
        first, second = draw.random(count) < 0.8, draw.random(count)
        after = np.where(first, second < 0.95, second < 0.2)
        drops.append(points_lost(first, after))
        errors.append(drop_error(first, after))
    assert np.mean(errors) == pytest.approx(np.std(drops), rel=0.1)


def test_notes_say_what_went_short() -> None:
    from ptq_onnx.analysis.comparison_results import Automatic, Closeness

    close = Closeness(0.4, 12.0, 97.0)
    found = Automatic(
        "max_drop", 0.5, 500, True, 82.0, close, close, True, True, (), (), (), 0.0, 0.7, 1, 1.0
    )
    texts = notes_on(found)
    assert len(texts) == 2
    assert "nothing had to be decided" in texts[0]
    assert "finer than 500 images can tell" in texts[1]
    assert "0.7 points" in texts[1]
    wide = replace(found, limit=0.8, met=False)
    assert notes_on(wide) == [
        "--auto: even with all that can be decided this is out of reach: at most 0.8 points of"
        " top-1 lost; nothing was decided."
    ]
    used = replace(found, bound="min_sqnr", limit=20.0, drop_error=None, held_apart=False)
    assert len(notes_on(used)) == 2
    assert "give --val" in notes_on(used)[1]
