"""Post-training quantization of Vision Transformers, from ONNX to ONNX.

The names below are imported when they are first asked for: torch and PPQ take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptq_onnx.telemetry import switch_off
from ptq_onnx.version import __version__ as __version__

if TYPE_CHECKING:
    from ptq_onnx.api import (
        RoleUse,
        analyse,
        benchmark,
        check,
        compare,
        evaluate,
        inspect,
        quantize,
        roles,
    )
    from ptq_onnx.cli.console import one_line_errors, progress_bars, show
    from ptq_onnx.config.quantize_config import QuantizeConfig
    from ptq_onnx.errors import PtqError
    from ptq_onnx.evaluation.evaluate import Evaluation
    from ptq_onnx.images.labels import labels_for
    from ptq_onnx.images.opening import open_images
    from ptq_onnx.images.preprocess import Preprocess
    from ptq_onnx.pipeline.model_path import find_model
    from ptq_onnx.pipeline.quantize import resolve_preprocess
    from ptq_onnx.pipeline.result import Result
    from ptq_onnx.preparation.prepare import prepare

switch_off()  # before onnxruntime is loaded

_HOMES = {
    "Evaluation": "evaluation.evaluate",
    "Preprocess": "images.preprocess",
    "PtqError": "errors",
    "QuantizeConfig": "config.quantize_config",
    "Result": "pipeline.result",
    "RoleUse": "api",
    "analyse": "api",
    "benchmark": "api",
    "check": "api",
    "compare": "api",
    "evaluate": "api",
    "find_model": "pipeline.model_path",
    "inspect": "api",
    "labels_for": "images.labels",
    "one_line_errors": "cli.console",
    "open_images": "images.opening",
    "prepare": "preparation.prepare",
    "progress_bars": "cli.console",
    "quantize": "api",
    "resolve_preprocess": "pipeline.quantize",
    "roles": "api",
    "show": "cli.console",
}
"""The public names, and the module of each."""

__all__ = [
    "Evaluation",
    "Preprocess",
    "PtqError",
    "QuantizeConfig",
    "Result",
    "RoleUse",
    "analyse",
    "benchmark",
    "check",
    "compare",
    "evaluate",
    "find_model",
    "inspect",
    "labels_for",
    "one_line_errors",
    "open_images",
    "prepare",
    "progress_bars",
    "quantize",
    "resolve_preprocess",
    "roles",
    "show",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptq_onnx' has no attribute '{name}'")
    return getattr(import_module(f"ptq_onnx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
