"""Values of options from YAML and Python: their kind and their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptq_onnx.cli.given import settings
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, PtqError
from ptq_onnx.images.preprocess import Preprocess


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"equalize": "false"}, "--equalize false: must be true or false, without quotes"),
        ({"report": 1}, "--report 1: must be true or false"),
        ({"quantizer": 3}, "--quantizer 3: must be text"),
        ({"threads": 5000}, "--threads 5000: must be from 0 to 256"),
        ({"crop_pct": 1e-9}, "--crop-pct 1e-09: must be from 0.1 to 1"),
        ({"crop_pct": float("nan")}, "--crop-pct nan: must be a number"),
        ({"crop_pct": "0.9"}, "--crop-pct 0.9: must be a number"),
        ({"images": 10**30}, "--images a number of 31 digits: must be from 1 to 1e+06"),
        ({"size": (224, 100_000)}, "--size 100000: must be from 1 to 8192"),
        ({"size": (224,)}, "--size a tuple: must be 2 times a whole number"),
        ({"mean": (0.5, "0.5", 0.5)}, "--mean a tuple: must be a list, each a number"),
        (
            {"std": (0.0, 1.0, 1.0)},
            "--std 0.0: must be from 1e-06 to 10; it is for pixels on the scale 0 to 1",
        ),
        ({"mean": (123.7, 116.3, 103.5)}, "--mean 123.7: must be from -1 to 1; it is for pixels"),
        ({"std": (58.4, 57.1, 57.4)}, "--std 58.4: must be from 1e-06 to 10; it is for pixels"),
        ({"std": (0.2, -0.2, 0.2)}, "--std -0.2: must be from 1e-06 to 10; it is for pixels"),
        ({"mean": (float("nan"),) * 3}, "--mean a tuple: must be a list, each a number"),
        ({"keep_float": ("fc2@0-99999999",)}, "no model has that many blocks"),
        ({"keep_float": {"fc2": 1}}, "--keep-float a dict: must be a list, each text"),
        ({"attention_heads": (10**9,)}, "--attention-heads 1000000000: must be from 0 to 9999"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantizeConfig(**given)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "size: 2001-01-01", "crop_pct: !!float y", "report: !!bool z", "bits: !!timestamp t",
        "size: 2001-13-45", "? [a]\n: b", "~: 1\nx: 2", "1: 2", "calib: [a]", "output: 3",
        "labels: true", 'val: "a\\0b"', "keep_float: 3", "a: &b [1]\nsize: *b",
        f"size: {'9' * 5000}", f"batch: {'9' * 4000}", "images: 1e400", "images: .nan",
    ],
)  # fmt: skip
def test_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(PtqError) as raised:
        settings(str(tmp_path / "a.yaml"), {})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500


def test_aliases_do_not_grow(tmp_path: Path) -> None:
    """Nine lines that would print as a gigabyte."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="no aliases"):
        settings(str(tmp_path / "a.yaml"), {})


@pytest.mark.parametrize(
    "text",
    [
        '{"mean": [0, 0, 0], "std": [1, 1, 1], "size": [8, 8], "crop_pct": 1e-9}',
        '{"mean": [0, 0, 1e300], "std": [1, 1, 1], "size": [8, 8]}',
        '{"mean": [0, 0, NaN], "std": [1, 1, 1], "size": [8, 8]}',
        '{"mean": [0, 0, 0], "std": [1, 1, 1e-30], "size": [8, 8]}',
        '{"mean": [0, 0, 0], "std": [1, 1, 1], "size": [8, 1000000]}',
        '{"mean": [0, 0, 0], "std": [1, 1, 1], "size": [8, 8], "interpolation": []}',
        "[" * 100_000,
    ],
)
def test_metadata_of_a_model(text: str) -> None:
    with pytest.raises(ConfigError):
        Preprocess.from_json(text)


@pytest.mark.parametrize(("option", "value"), [("--size", "9" * 5000), ("--sizes", "9" * 5000)])
def test_long_numbers(option: str, value: str, tmp_path: Path) -> None:
    from fuzz.cases import command
    from fuzz.oracle import judge

    words = ("calibration-curve", "m.onnx", "--val", "x", option, value)
    found = judge(lambda: command(*words), tmp_path)
    assert (found.finding, found.code) == ("", 2)
    assert len(found.text) < 300


@pytest.mark.parametrize("text", ["nan,1,1", "1,inf,1", "1,-inf,1", "", "0.5;0.5;0.5", "1,,1"])
def test_numbers_that_are_none(text: str) -> None:
    for name in ("mean", "std"):
        with pytest.raises(ConfigError, match=f"--{name} '.*': expected numbers"):
            settings(None, {name: text})


@pytest.mark.parametrize(
    ("text", "given", "wanted"),
    [("", None, True), ("sensitivity: false", None, False), ("sensitivity: true", None, True),
     ("sensitivity: false", True, True), ("", False, False)],
)  # fmt: skip
def test_what_analyse_takes_for_granted(
    text: str, given: bool | None, wanted: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    found, _ = settings(str(tmp_path / "a.yaml"), {"sensitivity": given}, sensitivity=True)
    assert found.sensitivity is wanted
