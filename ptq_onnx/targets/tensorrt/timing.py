"""TensorRT: by its own Python package with torch's CUDA, else by ONNX Runtime's provider.

Neither runs without an NVIDIA device; :func:`load` says in one line what is missing.
"""

from __future__ import annotations

from typing import Any

from ptq_onnx.errors import ConfigError, ModelError, one_line
from ptq_onnx.evaluation.network import TENSORRT
from ptq_onnx.runtime.devices import provider_works
from ptq_onnx.targets.timing.runner import AS_WRITTEN, Runner
from ptq_onnx.targets.timing.session_runner import SessionRunner
from ptq_onnx.targets.timing.timed_model import Subject


class EngineRunner:
    """An engine built for one batch size, its inputs and outputs in the device's memory."""

    def __init__(self, trt: Any, torch: Any, subject: Subject, batch: int, *, half: bool) -> None:
        self.path = subject.path
        logger = trt.Logger(trt.Logger.ERROR)
        plan = self._build(trt, logger, subject, batch, half=half)
        # The runtime must outlive the engine, and the engine its context
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ModelError(f"Model {self.path}: TensorRT cannot load the engine it built.")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ModelError(f"Model {self.path}: the device has no memory for TensorRT's engine.")
        self._stream = torch.cuda.Stream()
        self._tensors = self._bind(trt, torch, subject, batch)
        self.memory: int | None = _device_memory(self._engine) + plan.nbytes

    def _build(self, trt: Any, logger: Any, subject: Subject, batch: int, *, half: bool) -> Any:
        """The serialized engine. As written: a strongly typed network, whose types are the
        file's. Half: the older, weakly typed one, free to use float16 (and the file's int8)."""
        kinds = trt.NetworkDefinitionCreationFlag
        flags = 0
        if not half and hasattr(kinds, "STRONGLY_TYPED"):  # later releases know no other kind
            flags = 1 << int(kinds.STRONGLY_TYPED)
        builder = trt.Builder(logger)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(subject.path)):
            reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
            text = " ".join("; ".join(reasons).split())[:300] or "it gives no reason"
            raise ModelError(f"Model {self.path} is refused by TensorRT's parser: {text}.")
        config = builder.create_builder_config()
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        if half:
            config.set_flag(trt.BuilderFlag.FP16)
            if subject.quantized:
                config.set_flag(trt.BuilderFlag.INT8)
        self._fix_shapes(builder, network, config, subject.shapes(batch))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ModelError(f"Model {self.path}: TensorRT cannot build an engine of it.")
        return plan

    @staticmethod
    def _fix_shapes(
        builder: Any, network: Any, config: Any, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Dynamic axes need a profile; its three shapes are the one that is timed."""
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        if not any(-1 in tuple(value.shape) for value in inputs):
            return
        profile = builder.create_optimization_profile()
        for value in inputs:
            shape = shapes[value.name]
            profile.set_shape(value.name, shape, shape, shape)
        config.add_optimization_profile(profile)

    def _bind(self, trt: Any, torch: Any, subject: Subject, batch: int) -> list[Any]:
        """Give every input and output its memory; returned so that it stays alive."""
        engine, context, feed = self._engine, self._context, subject.feed(batch)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        tensors = []
        for name in inputs:  # first: the outputs' shapes follow from these
            if not context.set_input_shape(name, feed[name].shape):
                raise ModelError(
                    f"Model {self.path}: TensorRT refuses {list(feed[name].shape)} for '{name}'."
                )
            tensors.append(torch.from_numpy(feed[name]).cuda().contiguous())
            context.set_tensor_address(name, tensors[-1].data_ptr())
        for name in names:
            if name in inputs:
                continue
            shape = tuple(context.get_tensor_shape(name))
            # Bytes enough for any type; only the address matters
            size = max(1, _product(shape)) * engine.get_tensor_dtype(name).itemsize
            tensors.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            context.set_tensor_address(name, tensors[-1].data_ptr())
        torch.cuda.synchronize()
        return tensors

    def run(self) -> None:
        """One inference, waited for. Raises ModelError."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ModelError(f"Model {self.path} fails in TensorRT.")
        self._stream.synchronize()


class TensorRt:
    """TensorRT's own package."""

    name = "tensorrt"
    on_gpu = True

    def __init__(self, trt: Any, torch: Any) -> None:
        self._trt, self._torch = trt, torch
        self.version = str(trt.__version__)
        self.device = str(torch.cuda.get_device_name())
        weak = hasattr(trt.BuilderFlag, "FP16")
        self.half = "fp16" if weak else None
        self.half_note = (
            ""
            if weak
            else "No fp16 column: this TensorRT takes its types from the file alone; time a"
            " float16 file beside the others."
        )

    def open(self, subject: Subject, batch: int, *, threads: int, precision: str) -> Runner:
        """A runner of an engine built for the batch size; half: its float part may have 16 bits."""
        del threads  # the host only waits
        half = precision != AS_WRITTEN
        return EngineRunner(self._trt, self._torch, subject, batch, half=half)


class TensorRtProvider:
    """TensorRT behind ONNX Runtime."""

    name = "tensorrt"
    on_gpu = True
    device = "CUDA"
    half: str | None = "fp16"
    half_note = ""

    def __init__(self) -> None:
        import onnxruntime as ort

        self.version = f"of onnxruntime {ort.__version__}"

    def open(self, subject: Subject, batch: int, *, threads: int, precision: str) -> Runner:
        """A runner of ONNX Runtime's TensorRT provider, int8 for quantized files."""
        options = {
            "trt_fp16_enable": str(precision != AS_WRITTEN),
            "trt_int8_enable": str(subject.quantized),
        }
        return SessionRunner(subject, batch, threads, device="cuda", tensorrt=options)


def load() -> TensorRt | TensorRtProvider:
    """The package where it works, else the provider. Raises ConfigError where neither does."""
    try:
        import tensorrt as trt
        import torch

        if not torch.cuda.is_available():
            raise ImportError("this torch finds no CUDA device")
        return TensorRt(trt, torch)
    except Exception as error:  # broken installations raise what they like
        reason = one_line(error)
    if provider_works(TENSORRT):
        return TensorRtProvider()
    raise ConfigError(
        f"--runtime tensorrt: TensorRT does not run here ({reason}; nor does onnxruntime's"
        f" {TENSORRT} load); it needs an NVIDIA device, its driver and pip install tensorrt."
    )


def _device_memory(engine: Any) -> int:
    """Bytes of activations; the attribute has got a new name."""
    return int(getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result
