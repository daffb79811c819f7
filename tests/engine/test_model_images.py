"""Images made from a model: the loss against slow formulas, and what following it does."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_onnx.blocks.walking import name_of
from ptq_onnx.engine import model_images
from ptq_onnx.engine.model_images import (
    Attended,
    Reads,
    ahead_of_patches,
    changed,
    drawn_pairs,
    entropy,
    similarities,
    tokens_of,
    variation,
)
from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.synthetic import MadeSource
from ptq_onnx.pipeline.made_images import reads_of
from ptq_onnx.preparation.prepare import prepare

SHOWN = Preprocess((0.5,) * 3, (0.25,) * 3, (32, 32))


def slow_entropy(numbers: np.ndarray) -> float:
    """-∫ f log f by the formula, a place and a number at a time, in 64 bits."""
    width, step, total = 0.05, 0.05, 0.0
    for place in range(41):
        u = -1 + step * place
        kernel = [math.exp(-((u - float(x)) ** 2) / (2 * width**2)) for x in numbers]
        density = sum(kernel) / (len(numbers) * width * math.sqrt(2 * math.pi))
        total -= density * math.log(density + 1e-6) * step
    return total


def test_entropy_is_that_of_the_formula() -> None:
    random = np.random.default_rng(0)
    rows = np.stack([
        random.uniform(-1, 1, 40),
        0.3 + 0.1 * random.normal(size=40),
        np.full(40, 0.5),
    ]).astype(np.float32)  # fmt: skip
    found = entropy(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, [slow_entropy(row) for row in rows], atol=1e-5)
    # Of numbers that are all the same it is the kernel's own: log(h √(2πe)).
    assert found[2] == pytest.approx(math.log(0.05 * math.sqrt(2 * math.pi * math.e)), abs=1e-3)
    assert found[0] > found[1] > found[2]


def test_similarities_are_cosines_of_pairs() -> None:
    tokens = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    pairs = drawn_pairs(5, np.random.default_rng(0))
    assert [tuple(p) for p in pairs.T.tolist()] == list(combinations(range(5), 2))
    found = similarities(torch.from_numpy(tokens), pairs).numpy()
    for image, row in zip(tokens, found, strict=True):
        for (one, other), cosine in zip(combinations(image, 2), row, strict=True):
            wanted = one @ other / np.sqrt((one @ one) * (other @ other))
            assert cosine == pytest.approx(wanted, abs=1e-6)


def test_many_pairs_are_drawn() -> None:
    one, other = drawn_pairs(200, np.random.default_rng(0)).numpy()
    assert len(one) == model_images.PAIRS
    assert (one != other).all()
    assert len({*zip(one, other, strict=True)}) > 900
    assert {*one} | {*other} == set(range(200))
    assert abs(np.mean(one < other) - 0.5) < 0.05


def test_variation_is_the_mean_of_neighbours() -> None:
    x = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])
    assert float(variation(x)) == pytest.approx((9 + 4) / 2 + (1 + 0) / 2)


def test_tokens_are_the_places_of_an_image() -> None:
    windows = torch.arange(2 * 4 * 9 * 5.0).reshape(8, 9, 5)
    found = tokens_of(windows, 2, 2)
    assert found is not None
    assert torch.equal(found[1], windows[4:].reshape(36, 5))
    plane = torch.arange(2 * 5 * 3 * 4.0).reshape(2, 5, 3, 4)
    found = tokens_of(plane, 1, 2)
    assert found is not None
    assert torch.equal(found[1, 7], plane[1, :, 1, 3])
    assert tokens_of(torch.zeros(7, 5), -1, 2) is None
    assert tokens_of(torch.zeros(2, 5, 3), 0, 2) is None


@pytest.mark.parametrize(
    ("tokens", "patches", "ahead"), [(65, 64, 1), (69, 64, 5), (64, 64, 0), (16, 64, 0)]
)
def test_class_token_and_registers_are_left_out(tokens: int, patches: int, ahead: int) -> None:
    some = torch.zeros(1, tokens, 2)
    assert ahead_of_patches(some, torch.zeros(1, patches, 2)) == ahead
    assert ahead_of_patches(some, None) == 0


@pytest.fixture(scope="module")
def tiny(short: Path) -> tuple[TorchForm, Reads]:
    """The embedded model with one block."""
    prepared = prepare(short, free=True)
    return TorchForm(prepared.model.graph, {}), reads_of(prepared)


def test_what_the_loss_reads_of_a_model(short: Path, tiny: tuple[TorchForm, Reads]) -> None:
    form, reads = tiny
    made = {str(n.outputs[0].name): name_of(n) for n in form.nodes}
    assert [made[a.name] for a in reads.attended] == prepare(short).blocks.nodes("proj")
    shapes = {n: tuple(v.shape) for n, v in form.run(
        {form.inputs[0]: torch.zeros(2, 3, 32, 32)}, reads.names
    ).items()}  # fmt: skip
    assert reads.logits is not None
    assert reads.patches is not None
    (attended,) = reads.attended
    assert shapes[reads.logits] == (2, 10)
    assert (shapes[attended.name], attended.axis) == ((2, 65, 64), 2)
    assert (shapes[reads.patches.name], reads.patches.axis) == ((2, 64, 8, 8), 1)


def test_the_model_answers_more_clearly(tiny: tuple[TorchForm, Reads]) -> None:
    """The loss falls step by step but for the shifts; all of its parts had their share."""
    form, reads = tiny
    drawn = MadeSource(SHOWN, 8).drawn_pixels()
    batch = model_images._Batch(form, reads, drawn, SHOWN, np.random.default_rng(0))
    losses = list(batch.losses())
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert 0 <= float(batch.x.detach().min()) < float(batch.x.detach().max()) <= 1
    made = batch.pixels()
    x = torch.from_numpy(((np.stack([drawn, made]) / 255 - 0.5) / 0.25).astype(np.float32))
    before, after = (form.run({form.inputs[0]: one.permute(0, 3, 1, 2)}, reads.names) for one in x)
    assert reads.logits is not None
    chosen = (batch.classes * 10).long()
    sure = [
        float(torch.log_softmax(r[str(reads.logits)], 1)[range(8), chosen].mean())
        for r in (before, after)
    ]
    assert sure[1] > sure[0] + 0.3
    spread = [float(torch.stack([*batch.entropies(r)]).mean()) for r in (before, after)]
    assert spread[1] > spread[0]


def test_the_entropy_alone_is_followed(tiny: tuple[TorchForm, Reads]) -> None:
    form, reads = tiny
    alone = Reads(None, reads.attended, reads.patches)
    batch = model_images._Batch(
        form, alone, MadeSource(SHOWN, 2).drawn_pixels(), SHOWN, np.random.default_rng(0)
    )
    losses = list(batch.losses())
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_seed_alone_decides(
    tiny: tuple[TorchForm, Reads], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_images, "STEPS", 2)
    drawn = MadeSource(SHOWN, 10).drawn_pixels()
    one, again, other = (changed(*tiny, drawn, SHOWN, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one.shape, one.dtype) == ((10, 32, 32, 3), np.uint8)
    for index in range(10):
        assert (one[index] != other[index]).any()
        assert (one[index] != drawn[index]).any()


def test_a_fixed_batch_is_filled(
    tiny: tuple[TorchForm, Reads], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_images, "STEPS", 2)
    sizes, run = [], TorchForm.run

    def spy(form, feeds, names):  # type: ignore[no-untyped-def]
        sizes.append(len(feeds[form.inputs[0]]))
        return run(form, feeds, names)

    monkeypatch.setattr(TorchForm, "run", spy)
    told: list[int] = []
    drawn = MadeSource(SHOWN, 4).drawn_pixels()
    made = changed(*tiny, drawn, SHOWN, fixed=3, advance=told.append)
    assert sizes == [3, 3, 3, 3]
    assert told == [3, 3, 1, 1]
    assert [(a != b).any() for a, b in zip(made, drawn, strict=True)] == [True] * 4


def test_a_loss_that_is_not_finite(tiny: tuple[TorchForm, Reads]) -> None:
    form, reads = tiny
    wrong = Preprocess((0.5,) * 3, (0.25,) * 3, (32, 32))
    object.__setattr__(wrong, "std", (math.nan,) * 3)
    with pytest.raises(ValueError, match="not finite"):
        changed(form, reads, MadeSource(SHOWN, 1).drawn_pixels(), wrong)


def test_an_attention_of_one_token_says_nothing(tiny: tuple[TorchForm, Reads]) -> None:
    batch = model_images._Batch(
        tiny[0], Reads(None, (Attended("x", -1),), None), MadeSource(SHOWN, 2).drawn_pixels(),
        SHOWN, np.random.default_rng(0),
    )  # fmt: skip
    assert list(batch.entropies({"x": torch.zeros(2, 1, 4)})) == []


def test_the_class_token_has_no_part_in_the_entropy(tiny: tuple[TorchForm, Reads]) -> None:
    random = np.random.default_rng(3)
    reads = Reads(None, (Attended("x", -1),), Attended("p", 1))
    drawn = MadeSource(SHOWN, 2).drawn_pixels()
    batch = model_images._Batch(tiny[0], reads, drawn, SHOWN, random)
    patches = random.normal(size=(2, 4, 3)).astype(np.float32)
    tokens = np.concatenate([patches[:, :2] * 9, patches], axis=1)
    found = {"x": torch.from_numpy(tokens), "p": torch.zeros(2, 3, 2, 2)}
    (entropies,) = batch.entropies(found)
    unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    cosines = [[a @ b for a, b in combinations(image, 2)] for image in unit]
    wanted = np.mean([slow_entropy(np.array(row)) for row in cosines])
    assert float(entropies) == pytest.approx(wanted, abs=1e-5)


def test_pictures_are_shifted_and_mirrored(
    tiny: tuple[TorchForm, Reads], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two of 32 places at most, which go round, and in about half of the steps."""
    shown: list[torch.Tensor] = []

    def spy(form, feeds, names):  # type: ignore[no-untyped-def]
        shown.append(feeds[form.inputs[0]].detach())
        return {}

    monkeypatch.setattr(TorchForm, "run", spy)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (1, 32, 32, 3))
    nothing = Reads(None, (), None)
    batch = model_images._Batch(tiny[0], nothing, ramp, SHOWN, np.random.default_rng(0))
    for _ in range(40):
        batch.loss()
    rows = [torch.round((x[0, 0, 0] * 0.25 + 0.5) * 255).int().tolist() for x in shown]
    found = {
        (mirrored, shift)
        for row in rows
        for mirrored, way in ((False, row), (True, row[::-1]))
        for shift in range(-2, 3)
        if way == np.roll(range(32), shift).tolist()
    }
    assert found == {(mirrored, shift) for mirrored in (False, True) for shift in range(-2, 3)}
