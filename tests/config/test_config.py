"""Options: what is parsed, what is refused and in which words, and YAML both ways."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_onnx.config.bits import Bits
from ptq_onnx.config.flags import flags
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import MoreBits, Selector
from ptq_onnx.errors import ConfigError


@given(st.tuples(st.integers(2, 8), st.integers(2, 16), st.integers(2, 16)))
def test_bits_round_trip(widths: tuple[int, int, int]) -> None:
    bits = Bits(*widths)
    assert Bits.parse(str(bits)) == bits
    assert (bits.weights, bits.activations, bits.attention) == widths
    assert QuantizeConfig(bits=str(bits)).widths == bits


@pytest.mark.parametrize(
    "text",
    ["", "8", "8/8", "8/8/8/8", "x/8/8", "8/8/", "8/-8/8", "8/8/4.5", "8 8 8", "½/8/8", "²/8/8"],
)
def test_bits_that_are_no_bits(text: str) -> None:
    with pytest.raises(ConfigError, match="expected weights/activations/attention"):
        Bits.parse(text)
    with pytest.raises(ConfigError):
        QuantizeConfig(bits=text)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("width", [0, 1, 17, 99])
def test_bits_out_of_range(width: int, place: int) -> None:
    widths = [8, 8, 8]
    widths[place] = width
    name, most = (("weights", 8), ("activations", 16), ("attention", 16))[place]
    with pytest.raises(
        ConfigError, match=f"{name} must be a whole number from 2 to {most}, got {width}"
    ):
        Bits.parse("/".join(map(str, widths)))


def test_weights_have_a_byte_at_most() -> None:
    with pytest.raises(ConfigError, match="weights must be a whole number from 2 to 8, got 9"):
        QuantizeConfig(bits="9/16/16")
    assert QuantizeConfig(bits="8/16/16").widths == Bits(8, 16, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fc2", MoreBits(Selector("fc2"), 8)),
        ("fc2=8", MoreBits(Selector("fc2"), 8)),
        ("residual1@0-2=16", MoreBits(Selector("residual1", (0, 1, 2)), 16)),
        (" all = 12", MoreBits(Selector("all"), 12)),
    ],
)
def test_more_bits_and_how_many(text: str, expected: MoreBits) -> None:
    found = MoreBits.parse(text)
    assert found == expected
    assert MoreBits.parse(str(found)) == found


@pytest.mark.parametrize("number", ["7", "17", "", "x", "16=16", "-8", "1e1"])
def test_more_bits_that_are_none(number: str) -> None:
    with pytest.raises(ConfigError, match="expected 8 to 16 bits behind '=', as in fc2=16"):
        QuantizeConfig(more_bits=(f"fc2={number}",))


@pytest.mark.parametrize(
    "options",
    [{"bits": "8/16/8"}, {"bits": "8/8/9"}, {"more_bits": ("fc2", "fc1=16")}],
)
@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_targets_of_eight_bits(options: dict[str, Any], target: str) -> None:
    with pytest.raises(ConfigError, match=f"files for {target} hold activations of at most 8 bits"):
        QuantizeConfig(target=target, **options)


def test_bits_are_whole_numbers() -> None:
    for wrong in (True, 8.0, "8", None):
        with pytest.raises(ConfigError, match="whole number"):
            Bits(wrong, 8, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fc2", Selector("fc2")),
        (" fc2 ", Selector("fc2")),
        ("all", Selector("all")),
        ("fc2@5", Selector("fc2", (5,))),
        ("fc2@5,6", Selector("fc2", (5, 6))),
        ("residual1@0-3", Selector("residual1", (0, 1, 2, 3))),
        ("norm1@0-2,7,1-3", Selector("norm1", (0, 1, 2, 7, 3))),
        ("qkv.weight@11", Selector("qkv.weight", (11,))),
        ("fc2@4-4", Selector("fc2", (4,))),
    ],
)
def test_selectors(text: str, expected: Selector) -> None:
    found = Selector.parse(text)
    assert found == expected
    assert Selector.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "FC2", "fc2@", "fc2@x", "fc2@-1", "fc2@1-", "fc2@1--2", "fc2@1-2-3", "fc2@1,,2",
             "fc2 5", "@5", "5", "fc2@5@6", "fc2@3-1"]
)  # fmt: skip
def test_selectors_that_select_nothing(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Selector.parse(text)
    assert f"'{text}'" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        QuantizeConfig(keep_float=(text,))


def test_what_selectors_match() -> None:
    assert Selector("fc2").matches("fc2", 5)
    assert Selector("fc2", (5,)).matches("fc2", 5)
    assert not Selector("fc2", (5,)).matches("fc2", 6)
    assert not Selector("fc2", (5,)).matches("fc1", 5)
    assert not Selector("fc2", (5,)).matches("fc2", None)
    assert Selector("all").matches("head", None)
    assert Selector("all", (1,)).matches("fc1", 1)
    assert not Selector("all", (1,)).matches("fc1", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "best"}, "There is no quantizer 'best'"),
        ({"method": "max"}, "There is no method 'max'"),
        ({"target": "tpu"}, "There is no target 'tpu'"),
        ({"arithmetic": "fixed"}, "There is no arithmetic 'fixed'"),
        ({"preprocess": "mnist"}, "There is no preprocess 'mnist'"),
        ({"bits": "0/8/8"}, "weights must be a whole number from 2 to 8, got 0"),
        ({"bits": "8/99/8"}, "activations must be"),
        ({"bits": "8/8/x"}, "--bits 8/8/x"),
        ({"images": 0}, "--images must be at least 1"),
        ({"images": 1.5}, "--images must be at least 1"),
        ({"images": True}, "--images must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"analysis_images": 0}, "--analysis-images must be at least 1"),
        ({"threads": -1}, "--threads must be at least 0"),
        ({"rounding": "up"}, "There is no rounding 'up'"),
        (
            {"quantizer": "fqvit", "rounding": "gptq"},
            "--rounding gptq belongs to the quantizer deploy",
        ),
        ({"opset": 20}, "--opset 20"),
        ({"target": "openvino", "opset": 19}, "20 to 23"),
        ({"opset": 24}, "--opset 24"),
        ({"ptf_k": -1}, "--ptf-k -1: must be from 0 to 12"),
        ({"ptf_k": 13}, "--ptf-k 13"),
        ({"quantizer": "fqvit", "ptf": False, "ptf_k": 3}, "exclude each other"),
        ({"keep_float": ("auto",)}, "known to --per-channel only"),
        ({"per_channel": ("fc2@9-1",)}, "runs backwards"),
        ({"quantizer": "vanilla", "convolutions": True}, "--convolutions: deploy alone has them"),
        ({"target": "openvino", "convolutions": True}, "--convolutions: deploy alone has them"),
        ({"bits": "6/6/6", "convolutions": True}, "--convolutions: deploy alone has them"),
        ({"mixed": True}, "it is for --target qnn, and for --quantizer lowbit"),
        ({"quantizer": "vanilla", "ptf": False}, "--no-ptf belongs to the quantizer fqvit"),
        ({"quantizer": "vanilla", "ptf_k": 3}, "--ptf-k belongs to"),
        ({"quantizer": "vanilla", "ptf_k": 0}, "--ptf-k belongs to"),
        ({"quantizer": "channelwise", "lis": False}, "--no-lis belongs to"),
        ({"quantizer": "channelwise", "arithmetic": "integer"}, "--arithmetic integer belongs to"),
        ({"quantizer": "vanilla", "target": "integer"}, "use --quantizer fqvit"),
        ({"quantizer": "deploy", "target": "integer"}, "has no integer arithmetic"),
        ({"multiplier_bits": 3}, "--multiplier-bits 3: must be from 4 to 31"),
        ({"multiplier_bits": True}, "--multiplier-bits True"),
        ({"quantizer": "vanilla", "multiplier_bits": 16}, "--multiplier-bits belongs to"),
        (
            {"quantizer": "fqvit", "multiplier_bits": 16},
            "--multiplier-bits 16 belongs to integer arithmetic",
        ),
        ({"quantizer": "lowbit", "mixed_by": "layer"}, "by what widths are mixed: add --mixed"),
        ({"gelu": "polynomial"}, "--gelu polynomial belongs to integer arithmetic"),
        ({"target": "integer", "gelu": "sigmoid"}, "no gelu 'sigmoid'; choose one of table"),
        ({"target": "integer", "keep_float": ("fc2",)}, "--keep-float would leave tensors"),
        ({"target": "integer", "per_channel": ("fc2",)}, "--per-channel would leave tensors"),
        ({"target": "integer", "auto": True}, "--auto would leave tensors"),
        ({"more_bits": ("auto",)}, "--more-bits takes roles"),
        ({"quantizer": "lowbit", "per_channel": ("fc1",)}, "a range of its own already"),
        ({"quantizer": "lowbit", "auto": True}, "--auto with --quantizer lowbit"),
        ({"target": "qnn", "auto": True, "mixed": True}, "--auto with --mixed: either chooses"),
        ({"more_bits": ("fc2@9-1",)}, "runs backwards"),
        ({"max_drop": 1}, "--max-drop is the bound of --auto"),
        ({"min_sqnr": 20}, "--min-sqnr is the bound of --auto"),
        ({"auto": True, "max_drop": -0.5}, "--max-drop -0.5: must be from 0 to 100 points"),
        ({"auto": True, "max_drop": 101}, "must be from 0 to 100 points"),
        ({"auto": True, "max_drop": float("nan")}, "--max-drop nan: must be a number"),
        ({"auto": True, "min_sqnr": float("inf")}, "--min-sqnr inf: must be a number"),
        ({"auto": True, "max_drop": "little"}, "--max-drop little: must be a number"),
        ({"auto": True, "max_drop": True}, "--max-drop True: must be a number"),
        ({"auto": True, "max_drop": 1, "min_sqnr": 20}, "exclude each other"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantizeConfig(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_target_integer_computes_in_integers() -> None:
    assert QuantizeConfig(target="integer").arithmetic == "integer"
    assert QuantizeConfig().arithmetic == "float"


def test_methods_in_force() -> None:
    assert QuantizeConfig(quantizer="vanilla").effective_method == "percentile"
    assert QuantizeConfig(quantizer="channelwise").effective_method == "robust"
    assert QuantizeConfig().effective_method == "robust"
    assert QuantizeConfig(quantizer="vanilla", method="kl").effective_method == "kl"


CONFIGS = [
    QuantizeConfig(),
    QuantizeConfig(quantizer="vanilla", bits="4/8/8", method="omse", images=7, threads=2),
    QuantizeConfig(quantizer="channelwise", per_channel=("auto", "fc1@0-3"), report=False),
    QuantizeConfig(
        quantizer="fqvit", ptf_k=0, lis=False, keep_float=("head", "softmax@1,2"),
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125), size=(224, 192), crop_pct=0.9,
        interpolation="bicubic", opset=23,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_yaml_round_trip(config: QuantizeConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert QuantizeConfig.load(path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("quantiser: fqvit", "unknown option 'quantiser'"),
        ("- 1\n- 2", "must hold options"),
        ("just text", "must hold options"),
        ("a: [1", "is not YAML"),
        ("bits: 8/8/99", "attention must be"),
        ("images: many", "--images must be at least 1"),
        ("keep_float: [FC2]", "is not a role"),
    ],
)
def test_wrong_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        QuantizeConfig.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["ptf_k: lots", "opset: '21'", "opset: x", "quantizer: [fqvit]", "keep_float: 5",
     "keep_float: [5]", "per_channel: null", "bits: null", "bits: 8"],
)  # fmt: skip
def test_values_of_a_wrong_type_are_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        QuantizeConfig.load(path)
    assert "\n" not in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        QuantizeConfig.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        QuantizeConfig.load(tmp_path)
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert QuantizeConfig.load(empty) == QuantizeConfig()
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read|is not YAML"):
        QuantizeConfig.load(binary)


def test_merging_replaces_what_is_given() -> None:
    base = QuantizeConfig(images=5)
    assert base.merged(images=None, batch=3) == QuantizeConfig(images=5, batch=3)
    with pytest.raises(ConfigError):
        base.merged(batch=0)


def test_a_lone_selector_is_not_taken_letter_by_letter(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("keep_float: head\nper_channel: fc2@5,6")
    found = QuantizeConfig.load(path)
    assert (found.keep_float, found.per_channel) == (("head",), ("fc2@5,6",))


BOUNDED = {n: f for n, f in flags(QuantizeConfig).items() if f.bounds}
NAMED = {n: f for n, f in flags(QuantizeConfig).items() if f.choices}


def test_bounds_and_names_are_the_fields_own() -> None:
    assert {"ptf_k", "multiplier_bits", "max_drop", "min_sqnr"} <= BOUNDED.keys()
    assert {"quantizer", "method", "precision", "rounding", "gelu", "target"} <= NAMED.keys()


@pytest.mark.parametrize("name", ["ptf_k", "multiplier_bits", "max_drop", "min_sqnr"])
def test_both_ends_of_the_bounds_are_allowed_and_nothing_beyond(name: str) -> None:
    assert BOUNDED[name].bounds is not None
    low, high = map(int, BOUNDED[name].bounds)
    owners: dict[str, dict[str, Any]] = {
        "ptf_k": {"quantizer": "fqvit"},
        "multiplier_bits": {"target": "integer"},
    }
    belongs = owners.get(name, {"auto": True})
    for value in (low, high):
        assert getattr(QuantizeConfig(**belongs, **{name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"{value}: must be from {low} to {high}"):
            QuantizeConfig(**belongs, **{name: value})


@pytest.mark.parametrize("name", NAMED)
def test_an_unknown_name_lists_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantizeConfig(**{name: "no such"})
    told = f"There is no {name} 'no such'; choose one of {', '.join(NAMED[name].choices)}."
    assert str(error.value) == told
