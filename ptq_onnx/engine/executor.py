"""PPQ's executor, with codes that it does not know."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ptq_onnx.engine.ppq_graph import SPEC
from ptq_onnx.engine.ppq_import import (
    BaseGraph,
    QuantizationStates,
    TensorQuantizationConfig,
    TorchExecutor,
)
from ptq_onnx.engine.torch_ops import fake_quantize
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import Rule, TensorSpec

Mode = Literal["exact", "torch"]


class Executor(TorchExecutor):  # type: ignore[misc]
    """PPQ's executor; factors and log2 codes are quantized from their spec.

    On the platform ``EXACT`` the kernels quantize, so this does nothing there.
    """

    def __init__(self, graph: BaseGraph, device: str = "cpu", mode: Mode = "torch") -> None:
        self.mode = mode
        super().__init__(graph, fp16_mode=False, device=device)

    def tracing_operation_meta(self, inputs: Any, output_names: Any = None) -> None:
        """Nothing: no config of ours depends on the shapes and types that a run would tell."""

    def quantize_function(
        self, tensor: torch.Tensor, config: TensorQuantizationConfig | None = None
    ) -> torch.Tensor:
        """The tensor rounded as its config says; as it is in exact mode, or where quantization is
        switched off. PPQ's own function knows uniform codes without factors, ours all others."""
        if config is None or self.mode == "exact":
            return tensor
        if not QuantizationStates.is_activated(config.state):
            return tensor
        spec: TensorSpec | None = config.detail.get(SPEC)
        if spec is not None and not (spec.factor is None and _known_to_ppq(spec.rule)):
            return fake_quantize(tensor, spec)
        quantized: torch.Tensor = super().quantize_function(tensor, config)
        return quantized


def _known_to_ppq(rule: Rule) -> bool:
    """PPQ rounds to uniform codes with scales per tensor or channel, and nothing around."""
    return rule.code == Uniform() and not rule.around and not rule.grain.block_size
