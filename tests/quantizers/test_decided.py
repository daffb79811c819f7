"""What is decided before any number is known can be read, line by line."""

from __future__ import annotations

from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.grain import Blocks, PowersOfTwo
from ptq_onnx.numerics.spec import Rule
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer


def quantizer(**options: object) -> SiteQuantizer:
    model = transformer(Choices())
    blocks = find_blocks(model)
    config = QuantizeConfig(threads=1, **options)  # type: ignore[arg-type]
    return make_quantizer(Plan(model, blocks, find_sites(model, blocks), config))


def test_a_line_for_every_site_in_the_graphs_order() -> None:
    made = quantizer(quantizer="vanilla", bits="4/8/6", keep_float=("head",))
    lines = dict(line.split(": ", 1) for line in str(made.decided).splitlines())
    assert [name.partition(" (")[0] for name in lines] == list(made.plan.sites)
    by_site = {name.partition(" (")[2][:-1]: text for name, text in lines.items()}
    assert by_site["head"] == "float, kept in float by request"
    activation = "8-bit signed uniform codes, symmetric, a scale per tensor, range by percentile"
    assert by_site["blocks.0.fc1"] == f"{activation}, stored as uint8"
    assert by_site["blocks.0.softmax"] == f"6{activation[1:]}, stored as uint8"
    assert by_site["blocks.0.fc2.weight"].startswith("4-bit signed uniform codes")


def test_a_site_has_a_rule_or_a_reason() -> None:
    decided = quantizer(quantizer="deploy").decided
    assert decided.rules.keys() | decided.floats.keys() == decided.sites.keys()
    assert not decided.rules.keys() & decided.floats.keys()


def test_a_rule_tells_its_grain_and_what_is_done_around_it() -> None:
    rows = Rule(8, False, False, around=(RowMaximum(),), method="minmax")
    assert str(rows) == (
        "8-bit unsigned uniform codes, a scale per tensor, around it row, range by minmax,"
        " stored as uint8"
    )
    assert "a scale per 16 rows" in str(Rule(4, grain=Blocks(16)))
    assert "a scale per ptf" in str(Rule(grain=PowersOfTwo()))


def test_rules_that_differ_read_differently() -> None:
    rules = [
        Rule(), Rule(7), Rule(signed=False), Rule(symmetric=False), Rule(grain=PowersOfTwo()),
        Rule(method="mse"), Rule(around=(RowMaximum(),)), Rule(stored="int8"),
    ]  # fmt: skip
    assert len(set(map(str, rules))) == len(rules)
