"""The only place that imports PPQ.

PPQ 0.6.6 is its last release. With current onnx, numpy and protobuf it fails to import for
two reasons, neither of which concerns us: its generated Caffe protobuf module, which
protobuf >= 4 refuses, and ``onnx.mapping``, which onnx >= 1.17 has dropped. Stand-ins for
those two are installed before the import; nothing else is patched.

What PPQ gives: ``BaseQuantizer`` and ``TensorQuantizationConfig`` (who quantizes what),
its pass pipeline (when), and ``TorchExecutor`` (simulation). What it lacks is added at its
own extension points: operation handlers, and the executor's ``quantize_function``.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from typing import Any, Literal

import onnx


def _install_stand_ins() -> None:
    """Make ``import ppq`` work: see the module's text."""
    if "onnx.mapping" not in sys.modules and not hasattr(onnx, "mapping"):
        mapping = types.ModuleType("onnx.mapping")
        mapping.TENSOR_TYPE_TO_NP_TYPE = {  # type: ignore[attr-defined]
            kind: onnx.helper.tensor_dtype_to_np_dtype(kind)
            for kind in onnx.TensorProto.DataType.values()
            if kind not in (onnx.TensorProto.UNDEFINED,)
        }
        sys.modules["onnx.mapping"] = mapping
        onnx.mapping = mapping  # type: ignore[attr-defined]
    name = "ppq.parser.caffe.ppl_caffe_pb2"
    if name not in sys.modules:
        caffe = types.ModuleType(name)

        def missing(attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return type(attribute, (), {})

        caffe.__getattr__ = missing  # type: ignore[method-assign]
        sys.modules[name] = caffe


_install_stand_ins()
with contextlib.redirect_stdout(io.StringIO()):  # PPQ prints a banner on import.
    from ppq.api.setting import QuantizationSetting
    from ppq.core import (
        OperationQuantizationConfig,
        QuantizationPolicy,
        QuantizationProperty,
        QuantizationStates,
        RoundingPolicy,
        TargetPlatform,
        TensorQuantizationConfig,
    )
    from ppq.executor import TorchExecutor
    from ppq.executor.base import OPERATION_FORWARD_TABLE, RuntimeHook, register_operation_handler
    from ppq.IR import BaseGraph, Operation, QuantableOperation, Variable
    from ppq.quantization.optim.base import (
        QuantizationOptimizationPass,
        QuantizationOptimizationPipeline,
    )
    from ppq.quantization.quantizer.base import BaseQuantizer

Mode = Literal["exact", "torch"]

__all__ = [
    "OPERATION_FORWARD_TABLE",
    "BaseGraph",
    "BaseQuantizer",
    "Operation",
    "OperationQuantizationConfig",
    "QuantableOperation",
    "QuantizationOptimizationPass",
    "QuantizationOptimizationPipeline",
    "QuantizationPolicy",
    "QuantizationProperty",
    "QuantizationSetting",
    "QuantizationStates",
    "RoundingPolicy",
    "RuntimeHook",
    "TargetPlatform",
    "TensorQuantizationConfig",
    "TorchExecutor",
    "Variable",
    "register_operation_handler",
]
