"""A step of its own for each channel, for few bits: the float model stays what it was, and one
scale and zero point then hold every channel of the calibration images."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import run, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.calibration.product_samples import Wanted, collect_samples
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.equalization.factor_search import Product, choose_factor, normalized
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.range_search import channel_bounds, share_rate
from ptq_onnx.quantizers import importance
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

LEVELS = np.exp2(np.linspace(-3, 3, WIDTH)).astype(np.float32)
BATCHES = [sample(8, TOKENS, WIDTH, seed=s).astype(np.float32) * LEVELS + 1 for s in range(3)]
CHOICES = {"packed": Choices(), "apart": Choices(packed=False, scale="before", pool=True)}


def made(name: str, bits: str) -> tuple[ir.Model, SiteQuantizer]:
    """The float model, and lowbit's quantizer of its stepped form."""
    model = transformer(CHOICES[name], blocks=2)
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="lowbit", bits=bits, threads=1)
    plan = rewritten(Plan(model, blocks, find_sites(model, blocks), config), BATCHES)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(BATCHES[0][:1]), BATCHES)
    return model, quantizer


def values(model: ir.Model, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    copy = to_standard(model)
    made_by = {str(v.name): v for node in copy.graph for v in node.outputs}
    names = [name for name in names if name in made_by]
    copy.graph.outputs[:] = [made_by[name] for name in names]
    return dict(zip(names, run(copy, x), strict=True))


@pytest.mark.parametrize("bits", ["4/4/4", "6/6/3"])
@pytest.mark.parametrize("name", CHOICES)
def test_steps(name: str, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the tests of a function sees all of these: nothing is kept between them.
    All tokens count the same."""
    monkeypatch.setattr(importance, "EVENLY", 1.0)
    model, quantizer = made(name, bits)
    the_float_model_stays_what_it_was(model, quantizer)
    every_channel_takes_up_its_codes(quantizer)
    maps_have_one_for_the_largest(model, quantizer, int(bits[-1]))
    if bits == "6/6/3":
        what_is_told_of_a_norm(model, quantizer)


def the_float_model_stays_what_it_was(model: ir.Model, quantizer: SiteQuantizer) -> None:
    x = sample(4, TOKENS, WIDTH, seed=9) * LEVELS
    before, after = run(to_standard(model), x)[0], run(to_standard(quantizer.plan.model), x)[0]
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    assert len(list(quantizer.plan.model.graph)) > len(list(model.graph))


def every_channel_takes_up_its_codes(quantizer: SiteQuantizer) -> None:
    """Of the values of all images few are beyond the last codes, and no channel has but a few
    codes, though the image's are a power of 2^6 apart."""
    sites = {s.tensor: s for s in quantizer.plan.sites.values()}
    solved = [t for t in quantizer.plan.solved if t in quantizer.specs]
    found = values(quantizer.plan.model, solved, np.concatenate(BATCHES))
    roles = set()
    for tensor, value in found.items():
        spec, site = quantizer.specs[tensor], sites[tensor]
        if spec.rule.code != Uniform() or spec.rule.around:
            continue
        low, high = spec.rule.limits
        codes = np.rint(value / float(spec.scale)) + int(spec.zero_point)
        beyond = np.maximum(low - codes, codes - high)
        turned = site.role in ("q", "k")  # head by head, with a step for each head
        apart = site.channel_axes[:1] if turned else site.channel_axes
        others = tuple(a for a in range(value.ndim) if a not in apart)
        width = np.ptp(np.clip(codes, low, high), axis=others)
        centre = (codes.max(axis=others) + codes.min(axis=others)) / 2
        span = high - low
        assert (beyond > 0).mean() < 0.02, site.label
        assert np.quantile(beyond, 0.999) <= 1, site.label
        assert width.min() >= (0.2 if site.block is None else 0.55) * span, site.label
        assert np.abs(centre - (low + high) / 2).max() <= (span / 7 if turned else 1), site.label
        roles.add(site.role)
    assert roles >= {"norm1", "q", "k", "v", "norm2", "av"}


def what_is_told_of_a_norm(model: ir.Model, quantizer: SiteQuantizer) -> None:
    """How much less noise steps of single channels make than one for all, in dB, and how far apart
    the ranges are; six bits hardly clip."""
    moves = [m for m in quantizer.plan.moves if m.role in ("norm1", "norm2")]
    found = values(model, [m.tensor for m in moves], np.concatenate(BATCHES))
    assert len(moves) == 4
    for move in moves:
        value = found[move.tensor].astype(np.float64)
        width = np.ptp(value, axis=(0, 1))
        gain = 10 * np.log10(np.ptp(value) ** 2 / np.mean(width**2))
        assert move.gain_db == pytest.approx(gain, abs=1)
        assert move.largest == pytest.approx(width.max() / width.min(), rel=0.25)


def maps_have_one_for_the_largest(model: ir.Model, quantizer: SiteQuantizer, bits: int) -> None:
    """The zero point of a map's codes is the last of them, which stands for a row's maximum; so
    many codes to the octave that the product with V loses least."""
    maps = [t for t, s in quantizer.specs.items() if quantizer.plan.sites[t].role == "softmax"]
    assert len(maps) == 2
    products = [n for n in model.graph if str(n.inputs[0].name) in maps]  # type: ignore[union-attr]
    pairs = {str(n.name): (str(n.inputs[0].name), str(n.inputs[1].name)) for n in products}  # type: ignore[union-attr]
    _, found = collect_samples(model, Wanted({}, pairs), BATCHES, threads=1)
    rates = {one: share_rate(*found[name].factors, bits) for name, (one, _) in pairs.items()}
    for tensor in maps:
        spec, last = quantizer.specs[tensor], 2**bits - 1
        assert (float(spec.scale), int(spec.zero_point)) == (1.0, last)
        assert spec.details == {"eighths": rates[tensor]}
        assert rates[tensor] != last  # what they would have without a search


@pytest.mark.parametrize("evenly", [1.0, 0.0])
@pytest.mark.parametrize("norms", [True, False])
def test_steps_follow_the_weights_that_read_them(
    norms: bool, evenly: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what fc1 reads, a norm's output or a sum: the rows of its weight have the factor that is
    best for both, not the channels' own steps; for the rows of the token that the head reads, where
    it alone counts."""
    monkeypatch.setattr(importance, "EVENLY", evenly)
    model = transformer(Choices(norms=norms))
    blocks, sites = find_blocks(model), find_sites(model, find_blocks(model))
    config = QuantizeConfig(quantizer="lowbit", bits="4/4/4", rotate=False, threads=1)
    (fc1,) = [n for n in model.graph if n.op_type == "Linear"
              and constant(n.inputs[1]).shape == (WIDTH, 4 * WIDTH)]  # type: ignore[union-attr] # fmt: skip
    held, tensor = fc1.inputs[1], str(fc1.inputs[0].name)  # type: ignore[union-attr]
    assert held is not None
    before = np.float32(constant(held)) * LEVELS[:, None]
    held.const_value = ir.tensor(before, name=held.name)
    tokens = values(model, [tensor], np.concatenate(BATCHES))[tensor]
    rows = tokens.reshape(-1, WIDTH) if evenly else tokens[:, 0]
    low, high = channel_bounds(rows, 16)
    half, variance = (high - low) / 2, rows.var(axis=0, dtype=np.float64)
    products = [Product(np.abs(before), 4)]
    factor = choose_factor(half, variance, products, 16).factor
    assert np.abs(factor / normalized(half) - 1).max() > 0.2
    plan = rewritten(Plan(model, blocks, sites, config), BATCHES)
    (after,) = [constant(n.inputs[1]) for n in plan.model.graph if n.name == fc1.name]
    found = np.median(np.asarray(after) / before, axis=1)
    np.testing.assert_allclose(found, factor, rtol=1e-3)
