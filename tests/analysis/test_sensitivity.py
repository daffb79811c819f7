"""Layerwise and leave-one-out: the cuts, the modules, and numbers against whole-model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from prepared_models import images, prepared, quantized, subject, uncalibrated
from short_digits import short_digits

import ptq_onnx.analysis.costliest as costliest_module
from ptq_onnx.analysis.costliest import costliest, count_of_costliest
from ptq_onnx.analysis.errors import logits_error
from ptq_onnx.analysis.modules import Module, find_modules
from ptq_onnx.analysis.results import Sensitivity
from ptq_onnx.analysis.segments import Segments, changed_constants, find_segments
from ptq_onnx.analysis.sensitivity import run_count, sensitivity
from ptq_onnx.analysis.shards import PARTS, Shards, Way
from ptq_onnx.analysis.variants import Images
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer

COUNT = 4
BLOCKS = 3
"""Half of the embedded model: there are half as many modules, and half as much behind each."""
LAST = BLOCKS - 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_digits(tmp_path_factory.mktemp("half") / "half.onnx", BLOCKS)


@pytest.fixture(scope="module")
def quantizer(path: Path) -> SiteQuantizer:
    return quantized(path, images(), quantizer="fqvit")


@pytest.fixture(scope="module")
def vanilla(path: Path) -> SiteQuantizer:
    return quantized(path, images(), quantizer="vanilla")


@pytest.fixture(scope="module")
def found(quantizer: SiteQuantizer, path: Path) -> Sensitivity:
    p = prepared(path)
    return sensitivity(
        p.model, quantizer.specs, p.blocks, p.sites, Images(images()[:COUNT]), held_apart=False,
        threads=1,
    )  # fmt: skip


def whole(specs: dict[str, TensorSpec], model: ir.Model) -> np.ndarray:
    """Logits of the whole model, lowered with those specs: no segments, no restarts."""
    data = graphs.serialize(lower(model, specs))
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images()[:COUNT]})[0])


def test_cuts_are_the_residual_adds(path: Path) -> None:
    p = prepared(path)
    parts = find_segments(p.model, str(p.model.graph.outputs[0].name))
    adds = [s.tensor for s in p.sites.values() if s.role in ("embed", "residual1", "residual2")]
    assert [part.output for part in parts[:-1]] == adds
    assert [part.input for part in parts[1:]] == adds
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[-1].stop == len(list(p.model.graph))


def test_several_processes_find_the_same(quantizer: SiteQuantizer, path: Path) -> None:
    """To the last bit: the runs are the same, wherever they are made."""
    p, pictures = prepared(path), Images(images()[:COUNT])
    few = dict(list(quantizer.specs.items())[:60:10])
    done: list[int] = []
    one, two = (
        sensitivity(
            p.model, few, p.blocks, p.sites, pictures, held_apart=False, apart=False, threads=1,
            workers=workers, progress=done.append if workers > 1 else None,
        )
        for workers in (1, 2)
    )  # fmt: skip
    assert replace(one, seconds=0) == replace(two, seconds=0)
    assert len({found.error.snr for found in one.layerwise}) > 5
    assert sum(done) == len(one.layerwise) + len(one.leave_one_out)
    assert len(done) == 2 * 2 * PARTS
    with Shards(Way(p.model, None, None, pictures), len) as shards:
        assert shards.each({}, {}, None) == ({}, 2)


def test_segments_one_by_one_give_the_whole(path: Path) -> None:
    p = prepared(path)
    segments = Segments(p.model, str(p.model.graph.outputs[0].name), threads=1)
    value = images()[:COUNT]
    opened = segments._build(0, 0, {})
    entry = "session.use_env_allocators"
    assert opened.get_session_options().get_session_config_entry(entry) == "1"
    for number in range(len(segments.parts)):
        value = segments.run(value, number, number, {}, 3).value
    np.testing.assert_allclose(value, whole({}, p.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["fc2@2", "qkv@0", "proj", "av@1", "norm", "head"])
def test_modules_are_what_keep_float_selects(
    selector: str, path: Path, vanilla: SiteQuantizer
) -> None:
    """Leave-one-out must tell what the option gives."""
    p, full = prepared(path), vanilla
    role, _, block = selector.partition("@")
    name = f"blocks.{block}.{role}" if block else role
    scope = "op" if block or role in ("norm", "head") else "kind"
    modules = find_modules(p.model, p.blocks, p.sites, full.specs)
    (mine,) = [m for m in modules if (m.name, m.scope, m.part) == (name, scope, "all")]
    kept = uncalibrated(path, quantizer="vanilla", keep_float=(selector,))
    assert mine.tensors == set(kept.floats)


def test_every_quantized_tensor_is_in_an_op_a_kind_and_the_model(
    quantizer: SiteQuantizer, path: Path
) -> None:
    p = prepared(path)
    modules = find_modules(p.model, p.blocks, p.sites, quantizer.specs)
    inside = {t for t in quantizer.specs if p.sites[t].block is not None}
    for scope, expected in (("op", set(quantizer.specs)), ("model", set(quantizer.specs)),
                            ("block", inside)):  # fmt: skip
        covered = {t for m in modules if m.scope == scope and m.part == "all" for t in m.tensors}
        assert covered >= expected
        assert covered <= set(quantizer.specs)
    assert len({(m.name, m.scope, m.part) for m in modules}) == len(modules)
    apart = {(m.name, m.part): m.tensors for m in modules if m.scope == "op"}
    both = apart["blocks.1.fc1", "activations"] | apart["blocks.1.fc1", "weights"]
    assert both == apart["blocks.1.fc1", "all"]
    assert apart["blocks.1.fc1", "weights"] == {
        s.tensor for s in p.sites.values() if (s.role, s.block) == ("fc1.weight", 1)
    }


def test_layerwise_is_the_whole_model_with_one_module_quantized(
    quantizer: SiteQuantizer, found: Sensitivity, path: Path
) -> None:
    p = prepared(path)
    modules = find_modules(p.model, p.blocks, p.sites, quantizer.specs)
    chosen = np.random.default_rng(0).choice(len(modules), 6, replace=False)
    truth = whole({}, p.model)
    by_key = {(s.module, s.scope, s.part): s for s in found.layerwise}
    assert len(by_key) == len(modules)
    for module in (modules[i] for i in chosen):
        specs = {t: quantizer.specs[t] for t in module.tensors}
        expected = logits_error(truth, whole(specs, p.model))
        got = by_key[module.name, module.scope, module.part]
        assert got.tensors == len(module.tensors)
        assert got.error.snr_db == pytest.approx(expected.snr_db, abs=0.5), module
        assert got.error.agreement == expected.agreement
        assert got.gain_db is None


def test_leave_one_out_is_the_whole_model_without_one_module(
    quantizer: SiteQuantizer, found: Sensitivity, path: Path
) -> None:
    p = prepared(path)
    modules = {
        (m.name, m.scope, m.part): m
        for m in find_modules(p.model, p.blocks, p.sites, quantizer.specs)
    }
    truth = whole({}, p.model)
    baseline = logits_error(truth, whole(quantizer.specs, p.model))
    assert found.baseline.snr_db == pytest.approx(baseline.snr_db, abs=0.5)
    for name, scope in (
        ("softmax", "kind"), ("blocks.0.softmax", "op"), ("blocks.1", "block"), ("fc1", "kind"),
    ):  # fmt: skip
        module = modules[name, scope, "all"]
        specs = {t: s for t, s in quantizer.specs.items() if t not in module.tensors}
        expected = logits_error(truth, whole(specs, p.model)).snr_db
        (got,) = [
            s for s in found.leave_one_out
            if (s.module, s.scope, s.part) == (name, scope, "all")
        ]  # fmt: skip
        assert got.error.snr_db == pytest.approx(expected, abs=0.6), name
        assert got.gain_db == pytest.approx(got.error.snr_db - found.baseline.snr_db)


def test_nothing_quantized_is_without_error(found: Sensitivity) -> None:
    left = {(s.module, s.part): s for s in found.leave_one_out if s.scope == "model"}
    assert left["model", "all"].error.snr_db == np.inf
    alone = {(s.module, s.part): s for s in found.layerwise if s.scope == "model"}
    assert alone["model", "all"].error == found.baseline
    # All but the weights is the activations alone.
    assert left["model", "weights"].error == alone["model", "activations"].error


def test_images_that_fill_up_a_batch_do_not_count(quantizer: SiteQuantizer, path: Path) -> None:
    p = prepared(path)
    few = {t: s for t, s in quantizer.specs.items() if f"blocks.{LAST}" in t or "head" in t}
    padded = np.concatenate([images()[:3], images()[2:3]])
    runs = [
        sensitivity(p.model, few, p.blocks, p.sites, i, held_apart=False, threads=1)
        for i in (Images(images()[:3]), Images(padded, 2, 3))
    ]
    assert runs[0].images == runs[1].images == 3
    for one, two in zip(runs[0].layerwise, runs[1].layerwise, strict=True):
        assert one.error.snr_db == pytest.approx(two.error.snr_db, abs=0.1)


def test_reference_is_what_logits_are_compared_with(quantizer: SiteQuantizer, path: Path) -> None:
    p = prepared(path)
    other = p.model.clone()
    head = next(s.tensor for s in p.sites.values() if s.role == "head.weight")
    old = other.graph.initializers[head].const_value
    assert old is not None
    other.graph.initializers[head].const_value = ir.tensor(old.numpy() * 2)
    few = {head: quantizer.specs[head]}
    run = sensitivity(
        p.model, few, p.blocks, p.sites, Images(images()[:2]), held_apart=False,
        reference=other, threads=1,
    )  # fmt: skip
    assert 3 < run.baseline.snr_db < 9  # half the logits: 6 dB, but for the bias


def test_a_linear_left_in_float_has_its_own_weight_and_bias(path: Path) -> None:
    """Rounded weights and corrected biases come and go with the quantization of the weight."""
    quantizer = quantized(path, images(), quantizer="deploy", bits="4/8/8", rounding="gptq")
    p, plain = subject(quantizer, path), quantizer.plan.model
    weight = next(s.tensor for s in p.sites.values() if (s.role, s.block) == ("fc1.weight", LAST))
    head = next(s.tensor for s in p.sites.values() if s.role == "head.weight")
    run = sensitivity(
        p.model, {t: quantizer.specs[t] for t in (weight, head)}, p.blocks, p.sites,
        Images(images()[:COUNT]), held_apart=False, reference=plain, threads=1,
    )  # fmt: skip
    left = {(s.module, s.part): s for s in run.leave_one_out if s.scope in ("model", "kind")}
    assert left["model", "all"].error.snr_db == np.inf
    node = next(n for n in plain.graph if weight in [v.name for v in n.inputs if v is not None])
    constants = {str(v.name) for v in node.inputs[1:] if v is not None}
    assert len(constants) == 2
    assert constants <= set(changed_constants(plain, p.model))
    copy = plain.clone()
    for name in constants:
        copy.graph.initializers[name].const_value = p.model.graph.initializers[name].const_value
    expected = logits_error(whole({}, plain), whole({weight: quantizer.specs[weight]}, copy))
    (alone,) = [s for s in run.layerwise if (s.module, s.scope) == (f"blocks.{LAST}.fc1", "op")]
    assert alone.error.snr_db == pytest.approx(expected.snr_db, abs=0.1)
    # All but the head is fc1 alone.
    assert left["head", "all"].error.snr_db == pytest.approx(expected.snr_db, abs=0.1)
    assert expected.snr_db > run.baseline.snr_db + 3


def test_progress_counts_every_run_and_no_images_are_refused(
    quantizer: SiteQuantizer, path: Path
) -> None:
    p = prepared(path)
    few = {t: s for t, s in quantizer.specs.items() if f"blocks.{LAST}" in t}
    done: list[int] = []
    sensitivity(
        p.model, few, p.blocks, p.sites, Images(images()[:1]), held_apart=False, threads=1,
        progress=done.append,
    )  # fmt: skip
    assert sum(done) == run_count(find_modules(p.model, p.blocks, p.sites, few), 1)
    with pytest.raises(ModelError, match="no images"):
        sensitivity(p.model, few, p.blocks, p.sites, Images(images()[:0]), held_apart=False)


def test_the_costliest_are_measured_on_all_images(
    quantizer: SiteQuantizer, found: Sensitivity, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others on few; what a row says is what it says with those images alone."""
    p = prepared(path)
    monkeypatch.setattr(costliest_module, "FEW", 2)
    monkeypatch.setattr(costliest_module, "PLACES", {"op": (3, 2, 1), "block": (1, 0, 0)})
    done: list[int] = []
    two = sensitivity(
        p.model, quantizer.specs, p.blocks, p.sites, Images(images()[:COUNT]), held_apart=False,
        threads=2, progress=done.append,
    )  # fmt: skip
    modules = find_modules(p.model, p.blocks, p.sites, quantizer.specs)
    assert sum(done) == run_count(modules, COUNT) == run_count(modules, 2) + 2 * 7
    few = sensitivity(
        p.model, quantizer.specs, p.blocks, p.sites, Images(images()[:COUNT]).spread(2),
        held_apart=False, threads=1,
    )  # fmt: skip
    assert (two.images, two.few_images, few.few_images) == (COUNT, 2, 2)
    assert two.baseline == found.baseline != few.baseline
    for name in ("layerwise", "leave_one_out"):
        rows = tuple(zip(*(getattr(one, name) for one in (two, found, few)), strict=True))
        chosen = [one for one, _, _ in rows if one.images == COUNT]
        assert sorted(one.scope for one in chosen) == ["block"] + 6 * ["op"]
        for one, all_of_them, some in rows:
            assert one == (all_of_them if one.images == COUNT else some)
    noise = {m.module: m.error.snr for m in few.layerwise if (m.scope, m.part) == ("op", "all")}
    worst = sorted(noise, key=lambda m: noise[m])[-3:]
    assert set(worst) <= {m.module for m in two.layerwise if m.images == COUNT}


def test_few_images_are_spread_and_filled_up() -> None:
    values = np.arange(12, dtype=np.float32).reshape(12, 1)
    assert Images(values).spread(4).values[:, 0].tolist() == [0, 4, 7, 11]
    filled = Images(values, 4, 10).spread(3)
    assert filled.values[:, 0].tolist() == [0, 4, 9, 9]
    assert filled.real == 3


def test_costliest_are_the_worst_by_each_measure_and_no_module_twice() -> None:
    def module(name: str) -> Module:
        return Module(name, "op", "fc2", None, "all", frozenset())

    def of(places: tuple[int, int, int]) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costliest_module, "PLACES", {"op": places})
            chosen = [m.name for m in costliest(costs)]
            assert len(chosen) == count_of_costliest(costs)
        return chosen

    # The noise of the module alone; what is left without it, in features and in logits.
    costs = {
        module("a"): (0.9, 0.5, 0.1),
        module("b"): (0.1, 0.2, 0.5),
        module("c"): (0.8, 0.1, 0.4),
        module("d"): (0.2, 0.4, 0.2),
    }
    assert of((1, 0, 0)) == ["a"]
    assert of((1, 1, 0)) == ["a", "c"]
    assert of((2, 1, 0)) == ["a", "b", "c"]
    assert of((0, 1, 1)) == ["a", "c"]
    assert of((3, 3, 3)) == ["a", "b", "c", "d"]
    costs[module("e")] = (float("nan"),) * 3  # no numbers any more: it costs most
    assert of((1, 1, 1)) == ["a", "c", "e"]


def test_specs_of_other_tensors_change_nothing(quantizer: SiteQuantizer, path: Path) -> None:
    """A run from a segment on leaves the tensor it starts from as it is."""
    p = prepared(path)
    segments = Segments(p.model, str(p.model.graph.outputs[0].name), threads=1)
    start = segments.parts[3].input
    value = segments.run(images()[:2], 0, 2, {}, 2).value
    coarse = replace(quantizer.specs[start], scale=np.array(100, np.float32), factor=None)
    one, two = (segments.run(value, 3, 3, specs, 2).value for specs in ({start: coarse}, {}))
    np.testing.assert_array_equal(one, two)
