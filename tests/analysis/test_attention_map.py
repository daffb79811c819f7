"""Attention figures: sizes, panels, one scale for all models, and the limit of the file."""

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from sample_report import make_attention

from ptq_onnx.analysis.attention_results import AttentionMap
from ptq_onnx.report.attention_map import LARGEST_FILE, _Sheet, draw_attention, overlay


def sheet(found: AttentionMap) -> _Sheet:
    made = _Sheet(found, found.maps, found.image.shape[0] / found.image.shape[1])
    made.draw()
    return made


@pytest.mark.parametrize(
    ("heads", "grid", "size"),
    [
        (3, (14, 14), (224, 224)),
        (12, (14, 14), (224, 224)),
        (16, (24, 24), (384, 384)),
        (4, (8, 8), (32, 32)),
        (6, (7, 14), (112, 224)),
    ],
)
def test_file_is_readable_and_small(
    tmp_path: Path, heads: int, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    path = tmp_path / "block_11.png"
    draw_attention(make_attention(heads, grid, size), path)
    assert path.stat().st_size <= LARGEST_FILE
    with Image.open(path) as picture:
        width, height = picture.size
        assert 600 <= width <= 1100
        assert 400 <= height <= 1600
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["block_11.png"]


def test_noise_stays_below_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
    draw_attention(replace(make_attention(16), image=noise), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size <= LARGEST_FILE


@pytest.mark.parametrize("heads", [3, 12, 16])
def test_panels_of_all_models_and_heads(heads: int) -> None:
    found = make_attention(heads)
    axes = sheet(found).figure.axes
    assert len(axes) == 1 + 3 + 3 + 1 + 3 * heads
    titles = [a.get_title() for a in axes]
    assert [t for t in titles if t.startswith("head ")] == [f"head {h}" for h in range(heads)]
    under = [a.get_xlabel() for a in axes if "SNR" in a.get_xlabel()]
    assert under == ["SNR 12.3 dB", "SNR 24.7 dB"]
    same = replace(found, snr_db={"float": None, "vanilla": np.inf, "fqvit": 0.0})
    under = [label for a in sheet(same).figure.axes if (label := a.get_xlabel())]
    assert under[:3] == ["reference", "identical", "SNR 0.0 dB"]
    texts = [t.get_text() for t in sheet(found).figure.texts]
    assert texts == ["Attention of block 11: class token", "cat.jpg"]


def test_panels_stay_inside_and_apart() -> None:
    for heads in (3, 8, 9, 16):
        boxes = [a.get_position() for a in sheet(make_attention(heads)).figure.axes]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= 1 and b.y1 <= 1 for b in boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
                assert apart, (heads, a, b)


def test_mean_maps_share_one_scale_and_hold_the_means() -> None:
    found = make_attention(4)
    images = [a.images[0] for a in sheet(found).figure.axes if len(a.images) == 1]
    bare = [i for i in images[:7] if i.get_array().shape == (14, 14)]
    assert len({i.get_clim() for i in bare}) == 1
    assert bare[0].get_clim()[0] == 0
    for image, maps in zip(bare, found.maps.values(), strict=True):
        np.testing.assert_allclose(image.get_array(), maps.mean(axis=0), rtol=1e-6)
    values = np.concatenate([m.mean(axis=0).ravel() for m in found.maps.values()])
    assert bare[0].get_clim()[1] == pytest.approx(np.percentile(values, 95))


def test_each_head_has_one_scale_for_all_models() -> None:
    found = make_attention(4)
    small = [a.images[0] for a in sheet(found).figure.axes[8:]]
    limits = [i.get_clim() for i in small]
    for head in range(4):
        assert len(set(limits[3 * head : 3 * head + 3])) == 1
    assert len(set(limits)) == 4
    np.testing.assert_array_equal(small[4].get_array(), found.maps["vanilla"][1])


def test_chosen_heads_are_drawn_alone() -> None:
    """Their maps, under their numbers; the means stay those of all heads."""
    found = make_attention(12)
    axes = _Sheet(found, found.maps, 1.0, (7, 2, 7, 40)).draw().axes
    assert [t for a in axes if (t := a.get_title()).startswith("head")] == ["head 7", "head 2"]
    small = [a.images[0] for a in axes[8:]]
    assert len(small) == 2 * 3
    np.testing.assert_array_equal(small[1].get_array(), found.maps["vanilla"][7])
    np.testing.assert_array_equal(small[3].get_array(), found.maps["float"][2])
    bare = next(a.images[0] for a in axes[1:] if a.images[0].get_array().shape == (14, 14))
    np.testing.assert_allclose(bare.get_array(), found.maps["float"].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("labels", [("float",), ("float", "vanilla"), ("a", "b", "c", "$x")])
def test_any_number_of_models(tmp_path: Path, labels: tuple[str, ...]) -> None:
    draw_attention(make_attention(labels=labels), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_empty_and_broken_maps_draw(tmp_path: Path) -> None:
    found = make_attention(2)
    broken = found.maps["vanilla"].copy()
    broken[0, 0, 0] = np.nan
    maps = {**found.maps, "vanilla": broken, "fqvit": np.zeros_like(broken)}
    strange = replace(found, maps=maps, image_name="a$b_{^" * 30)
    draw_attention(strange, tmp_path / "a.png")
    zeros = {label: np.zeros_like(broken) for label in found.maps}
    draw_attention(replace(found, maps=zeros), tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_overlay_mixes_grey_picture_and_colour() -> None:
    picture = np.full((4, 4, 3), 200, np.uint8)
    for weight, cover in ((0.0, 0.35), (1.0, 0.7)):
        got = overlay(picture, np.full((2, 2), weight, np.float32))
        color = np.array(mpl.colormaps["inferno"](weight)[:3]) * 255
        expected = (1 - cover) * 200 + cover * color
        assert got.dtype == np.uint8
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=0.51)


def test_overlay_puts_the_weight_where_it_belongs() -> None:
    weights = np.zeros((2, 4), np.float32)
    weights[1, 3] = 1
    got = overlay(np.zeros((20, 40, 3), np.uint8), weights).sum(axis=-1)
    assert got[19, 39] == got.max()
    assert got[0, 0] == got.min()
    assert len(np.unique(got[15])) > 5  # bilinear, not in steps
