"""Comparison: files of other tools are matched by name or position, and measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from prepared_models import DIGITS, ROOT, images, prepared
from typer.testing import CliRunner

from ptq_onnx.analysis.compare import (
    FloatBlocks,
    block_outputs,
    compare,
    find_reference,
    quantized_file,
)
from ptq_onnx.analysis.comparison_results import Comparison
from ptq_onnx.analysis.matching import Tapped, in_order, match
from ptq_onnx.cli.app import app
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import METADATA_KEY, Preprocess, open_images
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.quantize import quantize, read_scales
from ptq_onnx.report.compare_page import render_comparison

VAL = ROOT / "img/digits/val"


class Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        name = onnx.load(str(DIGITS)).graph.input[0].name
        self.batches = iter([{name: images()[i : i + 8]} for i in range(0, 16, 8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours``, an output folder, and files of onnxruntime: qdq.onnx and qoperator.onnx."""
    folder = tmp_path_factory.mktemp("compare")
    config = QuantizeConfig(quantizer="vanilla", images=16, report=False, threads=1)
    quantize(DIGITS, config=config, output=folder / "ours")
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        quantize_static(
            str(DIGITS), str(folder / f"{form.name.lower()}.onnx"), Calibration(),
            quant_format=form, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def source() -> ImageSource:
    text = prepared(DIGITS).model.metadata_props[METADATA_KEY]
    return open_images(VAL, Preprocess.from_json(text), limit=40)


@pytest.fixture(scope="module")
def found(folder: Path, source: ImageSource) -> Comparison:
    paths = [folder / "ours", folder / "qdq.onnx", folder / "qoperator.onnx"]
    labels = labels_for(source, str(ROOT / "img/digits/val.txt"))
    return compare(paths, source, labels=labels, block_images=8, threads=1)


def test_every_block_is_found_by_name(found: Comparison) -> None:
    assert [c.name for c in found.contenders] == ["float", "ours", "qdq", "qoperator"]
    for one in found.contenders[1:]:
        assert [b.block for b in one.blocks] == list(range(6))
        assert {b.how for b in one.blocks} == {"name"}
        assert all(b.snr_db is not None and 15 < b.snr_db < 60 for b in one.blocks)


def test_block_snr_is_that_of_the_tensors(
    found: Comparison, folder: Path, source: ImageSource
) -> None:
    batch = np.concatenate(list(source.batches(8)))[:8]
    tensor = block_outputs(DIGITS)[3]
    name = next(b.tensor for b in found.contenders[3].blocks if b.block == 3) or ""
    other = Tapped(folder / "qoperator.onnx").session([name]).run(batch)[name].astype(np.float64)
    plain = Tapped(DIGITS).session([tensor]).run(batch)[tensor].astype(np.float64)
    snr = -10 * np.log10(((other - plain) ** 2).sum() / (plain**2).sum())
    got = next(b.snr_db for b in found.contenders[3].blocks if b.block == 3)
    assert got == pytest.approx(snr, abs=0.2)


def test_accuracy_size_and_ops_are_those_of_the_file(
    found: Comparison, folder: Path, source: ImageSource
) -> None:
    labels = labels_for(source, str(ROOT / "img/digits/val.txt"))
    file = folder / "qdq.onnx"
    expected = evaluate(file, source, labels, reference=folder / "ours/fused.onnx", threads=1)
    got = found.contenders[2]
    assert (got.top1, got.agreement) == (expected.top1, expected.agreement)
    assert got.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.3)
    assert got.bytes == file.stat().st_size
    nodes = [n.op_type for n in onnx.load(str(file)).graph.node]
    assert got.quantized_ops["QuantizeLinear"] == nodes.count("QuantizeLinear")
    assert "QLinearMatMul" in found.contenders[3].quantized_ops
    assert found.contenders[0].quantized_ops == {}
    assert all(c.ms_per_image > 0 for c in found.contenders)
    assert (found.images, found.block_images) == (40, 8)


@pytest.mark.parametrize("file", ["qdq.onnx", "qoperator.onnx"])
def test_renamed_tensors_are_found_by_position(folder: Path, tmp_path: Path, file: str) -> None:
    model = onnx.load(str(folder / file))
    keep = {v.name for v in [*model.graph.input, *model.graph.output]}
    new: dict[str, str] = {}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name and name not in keep:
                    names[i] = new.setdefault(name, f"t{len(new)}")
    for tensor in model.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    del model.graph.value_info[:]
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    wanted = block_outputs(DIGITS)
    values = Tapped(DIGITS).session(list(wanted.values())).run(images()[:2])
    got = match(Tapped(tmp_path / "renamed.onnx"), values, images()[:2])
    by_name = match(Tapped(folder / file), values, images()[:2])
    assert {one[1] for one in got.values() if one} == {"position"}
    pairs = [(one[0], other[0]) for one, other in zip(got.values(), by_name.values(), strict=True)
             if one is not None and other is not None]  # fmt: skip
    assert len(pairs) == len(wanted)
    # The sum itself, or the DequantizeLinear behind it: the same values.
    mine = Tapped(tmp_path / "renamed.onnx").session([a for a, _ in pairs]).run(images()[:2])
    others = Tapped(folder / file).session([b for _, b in pairs]).run(images()[:2])
    for a, b in pairs:
        np.testing.assert_allclose(mine[a], others[b], rtol=1e-5)


def test_codes_of_an_integer_file_are_read_by_the_report_beside_it(
    source: ImageSource, tmp_path: Path
) -> None:
    """Nothing in such a file tells the scale of its codes; alone it has no blocks to compare."""
    config = QuantizeConfig(target="integer", rotate=False, images=8, report=False, threads=1)
    quantize(DIGITS, config=config, output=tmp_path / "ours")
    alone = tmp_path / "alone.onnx"
    alone.write_bytes((tmp_path / "ours/quantized.onnx").read_bytes())
    outputs = block_outputs(DIGITS)
    floats = FloatBlocks(DIGITS, list(outputs.values()), source, 2, 1)
    assert {b.tensor for b in floats.blocks(Tapped(alone, 1), outputs)} == {None}
    specs = read_scales(tmp_path / "ours/report.json")
    found = floats.blocks(Tapped(tmp_path / "ours/quantized.onnx", 1, specs), outputs)
    for one, tensor in zip(found, outputs.values(), strict=True):
        assert (one.tensor, one.how) == (f"{tensor}_quantized", "name")
        assert one.snr_db is not None
        assert one.snr_db > 15
        assert specs[tensor].factor is not None  # which no search for one scale would find


def test_order_is_kept() -> None:
    likeness = np.array([[0.9, 0.99, 0.0, 0.2], [0.95, 0.1, 0.8, 0.1], [0.0, 0.0, 0.3, 0.4]])
    assert in_order(likeness) == [1, 2, None]
    assert in_order(np.zeros((2, 3))) == [None, None]


def test_page_shows_what_the_json_holds(found: Comparison) -> None:
    page = render_comparison(found)
    for one in found.contenders[1:]:
        assert f"{one.bytes / 1e6:.2f}" in page
        assert f"{one.sqnr_db:.1f}" in page
        for block in one.blocks:
            assert f"<td>{block.snr_db:.1f}</td>" in page
    assert "http" not in page.replace("http-equiv", "")


def test_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "compare", str(folder / "ours"), str(folder / "qdq.onnx"), "--val", str(VAL), "--labels",
        str(ROOT / "img/digits/val.txt"), "--analysis-images", "2", "--threads", "1",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    stored = json.loads((tmp_path / "out/compare.json").read_text())
    assert printed == stored
    assert [c["name"] for c in stored["contenders"]] == ["float", "ours", "qdq"]
    assert (tmp_path / "out/compare.html").read_text().count("<tr>") > 8


def test_bad_input_is_named(folder: Path, tmp_path: Path, source: ImageSource) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no quantized\.onnx"):
        quantized_file(tmp_path / "empty")
    with pytest.raises(ConfigError, match="does not exist"):
        quantized_file(tmp_path / "nowhere.onnx")
    with pytest.raises(ConfigError, match="--reference"):
        find_reference([folder / "qdq.onnx"], None)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="broken"):
        compare([tmp_path / "broken.onnx"], source, reference=DIGITS)
    shutil.rmtree(tmp_path / "empty")


def test_blocks_of_a_turned_stream_are_compared_in_its_own_coordinates(
    tmp_path: Path, source: ImageSource
) -> None:
    for name, rotate in (("plain", False), ("turned", True)):
        config = QuantizeConfig(
            quantizer="fqvit", ptf=False, rotate=rotate, images=16, report=False, threads=1
        )
        quantize(DIGITS, config=config, output=tmp_path / name)
    found = compare([tmp_path / "plain", tmp_path / "turned"], source, block_images=16, threads=1)
    plain, turned = ([b.snr_db for b in c.blocks] for c in found.contenders[1:])
    assert len(plain) == len(turned) == 6
    assert min(b for b in turned if b is not None) > 15
    assert None not in turned
