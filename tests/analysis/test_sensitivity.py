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

from ptq_onnx.analysis.errors import logits_error
from ptq_onnx.analysis.modules import find_modules
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
    for number in range(len(segments.parts)):
        value = segments.run(value, number, number, {}, 3)
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
    assert sum(done) == run_count(find_modules(p.model, p.blocks, p.sites, few))
    with pytest.raises(ModelError, match="no images"):
        sensitivity(p.model, few, p.blocks, p.sites, Images(images()[:0]), held_apart=False)


def test_specs_of_other_tensors_change_nothing(quantizer: SiteQuantizer, path: Path) -> None:
    """A run from a segment on leaves the tensor it starts from as it is."""
    p = prepared(path)
    segments = Segments(p.model, str(p.model.graph.outputs[0].name), threads=1)
    start = segments.parts[3].input
    value = segments.run(images()[:2], 0, 2, {}, 2)
    coarse = replace(quantizer.specs[start], scale=np.array(100, np.float32), factor=None)
    one = segments.run(value, 3, 3, {start: coarse}, 2)
    np.testing.assert_array_equal(one, segments.run(value, 3, 3, {}, 2))
