"""What to do where ONNX Runtime cannot be imported, in one line."""

from __future__ import annotations

from ptq_onnx.errors import ConfigError

RUNTIME = "onnxruntime"


def missing_runtime(error: ImportError) -> ConfigError | None:
    """The error of a user's that an import error is; None where it is about something else."""
    name, reason = error.name or "", " ".join(str(error).split())
    if name.split(".")[0] != RUNTIME and RUNTIME not in reason:
        return None
    return ConfigError(
        f"ONNX Runtime cannot be imported ({reason[:160]}). Its packages share one folder, so that"
        " only one may be installed: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install"
        " onnxruntime, or onnxruntime-gpu for NVIDIA's GPUs."
    )


def require_runtime() -> None:
    """Raises ConfigError where there is no ONNX Runtime."""
    try:
        from onnxruntime import InferenceSession  # noqa: F401
    except ImportError as error:
        raise missing_runtime(error) or error from error
