"""The check of the normalisation: on models whose answer is known, and on the sample models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from ptq_onnx.calibration.preprocess_check import (
    ERRORS,
    MARGIN,
    MOST,
    NAMED,
    STAGES,
    PreprocessCheck,
    check_preprocess,
    clearly_surer,
    may_be_surer,
    top_confidence,
)
from ptq_onnx.evaluation.network import Classifier
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import FloatArray, Preprocess

INCEPTION, IMAGENET = Preprocess.named("inception", 4), Preprocess.named("imagenet", 4)


def pictures(count: int = 40, channels: int = 3) -> FloatArray:
    return np.random.default_rng(0).random((count, channels, 4, 4)).astype(np.float32)


class Model:
    """Surest where its input, averaged over the batch, is centred at zero with deviation one."""

    def __init__(self, preprocess: Preprocess, strength: float = 4.0) -> None:
        self.preprocess, self.strength, self.sizes = preprocess, strength, list[int]()

    def __call__(self, images: FloatArray) -> FloatArray:
        self.sizes.append(len(images))
        mean = np.array(self.preprocess.mean, np.float32)[:, None, None]
        std = np.array(self.preprocess.std, np.float32)[:, None, None]
        wanted = (pictures(MOST, images.shape[1]).mean() - mean) / std
        distance = np.abs(images.mean((2, 3), keepdims=True) - wanted).mean((1, 2, 3))
        logits = np.zeros((len(images), 10), np.float32)
        logits[:, 3] = self.strength / (1 + distance)
        return logits


def test_confidence_is_the_largest_softmax() -> None:
    logits = np.array([[1, 2, 3], [1000, 0, 0], [-5, -5, -5]], np.float32)
    powers = np.exp(np.array([1.0, 2, 3]))
    np.testing.assert_allclose(top_confidence(logits), [powers[2] / powers.sum(), 1, 1 / 3])
    probabilities = np.array([[0.2, 0.8], [0.5, 0.5]], np.float32)
    np.testing.assert_allclose(top_confidence(probabilities), [0.8, 0.5], rtol=1e-6)


def test_clearly_surer_takes_a_margin_and_more_than_chance() -> None:
    own = np.full(16, 0.5)
    assert clearly_surer(own + MARGIN + 0.01, own)
    assert not clearly_surer(own + MARGIN - 0.01, own)
    swing = np.where(np.arange(16) % 2, 0.5, -0.3)  # 0.1 ahead, error 0.1
    assert not clearly_surer(own + swing, own)
    assert not clearly_surer(own - 0.2, own)
    assert not clearly_surer(np.ones(1), np.zeros(1))


def test_what_may_yet_be_surer_goes_on() -> None:
    own = np.full(4, 0.5)
    assert may_be_surer(own + MARGIN + 0.01, own)
    assert not may_be_surer(own + MARGIN - 0.01, own)  # ahead, but never by the margin
    swing = np.array([0.3, -0.3, 0.3, -0.3])  # error 0.17
    assert may_be_surer(own + swing - 0.1, own)
    assert not may_be_surer(own + swing - 0.2, own)
    assert may_be_surer(np.zeros(1), np.ones(1))


def by_name(found: PreprocessCheck) -> dict[str, tuple[float, int]]:
    return {c.name: (c.confidence, c.images) for c in (found.in_force, *found.others)}


def test_the_right_normalisation_raises_no_warning() -> None:
    model = Model(INCEPTION)
    found = check_preprocess(model, pictures(), INCEPTION)
    assert found.warning is None
    assert found.in_force.name == "inception"
    assert {c.name for c in found.others} == set(NAMED) - {"inception"}
    assert max(found.others, key=lambda c: c.confidence).confidence < found.in_force.confidence
    # None was ahead: the first images were enough
    assert model.sizes == [STAGES[0]] * len(NAMED)
    assert {images for _, images in by_name(found).values()} == {STAGES[0]}


def test_the_wrong_normalisation_is_named_with_the_right_one() -> None:
    model = Model(INCEPTION)
    found = check_preprocess(model, pictures(), replace(INCEPTION, std=(0.1, 0.1, 0.1)))
    assert found.warning is not None
    assert "normalisation inception than with yours" in found.warning
    assert "--preprocess inception" in found.warning
    assert "on 32 images" in found.warning
    assert by_name(found)["inception"][1] == by_name(found)["yours"][1] == MOST
    assert by_name(found)["inception"][0] > by_name(found)["yours"][0] + MARGIN
    assert "\n" not in found.warning


def test_a_normalisation_without_a_name_gets_numbers() -> None:
    trained = Preprocess((0.0,) * 3, (1.0,) * 3, (4, 4))
    found = check_preprocess(Model(trained, 6), pictures(), replace(INCEPTION, std=(0.05,) * 3))
    assert found.warning is not None
    assert "--mean 0,0,0 --std 1,1,1" in found.warning


def test_gray_pictures() -> None:
    gray = Preprocess((0.5,), (0.5,), (4, 4), channels=1)
    found = check_preprocess(Model(gray), pictures(channels=1), gray)
    assert (found.in_force.name, found.warning) == ("inception", None)
    assert all(len(c.mean) == 1 for c in found.others)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 33, 100])
def test_any_number_of_pictures(count: int) -> None:
    model = Model(INCEPTION)
    found = check_preprocess(model, pictures(count), replace(INCEPTION, std=(0.1,) * 3))
    assert found.in_force.images == min(count, MOST)
    assert sum(model.sizes[:1]) == min(count, STAGES[0])


def test_a_model_that_does_not_mind_raises_no_warning() -> None:
    found = check_preprocess(lambda x: np.eye(10, dtype=np.float32)[: len(x)], pictures(), IMAGENET)
    assert found.warning is None


def test_a_model_that_does_not_mind_costs_few_images() -> None:
    """Differences of nothing are no reason to go on, whichever sign they have."""
    sizes = list[int]()

    def classify(images: FloatArray) -> FloatArray:
        sizes.append(len(images))
        return np.eye(10, dtype=np.float32)[np.arange(len(images))] * (1 + 1e-4 * len(sizes))

    found = check_preprocess(classify, pictures(), IMAGENET)
    assert found.warning is None
    assert sizes == [STAGES[0]] * len(NAMED)


@pytest.mark.real
@pytest.mark.parametrize(
    ("model", "norm", "better"),
    [
        ("vit", "inception", None),
        ("vit", "imagenet", "inception"),
        ("deit", "imagenet", None),
        ("deit", "inception", "imagenet"),
    ],
)
def test_sample_models(
    shared: Path, real_models: dict[str, Path], model: str, norm: str, better: str | None
) -> None:
    plain = Preprocess((0.0,) * 3, (1.0,) * 3, (224, 224))
    images = open_images(shared / "imagenet" / "calib", plain, limit=MOST)
    found = check_preprocess(
        Classifier(real_models[model], 1),
        np.concatenate(list(images.batches(8))),
        Preprocess.named(norm),
    )
    if better is None:
        assert found.warning is None
    else:
        assert found.warning is not None
        assert f"--preprocess {better}" in found.warning


def test_what_white_becomes_under_each() -> None:
    """(1 - mean) / std of the published constants of timm, CLIP and plain pixels."""
    white: dict[tuple[float, ...], int] = {}

    def classify(images: FloatArray) -> FloatArray:
        assert (images == images[:1, :, :1, :1]).all()
        white[tuple(round(float(v), 4) for v in images[0, :, 0, 0])] = len(images)
        return np.zeros((len(images), 10), np.float32)

    check_preprocess(classify, np.ones((8, 3, 2, 2), np.float32), INCEPTION)
    expected = {
        (1.0, 1.0, 1.0), (255.0, 255.0, 255.0), (2.2489, 2.4286, 2.64), (1.9303, 2.0749, 2.1459),
    }  # fmt: skip
    assert {tuple(np.round(v, 3)) for v in white} == {tuple(np.round(v, 3)) for v in expected}


def test_logits_that_add_up_to_one_are_no_probabilities() -> None:
    powers = np.exp([2, -0.5, -0.5])
    found = top_confidence(np.array([[2, -0.5, -0.5]], np.float32))
    assert found[0] == pytest.approx(powers[0] / powers.sum())


def test_probabilities_may_be_zero() -> None:
    """A softmax that underflows is not taken for logits."""
    rows = np.array([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0]], np.float32)
    np.testing.assert_allclose(top_confidence(rows), [1.0, 0.75])


def test_pictures_are_spread_evenly_over_the_folder() -> None:
    """Of 256 every eighth is used, and every fourth of those at first; each has its number as its
    gray."""
    seen: list[np.ndarray] = []

    def classify(images: FloatArray) -> FloatArray:
        seen.append(images[:, 0, 0, 0] * np.float32(256))
        return np.tile(np.array([[5.0, 0.0]], np.float32), (len(images), 1))

    numbers = np.arange(256, dtype=np.float32) / 256
    pictures = np.tile(numbers[:, None, None, None], (1, 3, 2, 2))
    plain = Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (2, 2))
    check_preprocess(classify, pictures, plain)
    assert [round(float(v)) for v in seen[0]] == [0, 32, 64, 96]


def test_the_common_normalisations_are_those_that_were_published() -> None:
    """ImageNet's of torchvision, CLIP's of open_clip."""
    found = check_preprocess(Model(INCEPTION), pictures(), INCEPTION)
    assert {c.name: (c.mean, c.std) for c in (found.in_force, *found.others)} == NAMED
    assert NAMED == {
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "inception": ((0.5,) * 3, (0.5,) * 3),
        "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "[0, 1]": ((0.0,) * 3, (1.0,) * 3),
        "[0, 255]": ((0.0,) * 3, (1 / 255,) * 3),
    }


def test_surer_is_by_the_mean_and_its_standard_error() -> None:
    """Against the textbook's deviation of a sample, of few images and of many."""
    seen = set()
    for seed in range(300):
        random = np.random.default_rng(seed)
        count = int(random.integers(2, 7))
        own = random.uniform(0, 1, count)
        other = own + random.normal(0.06, 0.05, count)
        difference = (other - own).tolist()
        mean, error = fmean(difference), stdev(difference) / count**0.5
        clear, maybe = mean > max(0.05, 2 * error), mean + error > 0.05
        assert clearly_surer(other, own) == clear
        assert may_be_surer(other, own) == maybe
        seen.add((clear, maybe))
    assert seen == {(True, True), (False, True), (False, False)}


def test_shares_are_told_from_logits_by_their_sums() -> None:
    for total, share in ((1.0009, True), (0.9991, True), (1.01, False), (0.99, False)):
        values = np.array([[0.25 * total, 0.75 * total]], np.float32)
        expected = 0.75 * total if share else 1 / (1 + np.exp(-0.5 * total))
        assert top_confidence(values) == pytest.approx(expected, rel=1e-6)
    signed = np.array([[-0.5, 1.5]], np.float32)
    assert top_confidence(signed) == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("count", [32, 64, 12])
def test_every_stage_is_spread_over_the_pictures(count: int) -> None:
    """Every fourth, those half way between them, and the rest; of many pictures 32."""
    seen: list[float] = []

    def classify(images: FloatArray) -> FloatArray:
        if len(images) and not np.isclose(images.std(), 0):
            seen.extend(images[:, 0, 0, 0].tolist())
        return np.eye(10, dtype=np.float32)[np.zeros(len(images), int)] * len(seen)

    numbered = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 2, 2))
    plain = Preprocess((0.0,) * 3, (1.0,) * 3, (2, 2))
    check_preprocess(classify, numbered.astype(np.float32), plain)
    assert (STAGES, MOST, MARGIN, ERRORS) == ((4, 8, 16, 32), 32, 0.05, 2.0)
    used = min(count, 32)
    turns = [i for part in (0, 2, 1, 3) for i in range(part, used, 4)]
    assert seen[:4] == [i * count // used for i in turns[:4]]
