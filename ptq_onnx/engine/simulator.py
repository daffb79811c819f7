"""The seam to PPQ: the only place that imports it.

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
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ptq_onnx.blocks.walking import is_constant, name_of
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.engine.torch_ops import HANDLERS, fake_quantize
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import Rule, TensorSpec


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
EXACT = TargetPlatform.ONNXRUNTIME
"""The platform whose every handler is the exact kernel of the node (see node_sessions.py)."""
FAKE = TargetPlatform.INT8
"""The platform of PPQ's torch handlers, ours in place of missing or wrong ones."""

KERNEL = "ptq_onnx.kernel"
ORIGIN = "ptq_onnx.origin"
SPEC = "ptq_onnx.spec"


# --- graph ------------------------------------------------------------------------------


def build_graph(model: ir.Model) -> BaseGraph:
    """PPQ's graph of a fused model; a fused linear becomes ``PPQBiasFusedMatMul``.

    Names are kept. A parameter with several readers is given to PPQ once per reader (it
    refuses shared ones); ``extension_attrib[ORIGIN]`` maps the copies' names back.
    """
    graph = BaseGraph(name=model.graph.name or "model")
    origin: dict[str, str] = {}
    variables: dict[str, Variable] = {}

    def variable(value: ir.Value, reader: str) -> Variable:
        name = str(value.name)
        constant = is_constant(value)
        if constant and len(value.uses()) > 1:
            origin[f"{name}@{reader}"] = name
            name = f"{name}@{reader}"
        if name not in variables:
            data = None
            if constant and value.const_value is not None:
                data = _tensor(value.const_value.numpy())
            variables[name] = Variable(name=name, value=data, is_parameter=constant)
            graph.append_variable(variables[name])
        return variables[name]

    for node in model.graph:
        linear = node.domain == "ptq_onnx" and node.op_type == "Linear"
        kind = node.op_type
        if linear:
            biased = len(node.inputs) > 2 and node.inputs[2] is not None
            kind = "PPQBiasFusedMatMul" if biased else "MatMul"
        operation = Operation(name=name_of(node), op_type=kind, attributes=_attributes(node))
        graph.append_operation(operation)
        for index, value in enumerate(node.inputs):
            if value is None:
                empty = Variable(name=f"{operation.name}/empty/{index}")
                graph.append_variable(empty)
                _read(operation, empty)
            else:
                _read(operation, variable(value, f"{operation.name}:{index}"))
        for value in node.outputs:
            made = variable(value, operation.name)
            made.source_op = operation
            operation.outputs.append(made)
    for value in model.graph.inputs:
        if value.name in variables:
            graph.inputs[value.name] = variables[value.name]
    for value in model.graph.outputs:
        graph.outputs[value.name] = variables[str(value.name)]
    graph.set_extension_attrib(ORIGIN, origin)
    graph.set_extension_attrib("IS_DISPATCHED_GRAPH", True)
    return graph


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The weight itself: what runs here replaces parameters, and changes none in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped files cannot be written to, nor is that wanted
        return torch.from_numpy(np.asarray(array))


@contextlib.contextmanager
def _without_clones() -> Iterator[None]:
    """PPQ keeps a second copy of every weight; here only a reference."""

    def store(self: QuantableOperation) -> QuantableOperation:
        for variable in [*self.inputs, *self.outputs]:
            if variable.is_parameter:
                variable.stored_value = variable.value
        return self

    original = QuantableOperation.store_parameter_value
    QuantableOperation.store_parameter_value = store
    try:
        yield
    finally:
        QuantableOperation.store_parameter_value = original


def _read(operation: Operation, value: Variable) -> None:
    operation.inputs.append(value)
    value.dest_ops.append(operation)


def _attributes(node: ir.Node) -> dict[str, Any]:
    """Plain Python values; tensors as torch tensors."""
    out: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, ir.TensorProtocol):
            value = torch.from_numpy(np.array(value.numpy()))
        elif isinstance(value, tuple):
            value = list(value)
        out[name] = value
    return out


# --- configs ----------------------------------------------------------------------------


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

    def run(self, image: torch.Tensor, batches: Iterable[Any], device: str = "cpu") -> None:
        """Dispatch, calibrate and activate (PPQ's ``quantize``)."""
        with _without_clones():
            self.quantize(
                inputs=image,
                calib_dataloader=batches,
                executor=Executor(self._graph, device=device),
                setting=QuantizationSetting(),
            )


# --- execution --------------------------------------------------------------------------


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


def _exact(op: Operation, values: list[torch.Tensor], ctx: Any = None, **_: Any) -> Any:
    """The handler of every op on the platform ``EXACT``."""
    outputs = op.extension_attrib[KERNEL](op, values)
    return outputs if len(outputs) > 1 else outputs[0]


def _single(handler: Callable[..., Any]) -> Callable[..., Any]:
    def run(op: Operation, values: list[torch.Tensor], ctx: Any = None, **_: Any) -> Any:
        device = None if ctx is None else ctx.executing_device
        moved = [v if v is None or device is None else v.to(device) for v in values]
        return handler(op.attributes, moved)

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
        feed = next(iter(self.graph.inputs))
        self.executor.forward(
            inputs={feed: torch.from_numpy(np.ascontiguousarray(batch)).to(self._device)},
            output_names=list(self.graph.outputs),
            hooks=catchers,
        )
        return caught

    def walk(self, batch: np.ndarray[Any, Any], visit: Callable[[str, Any], None]) -> None:
        """Run one batch and hand every float tensor, as it is made, to ``visit(name, array)``."""
        hooks = {op.name: _Visit(op, visit) for op in self.graph.operations.values()}
        self._bind()
        feed = next(iter(self.graph.inputs))
        self.executor.forward(
            inputs={feed: torch.from_numpy(np.ascontiguousarray(batch)).to(self._device)},
            hooks=hooks,
        )


def _single_precision(value: torch.Tensor) -> torch.Tensor:
    """Float32 of an accumulator of integer arithmetic, which comes in float64."""
    return value.float() if value.dtype == torch.float64 else value


class _Catch(RuntimeHook):  # type: ignore[misc]
    """Keeps the outputs of one op whose names are wanted."""

    def __init__(self, operation: Operation, into: dict[str, Any], wanted: set[str]) -> None:
        super().__init__(operation)
        self._into, self._wanted = into, wanted

    def post_forward_hook(self, outputs: list[torch.Tensor], **_: Any) -> list[torch.Tensor]:
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
        for variable, value in zip(self._hook_to.outputs, outputs, strict=False):
            if value.is_floating_point():
                self._visit(variable.name, value.detach().cpu().numpy())
        return outputs
