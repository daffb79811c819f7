"""Sessions on Qualcomm's NPU, or on its emulator: onnxruntime-qnn as a plug-in of ONNX Runtime.

The wheel ``onnxruntime-qnn`` brings HTP's compiler; on x86-64 Linux, with an emulator that computes
what the device does, slowly. A node that the compiler refuses would run on the CPU: here that is an
error (``session.disable_cpu_ep_fallback``).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ptq_onnx.errors import ConfigError, ModelError, one_line
from ptq_onnx.telemetry import switch_off

switch_off()

PROVIDER = "QNNExecutionProvider"
MISSING = "pip install --no-deps onnxruntime-qnn (Linux x86-64 or Windows)"
FATAL, VERBOSE = 4, 0
"""ONNX Runtime's severities."""


@dataclass(frozen=True)
class Device:
    """What is compiled for: options of the provider. ``soc``: a SoC's number in the vendor's
    list; ``htp_arch``: version of the NPU, as in 73; empty: the compiler's default.
    ``optimization``: how long it may look for a good graph, 1 to 3."""

    soc: str = ""
    htp_arch: str = ""
    optimization: int = 1

    def options(self, backend: str) -> dict[str, str]:
        """For ``add_provider_for_devices``."""
        found = {
            "backend_path": backend,
            "htp_graph_finalization_optimization_mode": str(self.optimization),
        }
        if self.soc:
            found["soc_model"] = self.soc
        if self.htp_arch:
            found["htp_arch"] = self.htp_arch
        return found

    def __post_init__(self) -> None:
        """Raises ConfigError for what is no number."""
        for option, value in (("--soc", self.soc), ("--htp-arch", self.htp_arch)):
            if value and not value.isdecimal():
                raise ConfigError(f"{option} {value}: expected a number, as in {option} 73.")


@lru_cache(maxsize=1)
def plugin() -> Any:
    """The wheel's package, its library registered with ONNX Runtime: once in a process.

    Raises ConfigError where it is not installed or does not load.
    """
    try:
        import onnxruntime_qnn
    except ImportError as error:
        raise ConfigError(
            f"Qualcomm's compiler is not installed ({one_line(error)}): {MISSING}."
        ) from error
    try:
        with without_stdout():
            if not devices():  # the program may have registered it itself
                path = onnxruntime_qnn.get_library_path()
                ort.register_execution_provider_library(PROVIDER, path)
    except Exception as error:  # its exceptions share no base class
        raise ConfigError(
            f"onnxruntime-qnn does not load into onnxruntime {ort.__version__}"
            f" ({one_line(error)}); take releases that belong together."
        ) from error
    return onnxruntime_qnn


def devices() -> list[Any]:
    """What the provider, once registered, runs on."""
    return [one for one in ort.get_ep_devices() if one.ep_name == PROVIDER]


def npu_session(
    model: str | Path | bytes,
    device: Device | None = None,
    *,
    threads: int = 0,
    context: str | Path | None = None,
    verbose: bool = False,
) -> ort.InferenceSession:
    """A session with every node on the NPU.

    ``context``: a file to write the compiled graph to, which opens without compiling.
    ``verbose``: tell on stderr of each node whether the compiler takes it. Raises ConfigError
    without the wheel, ModelError where any node is refused.
    """
    package, device = plugin(), device or Device()
    found = devices()
    if not found:
        raise ConfigError(
            "onnxruntime-qnn finds no device, not even its emulator, on this machine."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = VERBOSE if verbose else FATAL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if context is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_embed_mode", "1")
        options.add_session_config_entry("ep.context_file_path", str(context))
    options.add_provider_for_devices(found[:1], device.options(package.get_qnn_htp_path()))
    try:
        with without_stdout():
            return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)
    except Exception as error:
        name = "The model" if isinstance(model, bytes) else f"Model {model}"
        raise ModelError(
            f"{name} is refused by Qualcomm's compiler: {one_line(error)}; check --target qnn"
            " names the nodes."
        ) from error


@contextlib.contextmanager
def without_stdout() -> Iterator[None]:
    """What native code prints to stdout meanwhile, the vendor's libraries among it, is dropped."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # a process without a stdout
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
