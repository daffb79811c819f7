"""Options that name roles and change nothing: said, in one line for each option."""

from typing import Any

import pytest
from prepared_models import DIGITS, ROOT, quantized

from ptq_onnx.pipeline.quantize import QuantizeConfig, quantize
from ptq_onnx.quantizers.idle_options import idle_options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantizer": "deploy", "more_bits": ("fc2",)}, ["--more-bits fc2"]),
        ({"quantizer": "deploy", "more_bits": ("fc2=16",)}, []),
        ({"quantizer": "deploy", "more_bits": ("fc2", "fc1=16")}, ["--more-bits fc2"]),
        ({"quantizer": "deploy", "bits": "8/4/8", "more_bits": ("fc2",)}, []),
        ({"quantizer": "deploy", "keep_float": ("residual1", "fc2")}, ["--keep-float residual1"]),
        ({"quantizer": "deploy", "per_channel": ("fc2",)}, []),
        ({"quantizer": "deploy", "per_channel": ("fc1.weight",)}, ["--per-channel fc1.weight"]),
        ({"quantizer": "vanilla", "per_channel": ("fc1.weight",)}, []),
        (
            {"quantizer": "deploy", "keep_float": ("residual1", "residual2")},
            ["--keep-float residual1, residual2"],
        ),
        (
            {"quantizer": "deploy", "more_bits": ("fc2",), "keep_float": ("residual1",)},
            ["--keep-float residual1", "--more-bits fc2"],
        ),
    ],
)
def test_what_changes_no_tensor_is_said(options: dict[str, Any], words: list[str]) -> None:
    quantizer = quantized(**options)
    config = quantizer.plan.config
    notes = idle_options(config, quantizer)
    assert [note.split(" change")[0] for note in notes] == words
    for note in notes:
        assert (" changes nothing: the tensors that it names" in note) == ("," not in note[:30])
    rules = dict(quantizer.rules)
    assert idle_options(config, quantizer) == notes
    assert dict(quantizer.rules) == rules


def test_the_last_word_counts_where_two_name_one_tensor() -> None:
    """lowbit gives just as many bits as the last says: the first is what could be left out."""
    words = ("fc2.weight=6", "fc2.weight=3")
    quantizer = quantized(quantizer="lowbit", bits="4/4/4", more_bits=words)
    (note,) = idle_options(quantizer.plan.config, quantizer)
    assert note.startswith("--more-bits fc2.weight=6 changes nothing")


def test_a_run_tells_it_among_its_notes(tmp_path: Any) -> None:
    config = QuantizeConfig(
        quantizer="deploy", more_bits=("fc2",), images=8, threads=1, report=False
    )
    done = quantize(DIGITS, config=config, output=tmp_path / "a", calib=ROOT / "img/digits/calib")
    (note,) = [n for n in done.report["notes"] if "--more-bits" in n]
    assert "are in float, or have as many" in note
