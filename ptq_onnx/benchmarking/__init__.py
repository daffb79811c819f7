"""How fast model files run, side by side, in the runtime they are meant for."""

from __future__ import annotations

from importlib import import_module

from ptq_onnx.benchmarking.runner import Runtime
from ptq_onnx.errors import ConfigError

_HOMES = {
    "onnxruntime": "in_onnxruntime",
    "openvino": "in_openvino",
    "tensorrt": "in_tensorrt",
}
"""The runtimes, and the module of each."""

RUNTIMES = tuple(_HOMES)


def open_runtime(name: str) -> Runtime:
    """A runtime by its name. Raises ConfigError where it does not exist or does not load."""
    if name not in _HOMES:
        raise ConfigError(f"There is no runtime '{name}'; choose one of {', '.join(RUNTIMES)}.")
    module = import_module(f"ptq_onnx.benchmarking.{_HOMES[name]}")
    runtime: Runtime = module.load()
    return runtime
