"""OpenVINO on the CPU, its inference precision set and not left to what it prefers."""

from __future__ import annotations

from typing import Any

from ptq_onnx.errors import ConfigError, ModelError, one_line
from ptq_onnx.targets.timing.runner import AS_WRITTEN
from ptq_onnx.targets.timing.timed_model import Subject

DEVICE = "CPU"
HALF = {"FP16": ("fp16", "f16"), "BF16": ("bf16", "bf16")}
"""Capability → the precision's name here, and in OpenVINO's options; the first that is there."""


class RequestRunner:
    """One compiled model with one infer request."""

    memory: int | None = None

    def __init__(
        self, openvino: Any, core: Any, subject: Subject, batch: int, options: dict[str, Any]
    ) -> None:
        self.path = subject.path
        try:
            model = core.read_model(str(subject.path))
            model.reshape(dict(subject.shapes(batch)))
            self._request = core.compile_model(model, DEVICE, options).create_infer_request()
            # The request reads the memory of these arrays; they must live as long as it does
            self._feed = subject.feed(batch)
            for name, value in self._feed.items():
                self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        except Exception as error:
            raise self._refusal(error) from error

    def run(self) -> None:
        """One inference. Raises ModelError."""
        try:
            self._request.infer()
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ModelError:
        return ModelError(f"Model {self.path} is refused by OpenVINO: {one_line(error)}.")


class OpenVino:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    device = DEVICE
    on_gpu = False

    def __init__(self, openvino: Any) -> None:
        self._openvino, self._core = openvino, openvino.Core()
        self.version = str(openvino.__version__).partition("-")[0]
        able = set(self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
        found = next((HALF[name] for name in HALF if name in able), None)
        self.half: str | None = found[0] if found else None
        self._half_option = found[1] if found else "f32"
        self.half_note = "" if found else "No fp16 column: this CPU computes no 16-bit floats."

    def open(self, subject: Subject, batch: int, *, threads: int, precision: str) -> RequestRunner:
        """A runner of one stream, tuned for latency; as written means float32."""
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32" if precision == AS_WRITTEN else self._half_option,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        return RequestRunner(self._openvino, self._core, subject, batch, options)


def load() -> OpenVino:
    """The runtime. Raises ConfigError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            f"--runtime openvino: OpenVINO does not load here ({one_line(error)}):"
            " pip install openvino."
        ) from error
    return OpenVino(openvino)
