"""Where ONNX Runtime computes: on the CPU, or on NVIDIA's GPU where that really works.

``--device`` is in force for a run and for the processes that it starts. It concerns the float runs
that calibrate and the runs that measure. What stands for a file's own arithmetic (the simulation,
the check of rewritten models, sensitivity) is the CPU's whatever it says, as are the files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from ptq_onnx.errors import ConfigError

AUTO, CPU_ONLY, CUDA_ONLY = "auto", "cpu", "cuda"
"""What ``--device`` takes."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL, WARNING = 4, 2
"""ONNX Runtime's severities."""
_CHOSEN: ContextVar[str] = ContextVar("device", default=AUTO)


def chosen() -> str:
    """The device in force."""
    return _CHOSEN.get()


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """What is opened meanwhile is opened there. Raises ConfigError where CUDA does not work."""
    if name == CUDA_ONLY and not cuda_works():
        raise ConfigError(f"--device cuda: {_missing()}; leave it out to run on the CPU.")
    before = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def take_device(name: str) -> None:
    """The device of this process, which another has found to work."""
    _CHOSEN.set(name)


def providers_for(usual: str) -> list[Any]:
    """What a session is opened with, the first that works being used; ``usual``: where it runs
    unless the user has said where."""
    device = usual if chosen() == AUTO else chosen()
    if device == CUDA_ONLY or (device == AUTO and cuda_works()):
        return [(CUDA, {"use_tf32": "0"}), CPU]
    return [CPU]


def _missing() -> str:
    """Why CUDA does not work."""
    if CUDA not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider (install onnxruntime-gpu in its place)"
    if not cuda_devices():
        return "NVIDIA's driver sees no GPU here"
    return "ONNX Runtime's CUDA provider does not load (CUDA and cuDNN libraries of its version?)"


@lru_cache(maxsize=1)
def cuda_works() -> bool:
    """Whether ONNX Runtime can run a node with CUDA: a driver, a device and the libraries."""
    return provider_works(CUDA)


def provider_works(provider: str) -> bool:
    """Whether ONNX Runtime can run a node with a provider for NVIDIA's devices."""
    if provider not in ort.get_available_providers() or not cuda_devices():
        return False
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [result])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ort.set_default_logger_severity(FATAL)
    try:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        opened = ort.InferenceSession(probe.SerializeToString(), providers=[provider, CPU])
        opened.run(None, {"x": np.ones(1, dtype=np.float32)})
        return bool(opened.get_providers()[0] == provider)
    except Exception:  # whatever is missing: the CPU it is
        return False
    finally:
        ort.set_default_logger_severity(WARNING)


def cuda_devices() -> int:
    """Number of devices the CUDA driver sees; 0 without a driver. Prints nothing."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
