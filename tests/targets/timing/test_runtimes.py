"""The runtimes themselves: what they are asked for, and how they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.targets.onnxruntime.timing import OnnxRuntime, SessionRunner, halved
from ptq_onnx.targets.tensorrt import timing as in_tensorrt
from ptq_onnx.targets.timing.memory import peak_memory
from ptq_onnx.targets.timing.runtimes import RUNTIMES, open_runtime
from ptq_onnx.targets.timing.timed_model import Subject, read_subject


def linear(path: Path, size: int = 8) -> Path:
    g = SmallGraph(("n", size))
    g.output_shape = ("n", size)
    return g.save(path, g("MatMul", "x", sample(size, size)))


def picky(path: Path) -> Path:
    """Valid ONNX that fails when it runs: it takes one image at a time."""
    g = SmallGraph(("n", 8))
    g.output_shape = ("n", 8)
    return g.save(path, g("Reshape", g("Reshape", "x", np.array([8])), np.array([1, 8])))


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return read_subject(linear(tmp_path / "linear.onnx"))


def test_unknown_runtime() -> None:
    assert RUNTIMES == ("onnxruntime", "openvino", "tensorrt")
    with pytest.raises(ConfigError, match="no runtime 'nix'; choose one of onnxruntime"):
        open_runtime("nix")


def test_onnxruntime_computes_the_model(subject: Subject) -> None:
    runner = SessionRunner(subject, 3, 1, device="cpu")
    runner.run()
    (found,) = runner._binding.copy_outputs_to_cpu()
    (expected,) = run(subject.path, subject.feed(3)["x"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    options = runner._session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_onnxruntime_has_no_half_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.targets.onnxruntime.timing.cuda_works", lambda: False)
    runtime = OnnxRuntime()
    assert (runtime.half, runtime.device, runtime.on_gpu) == (None, "CPU", False)
    assert "no fp16" in runtime.half_note
    monkeypatch.setattr("ptq_onnx.targets.onnxruntime.timing.cuda_works", lambda: True)
    assert (OnnxRuntime().half, OnnxRuntime().half_note) == ("fp16", "")


def test_halves_keep_the_inputs_and_the_numbers(subject: Subject) -> None:
    model = onnx.load_from_string(halved(subject))
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    x = subject.feed(2)["x"]
    (found,), (expected,) = run(model, x), run(subject.path, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_a_model_that_fails_is_one_line(tmp_path: Path) -> None:
    subject = read_subject(picky(tmp_path / "picky.onnx"))
    SessionRunner(subject, 1, 1, device="cpu").run()
    with pytest.raises(ModelError, match=r"picky\.onnx fails in ONNX Runtime") as error:
        SessionRunner(subject, 2, 1, device="cpu").run()
    assert "\n" not in str(error.value)


def test_memory_of_a_process_of_its_own(tmp_path: Path, subject: Subject) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system tells no peak memory")
    little = peak_memory("onnxruntime", subject, 1, 1, "as written")
    large = read_subject(linear(tmp_path / "large.onnx", 3000))  # 36 MB of weights
    much = peak_memory("onnxruntime", large, 1, 1, "as written")
    assert little is not None
    assert much is not None
    assert little < 30e6
    assert 36e6 < much < 200e6
    gone = Subject(tmp_path / "gone.onnx", subject.inputs, False, 1)
    assert peak_memory("onnxruntime", gone, 1, 1, "as written") is None


# OpenVINO


def test_openvino_computes_in_float32_on_the_threads_given(subject: Subject) -> None:
    pytest.importorskip("openvino")
    runtime = open_runtime("openvino")
    runner: Any = runtime.open(subject, 2, threads=1, precision="as written")
    runner.run()
    compiled = runner._request.get_compiled_model()
    assert "float32" in str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    (expected,) = run(subject.path, subject.feed(2)["x"])
    np.testing.assert_allclose(
        runner._request.get_output_tensor().data, expected, rtol=1e-5, atol=1e-6
    )
    if runtime.half is not None:
        half: Any = runtime.open(subject, 2, threads=1, precision=runtime.half)
        told = str(half._request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT"))
        assert "16" in told


def test_openvino_refuses_in_one_line(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(subject.path.read_bytes()[:-20])
    bad = Subject(cut, subject.inputs, False, 1)
    with pytest.raises(ModelError, match=r"cut\.onnx is refused by OpenVINO") as error:
        open_runtime("openvino").open(bad, 1, threads=1, precision="as written")
    assert "\n" not in str(error.value)


def test_openvino_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match="pip install openvino"):
        open_runtime("openvino")


# TensorRT, of which there is only a stand-in that notes what it is told


class FakeTensorRt:
    """The part of the package that is used; ``log`` holds the calls that decide the numbers."""

    def __init__(self, *, weak: bool = True, parses: bool = True, dynamic: bool = True) -> None:
        self.log: list[Any] = []
        log, parser_accepts = self.log, parses
        outer = self
        self.__version__ = "10.0"
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(
            TF32="TF32", **({"FP16": "FP16", "INT8": "INT8"} if weak else {})
        )
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        value = SimpleNamespace(name="x", shape=(-1 if dynamic else 2, 8))
        network = SimpleNamespace(num_inputs=1, get_input=lambda _: value)
        profile = SimpleNamespace(set_shape=lambda *a: log.append(("profile", *a)))
        config = SimpleNamespace(
            set_flag=lambda f: log.append(("set", f)),
            clear_flag=lambda f: log.append(("clear", f)),
            add_optimization_profile=lambda _: log.append("add profile"),
        )

        class Builder:
            def __init__(self, _: Any) -> None: ...

            def create_network(self, flags: int) -> Any:
                log.append(("network", flags))
                return network

            def create_builder_config(self) -> Any:
                return config

            def create_optimization_profile(self) -> Any:
                return profile

            def build_serialized_network(self, *_: Any) -> Any:
                return SimpleNamespace(nbytes=100) if outer.builds else None

        class OnnxParser:
            num_errors = 1

            def __init__(self, *_: Any) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                log.append(("parse", Path(path).name))
                return parser_accepts

            def get_error(self, _: int) -> Any:
                return SimpleNamespace(desc=lambda: "no such\nop")

        context = SimpleNamespace(
            set_input_shape=lambda n, s: log.append(("shape", n, tuple(s))) or True,
            get_tensor_shape=lambda _: (2, 8),
            set_tensor_address=lambda n, _: log.append(("address", n)),
            execute_async_v3=lambda _: log.append("run") or True,
        )
        engine = SimpleNamespace(
            num_io_tensors=2,
            device_memory_size_v2=1000,
            create_execution_context=lambda: context,
            get_tensor_name=lambda i: ("y", "x")[i],
            get_tensor_mode=lambda n: "in" if n == "x" else "out",
            get_tensor_dtype=lambda _: SimpleNamespace(itemsize=4),
        )
        self.builds = True
        self.Builder, self.OnnxParser = Builder, OnnxParser
        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine)


def fake_torch() -> Any:
    import torch

    def empty(size: int, **_: Any) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def from_numpy(array: Any) -> Any:
        tensor = torch.from_numpy(array)
        return SimpleNamespace(cuda=lambda: tensor)

    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    cuda = SimpleNamespace(
        Stream=lambda: stream, synchronize=lambda: None, get_device_name=lambda: "Fake GPU"
    )
    return SimpleNamespace(cuda=cuda, empty=empty, from_numpy=from_numpy, uint8=torch.uint8)


def test_tensorrt_takes_types_from_the_file(subject: Subject) -> None:
    trt = FakeTensorRt()
    runtime = in_tensorrt.TensorRt(trt, fake_torch())
    assert (runtime.half, runtime.device, runtime.on_gpu) == ("fp16", "Fake GPU", True)
    runner = runtime.open(subject, 2, threads=0, precision="as written")
    assert trt.log == [
        ("network", 1 << 1),
        ("parse", "linear.onnx"),
        ("clear", "TF32"),
        ("profile", "x", (2, 8), (2, 8), (2, 8)),
        "add profile",
        ("shape", "x", (2, 8)),
        ("address", "x"),
        ("address", "y"),
    ]
    runner.run()
    assert trt.log[-1] == "run"
    assert runner.memory == 1100


def test_tensorrt_in_half_precision_is_weakly_typed(subject: Subject) -> None:
    trt = FakeTensorRt(dynamic=False)
    runtime = in_tensorrt.TensorRt(trt, fake_torch())
    runtime.open(subject, 2, threads=0, precision="fp16")
    assert [x for x in trt.log if x[0] in ("network", "set", "profile")] == [
        ("network", 0),
        ("set", "FP16"),
    ]
    trt.log.clear()
    quantized = Subject(subject.path, subject.inputs, True, 1)
    runtime.open(quantized, 2, threads=0, precision="fp16")
    assert [x for x in trt.log if x[0] == "set"] == [("set", "FP16"), ("set", "INT8")]


def test_tensorrt_without_weak_types_has_no_half_precision() -> None:
    runtime = in_tensorrt.TensorRt(FakeTensorRt(weak=False), fake_torch())
    assert runtime.half is None
    assert "float16 file" in runtime.half_note


def test_tensorrt_refuses_in_one_line(subject: Subject) -> None:
    runtime = in_tensorrt.TensorRt(FakeTensorRt(parses=False), fake_torch())
    with pytest.raises(ModelError, match=r"linear\.onnx is refused by .*: no such op"):
        runtime.open(subject, 2, threads=0, precision="as written")
    trt = FakeTensorRt()
    trt.builds = False
    with pytest.raises(ModelError, match="cannot build"):
        in_tensorrt.TensorRt(trt, fake_torch()).open(subject, 2, threads=0, precision="as written")


def test_tensorrt_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(in_tensorrt, "provider_works", lambda _: False)
    with pytest.raises(ConfigError, match="TensorRT does not run here") as error:
        open_runtime("tensorrt")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(in_tensorrt, "provider_works", lambda _: True)
    assert open_runtime("tensorrt").version.startswith("of onnxruntime")
