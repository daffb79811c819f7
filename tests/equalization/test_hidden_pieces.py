"""Massive hidden channels in pieces: the sum, the bound, the file, and whole runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from digits_runs import IMAGES, quantized, sqnr
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from scipy.special import erf
from small_transformer import TOKENS, WIDTH, Choices, transformer

import ptq_onnx
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.row_samples import EvenSample
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization import low_bits
from ptq_onnx.equalization.hidden_pieces import LINEAR_FROM, held_in_one, on_grid, split_hidden
from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.expansions import EXPANSIONS
from ptq_onnx.graph.formula import DOMAIN
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.codes.code import Numbers
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.range_search import logarithmic_range
from ptq_onnx.preparation.model_sessions import open_plain
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/digits_vit.onnx"
CHANNEL, TIMES, HIDDEN = 5, 60.0, 256
PLAIN = {"quantizer": "fqvit", "ptf": False, "lis": False, "rotate": False}
"""One scale for each activation."""


def with_large_channel(path: Path, behind: float, lower: float = 0.0) -> Path:
    """The embedded model with a hidden channel of block 2 that is 60 times as large, and counts
    ``behind`` of what it did; before that it is lower by so much."""
    model = onnx.load(MODEL)
    arrays = {t.name: t for t in model.graph.initializer}
    linears = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in arrays]
    up = [n for n in linears if tuple(arrays[n.input[1]].dims) == (64, HIDDEN)][2]
    down = [n for n in linears if tuple(arrays[n.input[1]].dims) == (HIDDEN, 64)][2]
    add = next(n for n in model.graph.node if up.output[0] in n.input)
    names = up.input[1], down.input[1], next(name for name in add.input if name in arrays)
    first, second, bias = (numpy_helper.to_array(arrays[name]).copy() for name in names)
    first[:, CHANNEL] *= TIMES
    second[CHANNEL] *= behind
    bias[CHANNEL] = TIMES * (bias[CHANNEL] - lower) if lower else bias[CHANNEL]
    for name, array in zip(names, (first, second, bias), strict=True):
        arrays[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel that is large, and does what it did."""
    return with_large_channel(tmp_path_factory.mktemp("massive") / "massive.onnx", 1 / TIMES)


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel that is large on few tokens, and does sixty times what it did."""
    return with_large_channel(tmp_path_factory.mktemp("rare") / "rare.onnx", 1.0, 1.0)


@pytest.fixture(scope="module")
def split(massive: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a run with one scale for each activation."""
    folder = massive.parent / "split"
    return folder, quantized(massive, folder, **PLAIN)


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / 2 * (1 + erf(x / np.sqrt(2))))


@given(st.floats(6, 20), st.integers(1, 30), st.integers(0, 10_000))
def test_pieces_add_up(bound: float, count: int, seed: int) -> None:
    """To what the channel held, but for the dip of GELU below zero: 0.17 at most."""
    x = np.random.default_rng(seed).uniform(-5, bound * count, 500)
    pieces = [np.minimum(gelu(x - i * bound), bound) for i in range(count)]
    off = np.abs(sum(pieces) - gelu(x))
    assert off.max() < 0.1701
    between = np.min([np.abs(x - i * bound) for i in range(1, count)] or [x * 0 + 9], axis=0) < 6
    assert off[~between].max(initial=0) < 1e-6


@given(st.floats(-0.3, 0), st.floats(1, 50), st.sampled_from([16, 64, 256, 65536]))
def test_the_bound_is_a_code(low: float, bound: float, levels: int) -> None:
    """So is zero; the range reaches as low as it has to."""
    least, most = on_grid(low, bound, levels)
    step = (most - least) / (levels - 1)
    assert most == bound
    assert least <= low + 1e-9
    assert abs(least / step - round(least / step)) < 1e-6 * levels


def test_one_scale_holds_a_massive_channel(
    massive: Path, split: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, report = split
    (piece,) = report["pieces"]
    assert piece["block"] == 2
    assert piece["channels"] == sum(n > 1 for n in piece["counts"]) >= 1
    assert piece["counts"][CHANNEL] == max(piece["counts"]) > 2
    assert piece["added"] == sum(piece["counts"]) - HIDDEN <= HIDDEN / 8
    assert piece["gain_db"] > 6
    assert report["parity"]["rewritten"] < 1e-3
    assert any("held in pieces up to" in note for note in report["notes"])
    whole = quantized(massive, tmp_path / "whole", **PLAIN, split_hidden=False)
    assert whole["pieces"] == []
    gain = sqnr(massive, folder / "quantized.onnx")
    gain -= sqnr(massive, tmp_path / "whole/quantized.onnx")
    assert gain > 3


def test_codes_bound_the_file_and_a_min_the_float_model(
    massive: Path, split: tuple[Path, dict[str, Any]]
) -> None:
    folder, report = split
    (piece,) = report["pieces"]
    file, formed = (onnx.load(folder / f"{n}.onnx") for n in ("quantized", "formed"))
    assert "Min" not in {n.op_type for n in file.graph.node}
    (least,) = (n for n in formed.graph.node if n.op_type == "Min")
    assert least.output[0] == piece["tensor"]
    (limit,) = (t for t in formed.graph.initializer if t.name == least.input[1])
    assert float(numpy_helper.to_array(limit)) == np.float32(piece["bound"])
    (spec,) = (t for t in report["tensors"] if t["tensor"] == piece["tensor"])
    assert spec["clip"][1] == pytest.approx(piece["bound"], rel=1e-6)
    assert sqnr(massive, folder / "formed.onnx") > 50


@pytest.mark.parametrize("activation", ["Gelu", "QuickGelu", "Silu", "Relu"])
def test_what_a_split_model_computes(activation: str) -> None:
    """In ONNX Runtime, and in PPQ's executor on torch: what it did before, and one another's."""
    model = transformer(Choices())
    (node,) = (n for n in model.graph if n.op_type == "Gelu")
    node.op_type, node.domain = activation, DOMAIN if activation in EXPANSIONS else ""
    (down,) = (n for n in model.graph if is_linear(n) and n.inputs[1].shape[0] == 4 * WIDTH)
    up = down.inputs[0].producer().inputs[0].producer()
    for linear, factor, where in ((up, 200.0, np.s_[:, 3]), (down, 1 / 200, np.s_[3])):
        weight = linear.inputs[1].const_value.numpy().copy()
        weight[where] *= factor
        linear.inputs[1].const_value = ir.tensor(weight.astype(np.float32))
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="vanilla", method="minmax", threads=1)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    x = np.random.default_rng(3).normal(size=(64, TOKENS, WIDTH)).astype(np.float32)
    split, (piece,) = split_hidden(
        plan, held_in_one(plan, make_quantizer(plan).rules, [x]), least=2
    )
    before, after = (open_plain(m, 1).run(None, {"x": x})[0] for m in (model, split.model))
    assert piece.largest > 50
    assert np.abs(after - before).max() < 2e-4 * np.abs(before).max()
    (found,) = Simulator(split.model, mode="torch").run(x).values()
    assert np.abs(found - after).max() < 2e-5 * np.abs(after).max()


def test_only_one_uniform_scale_is_helped() -> None:
    """Codes of another kind, and factors of channels, hold a massive channel by themselves."""
    model = transformer(Choices())
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="vanilla", method="minmax", threads=1)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    rules = dict(make_quantizer(plan).rules)
    x = np.random.default_rng(3).normal(size=(8, TOKENS, WIDTH)).astype(np.float32)
    (one,) = held_in_one(plan, rules, [x])
    assert one.site.role == "gelu"
    rule = rules[one.site.tensor]
    for change in ({"code": Log2()}, {"grain": PerChannel()}, {"around": (RowMaximum(),)}):
        changed = {**rules, one.site.tensor: replace(rule, **change)}
        assert list(held_in_one(plan, changed, [x])) == []
    del rules[one.site.tensor]
    assert list(held_in_one(plan, rules, [x])) == []


@pytest.mark.parametrize("bits", ["3/3/3", "6/6/6", "6/8/8"])
def test_lowbit_s_codes_end_at_the_bound(rare: Path, tmp_path: Path, bits: str) -> None:
    """The sum of pieces that end before it would not be the channel."""
    options: dict[str, Any] = {"quantizer": "lowbit", "bits": bits, "rotate": False}
    few = bits != "6/8/8"
    report = quantized(rare, tmp_path, **options, split_hidden=None if few else True)
    (piece,) = report["pieces"]
    (spec,) = (t for t in report["tensors"] if t["tensor"] == piece["tensor"])
    assert piece["counts"][CHANNEL] == max(piece["counts"]) > 20
    assert piece["gain_db"] > 10
    assert spec["code"] == ("logarithmic" if few else "uniform")
    assert spec["clip"][1] == pytest.approx(piece["bound"], rel=1e-6)
    assert "Min" not in {n.op_type for n in onnx.load(tmp_path / "quantized.onnx").graph.node}


def test_logarithmic_codes_reach_a_channel_that_counts_little(
    massive: Path, tmp_path: Path
) -> None:
    """Where one scale would not, and pieces would save it 6 dB and more."""
    report = quantized(massive, tmp_path, quantizer="lowbit", bits="6/6/6", rotate=False)
    assert report["pieces"] == []


def test_lowbit_splits_where_it_has_few_bits() -> None:
    for bits, found in {"4/4/4": True, "8/4/8": True, "4/8/8": False}.items():
        assert QuantizeConfig(quantizer="lowbit", bits=bits).splits_hidden is found


@pytest.mark.parametrize(("bits", "gain"), [(4, 5), (6, 14)])
def test_a_rare_massive_value_costs_the_others_their_logarithmic_codes(
    bits: int, gain: float
) -> None:
    """Where it is nearly all of what is read, as in block 7 of ViT-Ti: dB of the others alone."""
    random = np.random.default_rng(bits)
    rows = gelu(random.normal(scale=1.5, size=(2000, 64)) - 1)
    rows[::40, CHANNEL] = random.uniform(150, 200, 50)
    bound, code = 10.0, Logarithmic()
    parts = [rows[:, CHANNEL] - i * bound for i in range(20)]
    pieces = np.stack([np.minimum(gelu(part), bound) for part in parts], axis=1)
    others = np.delete(rows, CHANNEL, axis=1).astype(np.float32)
    noise = []
    for own, highest in ((rows[:, [CHANNEL]], None), (pieces, bound)):
        whole = np.concatenate([own, others], axis=1).astype(np.float32).ravel()
        found = logarithmic_range(whole, np.ones(whole.size), bits, highest)
        numbers = Numbers(bits, False, found.scale, found.zero_point, found.details)
        held = code.values(code.codes(others, numbers), numbers)
        noise.append(float(np.sum((held - others) ** 2, dtype=np.float64)))
        assert highest is None or code.reach(numbers)[1] == pytest.approx(highest, rel=1e-6)
    assert 10 * np.log10(noise[0] / noise[1]) > gain


def test_eight_bits_have_factors_by_what_no_sample_has(
    massive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of 16 rows shows less of the massive channel than all rows do."""
    monkeypatch.setattr(EvenSample.__init__, "__defaults__", (16,))
    options: dict[str, Any] = {"quantizer": "lowbit", "bits": "8/8/8", "images": 16}
    report = quantized(massive, tmp_path / "all", **options)
    moved = [
        m for m in report["equalization"]["moves"] if (m["role"], m["into"]) == ("gelu", "Mul")
    ]
    assert {m["block"] for m in moved} >= {2}
    assert max(m["largest"] for m in moved) > 10
    monkeypatch.setattr(low_bits, "_wide_hidden", lambda *_: [])
    quantized(massive, tmp_path / "sample", **options)
    found = [sqnr(massive, tmp_path / name / "quantized.onnx") for name in ("all", "sample")]
    assert found[0] > found[1] + 1


def test_nothing_massive_nothing_split(tmp_path: Path) -> None:
    report = quantized(MODEL, tmp_path / "a", **PLAIN)
    assert report["pieces"] == []
    assert not any("ieces" in note for note in report["notes"])
    asked = quantized(MODEL, tmp_path / "b", **PLAIN, split_hidden=True)
    told = "--split-hidden: no hidden channel is so far above the rest that pieces pay."
    assert asked["pieces"] == []
    assert told in asked["notes"]


def test_factors_of_channels_need_no_pieces(massive: Path, tmp_path: Path) -> None:
    assert quantized(massive, tmp_path / "a", quantizer="fqvit", rotate=False)["pieces"] == []
    found = quantized(massive, tmp_path / "b", split_hidden=True)
    assert found["pieces"] == []
    assert "--split-hidden: deploy gives these channels factors of their own." in found["notes"]


@pytest.mark.parametrize("bits", ["8/8/8", "8/4/4", "8/16/16"])
def test_symmetric_codes_and_other_widths(massive: Path, tmp_path: Path, bits: str) -> None:
    report = quantized(
        massive, tmp_path / "a", quantizer="vanilla", split_hidden=True, bits=bits, method="minmax"
    )
    (piece,) = report["pieces"]
    (spec,) = (t for t in report["tensors"] if t["tensor"] == piece["tensor"])
    assert spec["clip"][1] == pytest.approx(piece["bound"], rel=1e-5)


def test_an_earlier_run_s_pieces_are_made_again(massive: Path, tmp_path: Path) -> None:
    """On a turned stream, and not chosen anew: the same file, bit for bit."""
    options = {**PLAIN, "rotate": True}
    report = quantized(massive, tmp_path / "a", **options)
    assert len(report["pieces"]) == len(report["rotation"]["turned"]) == 1
    again: dict[str, Any] = {**options, "scales": tmp_path / "a/report.json", "report": False}
    again |= {"calib": IMAGES / "calib", "images": 32, "threads": 1}
    ptq_onnx.quantize(massive, output=tmp_path / "b", **again)
    name = "quantized.onnx"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    for change in (
        {"counts": [1] * (HIDDEN - 1)},
        {"counts": [0] * HIDDEN},
        {"counts": [2] * HIDDEN},
        {"tensor": "other"},
        {"bound": -1.0},
    ):
        other = json.loads((tmp_path / "a/report.json").read_text())
        other["pieces"][0] |= change
        (tmp_path / "other.json").write_text(json.dumps(other))
        again["scales"] = tmp_path / "other.json"
        with pytest.raises(ConfigError, match="its hidden channels are not those of this model"):
            ptq_onnx.quantize(massive, output=tmp_path / "c", **again)
    with pytest.raises(ConfigError, match="is of a run with --split-hidden: use it here too"):
        ptq_onnx.quantize(massive, output=tmp_path / "c", **again, split_hidden=False)


def slow_pieces(
    highs: np.ndarray, low: float, power: np.ndarray, first: float, levels: int
) -> tuple[float, float, float, list[int]] | None:
    """The best of forty bounds by (M - low)² Σ k p that add an eighth at most; its gain, the range
    whose ends are codes, and the pieces. None below 6 dB, or with nothing above 1.5 bounds."""
    top = float(highs.max())
    if top <= 1.5 * first:
        return None
    tried = []
    for place in range(40):
        bound = first * (top / first) ** (place / 39)
        counts = [max(math.ceil(high / bound - 1e-12), 1) for high in highs]
        noise = (bound - low) ** 2 * float(np.dot(counts, power))
        tried.append((noise, bound, counts))
    allowed = [t for t in tried if sum(t[2]) <= len(highs) * 9 / 8]
    noise, bound, counts = min(allowed, key=lambda t: t[0])
    gain = 10 * math.log10(tried[-1][0] / noise)
    zero = min(math.ceil(-low / (bound - low) * (levels - 1)), levels - 2)
    return None if gain < 6 else (gain, -zero * bound / (levels - 1 - zero), bound, counts)


@pytest.mark.parametrize("many", [1, 2, 4])
def test_bounds_are_the_best_of_forty(many: int) -> None:
    """Of channels, ``many`` of which are up to a hundred times as large as the others."""
    model = transformer(Choices())
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="vanilla", method="minmax", threads=1)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    x = np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH)).astype(np.float32)
    (held,) = held_in_one(plan, make_quantizer(plan).rules, [x])
    width, found = len(held.highs), 0
    for seed in range(12):
        random = np.random.default_rng((seed, many))
        highs = random.uniform(0.5, 6, width)
        highs[random.choice(width, many, replace=False)] *= 10 ** random.uniform(0, 2, many)
        power, levels = random.uniform(0.1, 2, width), int(random.choice([16, 256]))
        low, least = -float(random.uniform(0, 0.3)), float(random.choice([1.0, 2.0]))
        one = replace(held, highs=highs, power=power, low=low, bits=round(math.log2(levels)))
        _, pieces = split_hidden(plan, [one], least)
        wanted = slow_pieces(highs, low, power, least * 6, levels)
        assert len(pieces) == (wanted is not None)
        if wanted is not None:
            (piece,) = pieces
            assert (piece.gain_db, piece.low, piece.bound) == pytest.approx(wanted[:3], rel=1e-6)
            assert list(piece.counts) == wanted[3]
            assert piece.channels == sum(n > 1 for n in wanted[3])
            assert piece.added == sum(wanted[3]) - width
            assert (piece.width, piece.largest) == (width, highs.max())
            found += 1
    assert 3 <= found < 12


def test_from_where_activation_functions_leave_values_as_they_are() -> None:
    """Within 1e-5."""
    functions = {
        "Gelu": gelu,
        "QuickGelu": lambda x: x / (1 + np.exp(-1.702 * x)),
        "Silu": lambda x: x / (1 + np.exp(-x)),
        "Relu": lambda x: np.maximum(x, 0),
    }
    assert LINEAR_FROM == {"Gelu": 6.0, "QuickGelu": 9.0, "Silu": 16.0, "Relu": 1e-3}
    for name, function in functions.items():
        x = np.linspace(LINEAR_FROM[name], 40, 200)
        assert np.abs(function(x) - x).max() <= 1e-5
