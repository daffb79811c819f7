"""--scales: a report.json is checked as a schema, and for fit with the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.scales_file import check_fit, read_scales
from ptq_onnx.numerics.spec import Site

ENTRY: dict[str, Any] = {
    "tensor": "t", "role": "fc1", "bits": 8, "signed": True, "symmetric": True,
    "granularity": "tensor", "code": "uniform", "method": "minmax", "renormalize": False,
    "scale": 0.5, "zero_point": 0, "axis": None, "clip": [-64.0, 63.5],
}  # fmt: skip


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps({"tensors": list(entries), "other": {"a": [1]}}))
    return path


def site(*shape: int | str) -> Site:
    return Site("t", "fc1", 0, (len(shape) - 1,), shape, None, ())


def test_a_good_one(tmp_path: Path) -> None:
    (spec,) = read_scales(write(tmp_path, ENTRY)).values()
    assert (float(spec.scale), int(spec.zero_point), spec.axis) == (0.5, 0, None)
    check_fit(spec, site("batch", 6, 8), "--scales x")


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}, {"scale": float("inf")},
        {"scale": 1e38}, {"scale": "0.5"}, {"scale": None}, {"scale": [[0.5], [0.5, 1.0]]},
        {"scale": [0.5, 0.5]}, {"scale": True}, {"zero_point": 0.5}, {"zero_point": 10**30},
        {"zero_point": [0]}, {"bits": 0}, {"bits": 64}, {"bits": "8"}, {"signed": 1},
        {"granularity": "all"}, {"code": "log3"}, {"axis": -1}, {"axis": 10**9}, {"clip": [0.0]},
        {"clip": [0.0, float("nan")]}, {"tensor": 3}, {"block_size": -1}, {"stored": "int4"},
        {"alpha": {"shape": [2], "values": [1]}}, {"alpha": {"shape": [1], "values": [200]}},
        {"factor": {"shape": [1], "values": [0.0]}}, {"factor": {"shape": [1 << 40], "values": []}},
        {"factor": {"shape": [-1], "values": [1.0]}}, {"factor": [1.0]},
    ],
    ids=str,
)  # fmt: skip
def test_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a report") as raised:
        read_scales(write(tmp_path, ENTRY | change))
    assert len(str(raised.value)) < 500


def test_missing_and_twice(tmp_path: Path) -> None:
    for key in ENTRY.keys() - {"role"}:
        with pytest.raises(ConfigError, match="is not a report"):
            read_scales(write(tmp_path, {k: v for k, v in ENTRY.items() if k != key}))
    with pytest.raises(ConfigError, match="has a tensor twice"):
        read_scales(write(tmp_path, ENTRY, ENTRY))


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", "null", "[" * 100_000, '{"tensors": 3}', '{"tensors": {}}', "\x00"],
)
def test_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a report"):
        read_scales(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("change", "shape", "reason"),
    [
        ({"scale": [0.5, 0.5], "zero_point": [0, 0], "axis": 1}, (8, 3), "2 scales along axis 1"),
        ({"scale": [0.5], "zero_point": [0]}, (8,), "expected one"),
        ({"axis": 1}, (8, 3), "it has one scale, and an axis 1 of several"),
        ({"scale": [0.5], "zero_point": [0], "axis": 3}, (8, 3), "has no axis 3"),
        ({"zero_point": 200}, (8,), "a zero point is not from -128 to 127"),
        ({"clip": [1.0, -1.0]}, (8,), "runs backwards"),
        ({"factor": {"shape": [3], "values": [1.0, 1.0, 1.0]}}, ("batch", 8), "factors"),
        ({"block_size": 4, "scale": [[0.5]], "zero_point": [[0]]}, (8, 1), "expected [2, 1]"),
    ],
)
def test_misfits(
    tmp_path: Path, change: dict[str, Any], shape: tuple[int | str, ...], reason: str
) -> None:
    (spec,) = read_scales(write(tmp_path, ENTRY | change)).values()
    with pytest.raises(ConfigError) as raised:
        check_fit(spec, site(*shape), "--scales x")
    assert reason in str(raised.value)


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    for count, said in ((38, repr("y" * 38)), (39, "'" + "y" * 36 + "...")):
        with pytest.raises(ConfigError) as raised:
            read_scales(write(tmp_path, ENTRY | {"bits": "y" * count}))
        assert f"got {said}." in str(raised.value)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ({"bits": 2}, {"bits": 1}),
        ({"bits": 16}, {"bits": 17}),
        ({"scale": 1e-37}, {"scale": 0.9e-37}),
        ({"scale": 1e30}, {"scale": 1.1e30}),
        ({"zero_point": -(1 << 16)}, {"zero_point": -(1 << 16) - 1}),
        ({"zero_point": 1 << 16}, {"zero_point": (1 << 16) + 1}),
        ({"axis": 0}, {"axis": -1}),
        ({"axis": 7}, {"axis": 8}),
        ({"clip": [-3.4028234e38, 3.4028234e38]}, {"clip": [-3.403e38, 3.403e38]}),
        ({"clip": [0.0, 1.0]}, {"clip": [0.0, 1.0, 2.0]}),
        ({"block_size": 1 << 22}, {"block_size": (1 << 22) + 1}),
        ({"tensor": "t" * 4096}, {"tensor": "t" * 4097}),
        *(
            ({"alpha": {"shape": [1], "values": [e]}}, {"alpha": {"shape": [1], "values": [o]}})
            for e, o in ((126, 127), (-126, -127))
        ),
        (
            {"factor": {"shape": [1] * 8, "values": [1.0]}},
            {"factor": {"shape": [1] * 9, "values": [1.0]}},
        ),
        (
            {"factor": {"shape": [2, 3], "values": [1.0] * 6}},
            {"factor": {"shape": [2, 3], "values": [1.0] * 5}},
        ),
        ({"stored": "int16"}, {"stored": "uint4"}),
    ],
    ids=str,
)  # fmt: skip
def test_edges_of_what_is_read(
    tmp_path: Path, inside: dict[str, Any], outside: dict[str, Any]
) -> None:
    assert len(read_scales(write(tmp_path, ENTRY | inside))) == 1
    with pytest.raises(ConfigError, match="is not a report"):
        read_scales(write(tmp_path, ENTRY | outside))


def test_the_first_of_two_problems_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tensors\.0\.bits: .*, got '8'\.$"):
        read_scales(write(tmp_path, ENTRY | {"bits": "8", "signed": 1}))


def test_a_report_has_64_mb_at_most(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.touch()
    os.truncate(path, 66 << 20)
    with pytest.raises(ConfigError, match="it has more than 64 MB"):
        read_scales(path)
