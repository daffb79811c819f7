"""How fast model files run, side by side, in the runtime they are meant for."""

from __future__ import annotations

from importlib import import_module

from ptq_onnx.config.names import RUNTIMES
from ptq_onnx.errors import ConfigError
from ptq_onnx.targets.timing.runner import Runtime


def open_runtime(name: str) -> Runtime:
    """A runtime by its name. Raises ConfigError where it does not exist or does not load."""
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime '{name}'; choose one of {', '.join(RUNTIMES)}.")
    module = import_module(f"ptq_onnx.targets.{name}.timing")
    runtime: Runtime = module.load()
    return runtime
