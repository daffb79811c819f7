"""The embedded model: small, a real transformer, and as good as it says."""

import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for, read_labels
from ptq_onnx.images.opening import METADATA_KEY, Preprocess, open_images

ROOT = Path(__file__).resolve().parents[1]
MODEL, IMAGES = ROOT / "models/digits_vit.onnx", ROOT / "img/digits"


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return onnx.load(MODEL)


@pytest.fixture(scope="module")
def preprocess(proto: onnx.ModelProto) -> Preprocess:
    return Preprocess.from_json({p.key: p.value for p in proto.metadata_props}[METADATA_KEY])


def test_accuracy(preprocess: Preprocess) -> None:
    images = open_images(IMAGES / "val", preprocess)
    labels = labels_for(images, IMAGES / "val.txt")
    result = evaluate(MODEL, images, labels, batch_size=50)
    assert result.count == 450
    assert np.bincount(labels).min() >= 40
    assert result.top1 is not None
    assert result.top1 >= 97


def test_file(proto: onnx.ModelProto, preprocess: Preprocess) -> None:
    onnx.checker.check_model(proto, full_check=True)
    assert MODEL.stat().st_size < 4e6
    assert proto.opset_import[0].version == 17
    value = proto.graph.input[0]
    assert (value.name, proto.graph.output[0].name) == ("input", "logits")
    dims = value.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert tuple(dim.dim_value for dim in dims[1:]) == preprocess.shape == (3, 32, 32)


def test_structure(proto: onnx.ModelProto) -> None:
    count = Counter(node.op_type for node in proto.graph.node)
    blocks = count["Softmax"]
    assert blocks == 6
    assert count["LayerNormalization"] == 2 * blocks + 1
    assert count["Erf"] == blocks
    assert count["Conv"] == 1
    weights = {tuple(w.dims) for w in proto.graph.initializer}
    assert {(64, 3, 4, 4), (64, 192), (64, 256), (256, 64)} <= weights


def test_images_are_disjoint_and_small() -> None:
    calibration = {path.name for path in (IMAGES / "calib").glob("*.png")}
    held_out = {path.name for path in (IMAGES / "val").glob("*.png")}
    assert (len(calibration), len(held_out)) == (128, 450)
    assert not calibration & held_out
    assert set(read_labels(IMAGES / "val.txt")) == held_out
    assert {Image.open(path).size for path in IMAGES.rglob("*.png")} == {(32, 32)}


def test_residual_stream_has_massive_channels(
    proto: onnx.ModelProto, preprocess: Preprocess
) -> None:
    """What makes the model worth quantizing: some channels far above the median."""
    import onnxruntime as ort

    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output.append(onnx.helper.make_empty_tensor_value_info(norms[-1].input[0]))
    session = ort.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = next(open_images(IMAGES / "calib", preprocess).batches(64))
    _, residual = session.run(None, {"input": batch})
    peaks = np.abs(residual).max(axis=(0, 1))
    assert peaks.max() > 2.5 * np.median(peaks)


def test_the_script_makes_these_images() -> None:
    pytest.importorskip("sklearn")
    script = runpy.run_path(str(ROOT / "models/train_digits.py"))
    pixels, classes = script["digits"]()
    for name, label in list(read_labels(IMAGES / "val.txt").items())[::45]:
        index = int(name[6:10])
        assert classes[index] == label
        np.testing.assert_array_equal(np.asarray(Image.open(IMAGES / "val" / name)), pixels[index])
