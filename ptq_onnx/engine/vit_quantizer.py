"""What all quantizers are to PPQ: who quantizes what, and when."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch

from ptq_onnx.engine.executor import Executor
from ptq_onnx.engine.ppq_graph import FAKE, ORIGIN, SPEC, build_graph, without_clones
from ptq_onnx.engine.ppq_import import (
    BaseGraph,
    BaseQuantizer,
    Operation,
    OperationQuantizationConfig,
    QuantizationOptimizationPass,
    QuantizationOptimizationPipeline,
    QuantizationPolicy,
    QuantizationProperty,
    QuantizationSetting,
    QuantizationStates,
    RoundingPolicy,
    TargetPlatform,
    TensorQuantizationConfig,
    TorchExecutor,
    Variable,
)
from ptq_onnx.numerics.spec import Rule, TensorSpec


def config_for(rule: Rule) -> TensorQuantizationConfig:
    """PPQ's description of a rule, not calibrated yet. Log2 codes have no policy of their
    own in PPQ: they are marked by their spec, which ``quantize_function`` obeys."""
    low, high = rule.limits
    channelwise = rule.grain.per_channel
    policy = QuantizationPolicy(
        QuantizationProperty.LINEAR
        + (
            QuantizationProperty.SYMMETRICAL
            if rule.symmetric
            else QuantizationProperty.ASYMMETRICAL
        )
        + (QuantizationProperty.PER_CHANNEL if channelwise else QuantizationProperty.PER_TENSOR)
    )
    return TensorQuantizationConfig(
        policy=policy,
        rounding=RoundingPolicy.ROUND_HALF_EVEN,
        num_of_bits=rule.bits,
        quant_min=low,
        quant_max=high,
        observer_algorithm=rule.method,
        state=QuantizationStates.INITIAL,
    )


def _idle() -> TensorQuantizationConfig:
    config = config_for(Rule())
    config.state = QuantizationStates.FP32
    return config


def calibrate_config(config: TensorQuantizationConfig, spec: TensorSpec) -> None:
    """Write a spec's numbers into PPQ's config and activate it."""
    config.detail[SPEC] = spec
    scale = torch.from_numpy(np.atleast_1d(spec.scale).astype(np.float32))
    offset = torch.from_numpy(np.atleast_1d(spec.zero_point).astype(np.float32))
    if spec.factor is not None and spec.axis is None and spec.factor.ndim == 1:
        scale = scale * torch.from_numpy(spec.factor)
        offset = offset.expand_as(scale).clone()
    if not spec.rule.grain.per_channel:
        scale, offset = scale.reshape(()), offset.reshape(())
    config.scale, config.offset = scale, offset
    if spec.axis is not None:
        config.channel_axis = spec.axis
    config.state = QuantizationStates.ACTIVATED


def is_active(config: TensorQuantizationConfig) -> bool:
    """True where the tensor is quantized now, by this config or by the one that rules it."""
    return bool(QuantizationStates.is_activated(config.dominated_by.state))


class CalibrationPass(QuantizationOptimizationPass):  # type: ignore[misc]
    """Our calibration as a pass of PPQ's pipeline: images → specs → configs."""

    def __init__(self, quantizer: VitQuantizer) -> None:
        super().__init__(name="ptq_onnx calibration")
        self._quantizer = quantizer

    def optimize(self, graph: BaseGraph, dataloader: Iterable[Any], **_: Any) -> None:
        """Calibrate the quantizer on the batches, and give PPQ's configs its numbers."""
        self._quantizer.specs = self._quantizer.calibrate(dataloader)
        self._quantizer.activate()


class VitQuantizer(BaseQuantizer):  # type: ignore[misc]
    """A PPQ quantizer whose configs follow rules per site instead of rules per op type.

    Each tensor is quantized once: by the op that makes it, or, where a layout op makes it,
    by the op that reads it. Other readers' configs are dominated by that one.
    """

    name: ClassVar[str]
    rules: Mapping[str, Rule]
    specs: dict[str, TensorSpec]

    def __init__(self, model: ir.Model) -> None:
        super().__init__(build_graph(model), verbose=False)
        self.specs = {}
        self._configs: dict[str, TensorQuantizationConfig] = {}
        self._copies: dict[str, list[TensorQuantizationConfig]] = {}

    @abstractmethod
    def calibrate(self, batches: Iterable[Any]) -> dict[str, TensorSpec]:
        """Specs of all sites that have a rule, from calibration batches [B, C, H, W]."""

    @property
    def graph(self) -> BaseGraph:
        """PPQ's graph, with the quantized operations."""
        return self._graph

    def tensor_of(self, variable: Variable) -> str:
        """The tensor that a PPQ variable stands for."""
        origin: dict[str, str] = self._graph.extension_attrib[ORIGIN]
        return str(origin.get(variable.name, variable.name))

    def replace_parameters(self, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Give PPQ's copies of the named initializers new values of the same shape."""
        for variable in self._graph.variables.values():
            tensor = self.tensor_of(variable)
            if variable.is_parameter and tensor in values:
                variable.value = torch.from_numpy(np.array(values[tensor]))

    @cached_property
    def quant_operation_types(self) -> set[str]:
        """Every type of op that touches a tensor with a rule."""
        return {
            op.type
            for op in self._graph.operations.values()
            if any(self.tensor_of(v) in self.rules for v in [*op.inputs, *op.outputs])
        }

    @property
    def target_platform(self) -> TargetPlatform:
        """PPQ's platform for fake quantization in torch."""
        return FAKE

    def init_quantize_config(self, operation: Operation) -> OperationQuantizationConfig:
        """One config per input and output; idle where the tensor has no rule."""
        inputs = [self._config(v, operation, made=False) for v in operation.inputs]
        outputs = [self._config(v, operation, made=True) for v in operation.outputs]
        return OperationQuantizationConfig(inputs, outputs)

    def _config(
        self, variable: Variable, operation: Operation, made: bool
    ) -> TensorQuantizationConfig:
        tensor = self.tensor_of(variable)
        rule = self.rules.get(tensor)
        if rule is None:
            return _idle()
        config = config_for(rule)
        if variable.is_parameter or tensor not in self._configs:
            if tensor in self._configs:  # a shared weight, of which PPQ has a copy per reader
                self._copies.setdefault(tensor, []).append(config)
            else:
                self._configs[tensor] = config
            return config
        config.dominated_by = self._configs[tensor]
        return config

    def is_active(self, tensor: str) -> bool:
        """True where the tensor is quantized now."""
        config = self._configs.get(tensor)
        return config is not None and is_active(config)

    def activate(self) -> None:
        """Write the specs into the configs."""
        for tensor, spec in self.specs.items():
            for config in [self._configs.get(tensor), *self._copies.get(tensor, [])]:
                if config is not None:
                    calibrate_config(config, spec)

    def build_quant_pipeline(
        self, setting: QuantizationSetting
    ) -> QuantizationOptimizationPipeline:
        """Calibration only: PPQ's own passes know nothing of these configs."""
        return QuantizationOptimizationPipeline([CalibrationPass(self)])

    def build_prequant_pipeline(
        self, setting: QuantizationSetting, executor: TorchExecutor
    ) -> QuantizationOptimizationPipeline:
        """Nothing: the graph was cleaned and fused before PPQ saw it."""
        return QuantizationOptimizationPipeline([])

    def run(
        self,
        image: torch.Tensor | Mapping[str, torch.Tensor],
        batches: Iterable[Any],
        device: str = "cpu",
    ) -> None:
        """Dispatch, calibrate and activate (PPQ's ``quantize``). ``image``: one batch, of several
        inputs by their names."""
        with without_clones():
            self.quantize(
                inputs=image if isinstance(image, torch.Tensor) else dict(image),
                calib_dataloader=batches,
                executor=Executor(self._graph, device=device),
                setting=QuantizationSetting(),
            )
