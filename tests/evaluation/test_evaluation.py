"""Evaluation: exact numbers on hand-made models, odd models, and the sample models."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ptq_onnx.errors import ImageError, ModelError, PtqError
from ptq_onnx.evaluation.evaluate import evaluate, logits, session
from ptq_onnx.evaluation.network import Network
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import ImageSource, Preprocess, open_images
from ptq_onnx.runtime.devices import cuda_works

PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (4, 4))
FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(48, 6)).astype(np.float32)
PICTURES = RNG.normal(size=(11, 3, 4, 4)).astype(np.float32)
WANT = PICTURES.reshape(11, 48) @ WEIGHT


def classifier(
    weight: np.ndarray = WEIGHT,
    batch: int | str = "batch",
    dtype: int = FLOAT,
    extra: bool = False,
    shape: tuple[object, ...] = (3, 4, 4),
) -> bytes:
    """Flatten and a matrix product, [batch, 3, 4, 4] → [batch, classes]."""
    value = numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(dtype)), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["flat"], axis=1)]
    nodes.append(helper.make_node("MatMul", ["flat", "w"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", dtype, [batch, weight.shape[1]])]
    if extra:  # an output before the logits, of another rank
        nodes.append(helper.make_node("Relu", ["x"], ["tokens"]))
        outputs.insert(0, helper.make_tensor_value_info("tokens", dtype, [batch, 3, 4, 4]))
    inputs = [helper.make_tensor_value_info("x", dtype, [batch, *shape])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [value])
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


@pytest.fixture
def images() -> ImageSource:
    return open_images(PICTURES, PLAIN)


class TestLogits:
    @pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
    @pytest.mark.parametrize("batch", ["batch", 1, 3, 16])
    def test_any_batch(self, images: ImageSource, batch: int | str, batch_size: int) -> None:
        got = logits(classifier(batch=batch), images, batch_size=batch_size, threads=1)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, WANT, rtol=1e-4, atol=1e-5)

    def test_path_and_progress(self, images: ImageSource, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(classifier())
        calls: list[tuple[int, int]] = []
        got = logits(path, images, batch_size=5, progress=lambda *done: calls.append(done))
        np.testing.assert_allclose(got, WANT, rtol=1e-4, atol=1e-5)
        assert calls == [(5, 11), (10, 11), (11, 11)]

    def test_first_output_of_rank_two(self, images: ImageSource) -> None:
        np.testing.assert_allclose(logits(classifier(extra=True), images), WANT, atol=1e-4)

    def test_half_precision(self, images: ImageSource) -> None:
        got = logits(classifier(dtype=TensorProto.FLOAT16), images)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, WANT, atol=0.05)


class TestEvaluate:
    def test_accuracy(self, images: ImageSource) -> None:
        order = np.argsort(-WANT, axis=1)
        labels = order[:, 0].copy()
        labels[:3] = order[:3, 1]  # second choice: only in the top five
        labels[3] = order[3, 5]  # last choice of six: in neither
        result = evaluate(classifier(), images, labels, batch_size=4)
        assert result.count == 11
        assert result.top1 == pytest.approx(100 * 7 / 11)
        assert result.top5 == pytest.approx(100 * 10 / 11)
        assert result.sqnr_db is result.agreement is None

    def test_reference(self, images: ImageSource) -> None:
        noisy = WEIGHT + 0.3 * np.random.default_rng(1).normal(size=WEIGHT.shape).astype("f4")
        result = evaluate(classifier(noisy), images, batch_size=3, reference=classifier())
        q = PICTURES.reshape(11, 48) @ noisy
        want = 10 * np.log10((WANT**2).sum() / ((WANT - q) ** 2).sum())
        assert result.sqnr_db == pytest.approx(want, abs=1e-3)
        assert result.agreement == pytest.approx(100 * (WANT.argmax(1) == q.argmax(1)).mean())
        assert result.agreement < 100
        assert result.top1 is result.top5 is None

    def test_baseline_is_the_references_own_accuracy(
        self, images: ImageSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same figures as evaluating it by itself, from one run of each model."""
        calls: list[str] = []
        real = Network.__call__

        def counted(self: Network, batch: np.ndarray) -> dict[str, np.ndarray]:
            calls.append(self.name)
            return real(self, batch)

        noisy = WEIGHT + 2 * np.random.default_rng(1).normal(size=WEIGHT.shape).astype("f4")
        labels = WANT.argmax(axis=1)
        labels[:3] = (labels[:3] + 1) % 6
        alone = evaluate(classifier(), images, labels, batch_size=4)
        both = {"reference": classifier(), "names": ("q", "f"), "batch_size": 4}
        monkeypatch.setattr(Network, "__call__", counted)
        result = evaluate(classifier(noisy), images, labels, baseline=True, **both)  # type: ignore[arg-type]
        assert result.baseline == alone
        assert result.top1 != alone.top1
        assert calls == ["q", "f"] * 3
        assert evaluate(classifier(noisy), images, labels, **both).baseline is None  # type: ignore[arg-type]

    @settings(max_examples=15)
    @given(batch_size=st.integers(1, 12), gain=st.floats(0.5, 2).filter(lambda g: g != 1))
    def test_gain_error_does_not_depend_on_batches(self, batch_size: int, gain: float) -> None:
        images = open_images(PICTURES, PLAIN)
        scaled = (WEIGHT * np.float32(gain)).astype(np.float32)
        error = float(np.float32(gain)) - 1
        if abs(error) < 1e-3:
            return
        result = evaluate(
            classifier(scaled), images, batch_size=batch_size, threads=1, reference=classifier()
        )
        assert result.sqnr_db == pytest.approx(-20 * math.log10(abs(error)), abs=0.05)
        assert result.agreement == 100

    def test_the_same_model(self, images: ImageSource) -> None:
        result = evaluate(classifier(), images, reference=classifier())
        assert (result.sqnr_db, result.agreement) == (math.inf, 100)

    def test_few_classes(self, images: ImageSource) -> None:
        result = evaluate(classifier(WEIGHT[:, :3]), images, np.zeros(11, np.int64))
        assert result.top1 is not None
        assert result.top5 is None

    def test_ties_go_to_the_first_class(self, images: ImageSource) -> None:
        flat = classifier(np.zeros((48, 100), np.float32))
        assert evaluate(flat, images, np.zeros(11, np.int64)).top1 == 100
        assert evaluate(flat, images, np.full(11, 4)).top5 == 100
        assert evaluate(flat, images, np.full(11, 5)).top5 == 0
        ranks = np.random.default_rng(0).integers(-1, 2, 400).astype(np.float32)
        tied = classifier(WEIGHT[:, :1] * ranks)
        assert evaluate(tied, images, logits(tied, images).argmax(axis=1)).top1 == 100

    def test_labels_follow_names_past_an_unreadable_file(self, tmp_path: Path) -> None:
        from PIL import Image

        for number in range(6):
            pixels = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        truth = logits(classifier(), open_images(tmp_path, PLAIN)).argmax(axis=1)
        (tmp_path / "1.png").write_bytes(b"nothing")
        result = evaluate(classifier(), open_images(tmp_path, PLAIN), truth, batch_size=2)
        assert (result.count, result.top1) == (5, 100)
        (tmp_path / "0.png").write_bytes(b"nothing")  # 2.png stands in, and has no label
        some = open_images(tmp_path, PLAIN, limit=2)
        result = evaluate(classifier(), some, truth[[0, 3]], batch_size=2)
        assert some.names == ["2.png", "3.png"]
        assert (result.count, result.top1) == (2, 100)
        result = evaluate(
            classifier(np.zeros((48, 6))), open_images(tmp_path, PLAIN, limit=2), np.array([0, 5])
        )
        assert (result.count, result.top1) == (2, 0)  # the stand-in would be right as class 0


class TestErrors:
    def expect(self, kind: type[PtqError], match: str, *args: object, **options: object) -> None:
        with pytest.raises(kind, match=match) as error:
            evaluate(*args, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    def test_labels(self, images: ImageSource) -> None:
        labels = np.zeros(11, np.int64)
        self.expect(ImageError, "5 labels for 11 images", classifier(), images, labels[:5])
        labels[4] = 6
        self.expect(
            ImageError,
            "Label 6 of image '4' is out of range.*6 classes",
            classifier(),
            images,
            labels,
        )
        labels[4] = -1
        self.expect(ImageError, "Label -1 is negative", classifier(), images, labels)

    def test_models(self, images: ImageSource, tmp_path: Path) -> None:
        self.expect(ModelError, "does not exist", tmp_path / "none.onnx", images)
        self.expect(ModelError, "refused by ONNX Runtime", b"nothing", images)
        wide = classifier(shape=(3, 8, 8), weight=np.zeros((192, 6)))
        self.expect(ImageError, r"expects images \[3, 8, 8\].*got \[3, 4, 4\]", wide, images)
        other = classifier(WEIGHT[:, :3])
        self.expect(ImageError, "not the same network", classifier(), images, reference=other)
        model = onnx.load_from_string(classifier(shape=("c", "h", "w")))
        small = open_images(np.zeros((1, 3, 5, 5), np.float32), Preprocess.named("imagenet", 5))
        self.expect(ModelError, "fails in ONNX Runtime", model.SerializeToString(), small)

    def test_interfaces(self, images: ImageSource) -> None:
        model = onnx.load_from_string(classifier(extra=True))
        model.graph.output.pop()
        model.graph.output.append(helper.make_tensor_value_info("more", FLOAT, ["b", 3, 4, 4]))
        model.graph.node.append(helper.make_node("Neg", ["x"], ["more"]))
        maps = model.SerializeToString()
        truth = np.zeros(11, np.int64)
        self.expect(ModelError, r"no output \[batch, classes\] .* leave the", maps, images, truth)
        with pytest.raises(ModelError, match=r"none of its outputs is \[batch, classes\]"):
            logits(maps, images)

        model = onnx.load_from_string(classifier())
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
        model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["f"], to=FLOAT))
        model.graph.node[1].input[0] = "f"
        whole = model.SerializeToString()
        self.expect(ModelError, r"one input of images, .* got x: tensor\(int64\)", whole, images)


def test_session_options() -> None:
    opened = session(classifier(), threads=1, optimize=False)
    assert opened.get_session_options().intra_op_num_threads == 1
    first = opened.get_providers()[0]
    assert first == ("CUDAExecutionProvider" if cuda_works() else "CPUExecutionProvider")
    assert session(classifier(), cpu=True).get_providers() == ["CPUExecutionProvider"]


def test_nothing_is_printed(images: ImageSource, capfd: pytest.CaptureFixture[str]) -> None:
    cuda_works.cache_clear()
    evaluate(classifier(), images)
    assert capfd.readouterr() == ("", "")


@pytest.mark.real
@pytest.mark.parametrize(
    ("model", "normalisation", "count", "top1"),
    [
        ("vit", "inception", 100, 86.0),
        ("deit", "imagenet", 100, 84.0),
        pytest.param("vit", "inception", 500, 82.4, marks=pytest.mark.full_matrix),
        pytest.param("deit", "imagenet", 500, 80.2, marks=pytest.mark.full_matrix),
    ],
)
def test_sample_models(
    shared: Path,
    real_models: dict[str, Path],
    model: str,
    normalisation: str,
    count: int,
    top1: float,
) -> None:
    images = open_images(shared / "imagenet/val", Preprocess.named(normalisation), limit=count)
    labels = labels_for(images, shared / "imagenet/val.txt")
    result = evaluate(real_models[model], images, labels)
    assert result.count == count
    assert result.top1 == pytest.approx(top1, abs=100 / count + 0.01)  # one image, for other CPUs
