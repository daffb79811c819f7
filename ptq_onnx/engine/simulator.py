"""The simulator: a quantized model run op by op, as its file computes or in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ptq_onnx.engine.executor import Executor, Mode
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.engine.ppq_graph import EXACT, FAKE, KERNEL, ORIGIN, SPEC, build_graph
from ptq_onnx.engine.ppq_import import (
    OPERATION_FORWARD_TABLE,
    Operation,
    QuantableOperation,
    RuntimeHook,
    TargetPlatform,
    register_operation_handler,
)
from ptq_onnx.engine.torch_ops import HANDLERS
from ptq_onnx.engine.vit_quantizer import VitQuantizer, is_active
from ptq_onnx.errors import ModelError
from ptq_onnx.graph.bounded import BOUND
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.runtime.packed import unpack


def _exact(op: Operation, values: list[torch.Tensor], ctx: Any = None, **_: Any) -> Any:
    """The handler of every op on the platform ``EXACT``."""
    outputs = op.extension_attrib[KERNEL](op, values)
    return outputs if len(outputs) > 1 else outputs[0]


def _single(handler: Callable[..., Any]) -> Callable[..., Any]:
    def run(op: Operation, values: list[torch.Tensor], ctx: Any = None, **_: Any) -> Any:
        device = None if ctx is None else ctx.executing_device
        moved = [v if v is None or device is None else v.to(device) for v in values]
        made = handler(op.attributes, moved)
        bound = op.attributes.get(BOUND)
        return made if bound is None else torch.clamp(made, max=float(bound))

    return run


for _type, _handler in HANDLERS.items():
    for _platform in (FAKE, TargetPlatform.FP32, TargetPlatform.UNSPECIFIED, TargetPlatform.SOI):
        register_operation_handler(_single(_handler), _type, _platform)


class Simulator:
    """Runs a quantized (or float) model in PPQ's executor.

    ``exact`` computes what the exported file computes in ONNX Runtime, to the last bit;
    ``torch`` is PPQ's fake quantization, on a CPU or with CUDA. ``overrides`` replaces the
    arithmetic of single nodes (integers, see ``targets/integer/simulated_steps.py``): name →
    function of the inputs that returns the output, quantized.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizer: VitQuantizer | None = None,
        *,
        mode: Mode = "exact",
        device: str = "cpu",
        threads: int = 0,
        overrides: Mapping[str, Callable[[list[torch.Tensor]], torch.Tensor]] | None = None,
    ) -> None:
        self.graph = build_graph(model) if quantizer is None else quantizer.graph
        self._quantizer = quantizer
        self._inputs = inputs_of(model)
        self._origin: dict[str, str] = self.graph.extension_attrib[ORIGIN]
        specs = {} if quantizer is None else quantizer.specs
        self._kernels = NodeKernels(model, specs, threads)
        self._overrides = dict(overrides or {})
        self._mode = mode
        for kind in self._types():
            register_operation_handler(_exact, kind, EXACT)
        self._bind()
        self._normalize_rows(specs)
        self.executor = Executor(self.graph, device=device, mode=mode)
        self._device = device

    def _bind(self) -> None:
        """Point the graph's ops at this simulator: several may share one quantizer's graph."""
        fallback = {kind for kind in self._types() if kind not in OPERATION_FORWARD_TABLE[FAKE]}
        for operation in self.graph.operations.values():
            operation.set_extension_attrib(KERNEL, self._run)
            exact = self._mode == "exact" or operation.name in self._overrides
            exact = exact or operation.type in fallback
            operation.platform = EXACT if exact else FAKE

    def _types(self) -> set[str]:
        return {op.type for op in self.graph.operations.values()}

    def _normalize_rows(self, specs: Mapping[str, TensorSpec]) -> None:
        """Mark the products that divide by the row sums of decoded values, and those whose V is
        without its mean (torch mode)."""
        for operation in self.graph.operations.values():
            first = operation.inputs[0].name if operation.inputs else ""
            spec = specs.get(first)
            if operation.type == "MatMul":
                value = specs.get(operation.inputs[1].name)
                for key, one, around in (
                    ("normalize_rows", spec, RowSums()),
                    ("centred", value, TokenMean()),
                ):
                    operation.attributes[key] = int(one is not None and around in one.rule.around)

    def _run(self, operation: Operation, values: list[torch.Tensor]) -> list[torch.Tensor]:
        override = self._overrides.get(operation.name)
        active = self._active(operation)
        if override is not None:
            return [override(values)]
        names = [self._origin.get(v.name, v.name) for v in operation.inputs]
        wanted = set(self._kernels.inputs(operation.name))
        feeds = {
            name: _single_precision(value).detach().cpu().numpy()
            for name, value in zip(names, values, strict=True)
            if name in wanted
        }
        outputs = self._kernels.run(operation.name, active, feeds)
        return [torch.from_numpy(np.array(o, copy=None)).to(self._device) for o in outputs]

    def _active(self, operation: Operation) -> frozenset[str]:
        """Tensors around the op that are quantized at the moment."""
        if not isinstance(operation, QuantableOperation) or self._quantizer is None:
            return frozenset()
        own = {
            self._origin.get(variable.name, variable.name)
            for config, variable in operation.config_with_variable
            if SPEC in config.dominated_by.detail and is_active(config)
        }
        for variable in operation.inputs:
            before = self._kernels.carried.get(variable.name)
            if before is not None and self._quantizer.is_active(before[0]):
                own.add(variable.name)
        return frozenset(own)

    def run(
        self, batch: np.ndarray[Any, Any], names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors by name ([B, …] float32) of one batch [B, C, H, W]; the outputs by default.

        Tensors are given as their op leaves them, quantized where the op quantizes its
        output. Raises ModelError for a name that the graph does not have.
        """
        wanted = list(self.graph.outputs) if names is None else list(names)
        catchers: dict[str, RuntimeHook] = {}
        caught: dict[str, np.ndarray[Any, Any]] = {}
        for name in wanted:
            variable = self.graph.variables.get(name)
            if variable is None or variable.source_op is None:
                raise ModelError(f"The graph has no tensor '{name}' that an op makes.")
            operation = variable.source_op
            catchers.setdefault(operation.name, _Catch(operation, caught, set(wanted)))
        self._bind()
        self.executor.forward(
            inputs=self._feeds(batch),
            output_names=list(self.graph.outputs),
            hooks=catchers,
        )
        return caught

    def _feeds(self, batch: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        """The batch, or the parts that are packed in it, by input."""
        return {n: v.to(self._device) for n, v in tensors_of(self._inputs, batch).items()}

    def walk(self, batch: np.ndarray[Any, Any], visit: Callable[[str, Any], None]) -> None:
        """Run one batch and hand every float tensor, as it is made, to ``visit(name, array)``."""
        hooks = {op.name: _Visit(op, visit) for op in self.graph.operations.values()}
        self._bind()
        self.executor.forward(
            inputs=self._feeds(batch),
            hooks=hooks,
        )


def inputs_of(model: ir.Model) -> dict[str, np.dtype[Any]]:
    """The inputs of a graph with their types, in order."""
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    return {str(v.name): np.dtype((v.dtype or ir.DataType.FLOAT).numpy()) for v in free}


def tensors_of(
    inputs: Mapping[str, np.dtype[Any]], batch: np.ndarray[Any, Any]
) -> dict[str, torch.Tensor]:
    """A batch, or the parts that are packed in it, by input."""
    parts = unpack(batch) or [batch]
    return {
        name: torch.from_numpy(np.ascontiguousarray(part, kind))
        for (name, kind), part in zip(inputs.items(), parts, strict=True)
    }


def _single_precision(value: torch.Tensor) -> torch.Tensor:
    """Float32 of an accumulator of integer arithmetic, which comes in float64."""
    return value.float() if value.dtype == torch.float64 else value


class _Catch(RuntimeHook):  # type: ignore[misc]
    """Keeps the outputs of one op whose names are wanted."""

    def __init__(self, operation: Operation, into: dict[str, Any], wanted: set[str]) -> None:
        super().__init__(operation)
        self._into, self._wanted = into, wanted

    def post_forward_hook(self, outputs: list[torch.Tensor], **_: Any) -> list[torch.Tensor]:
        """Keep those outputs of the op that are wanted."""
        for variable, value in zip(self._hook_to.outputs, outputs, strict=False):
            if variable.name in self._wanted:
                self._into[variable.name] = value.detach().cpu().numpy()
        return outputs


class _Visit(RuntimeHook):  # type: ignore[misc]
    """Hands every float output of one op to a function."""

    def __init__(self, operation: Operation, visit: Callable[[str, Any], None]) -> None:
        super().__init__(operation)
        self._visit = visit

    def post_forward_hook(self, outputs: list[torch.Tensor], **_: Any) -> list[torch.Tensor]:
        """Hand on every float output of the op, by name."""
        for variable, value in zip(self._hook_to.outputs, outputs, strict=False):
            if value.is_floating_point():
                self._visit(variable.name, value.detach().cpu().numpy())
        return outputs
