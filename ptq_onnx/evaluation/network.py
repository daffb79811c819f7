"""ONNX Runtime sessions of classifiers: on the GPU where one really works, else on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError, ModelError
from ptq_onnx.images.preprocess import FloatArray
from ptq_onnx.preparation.signature import channels_last, feeds
from ptq_onnx.runtime.devices import AUTO, CPU, providers_for
from ptq_onnx.runtime.packed import TYPES as INPUTS
from ptq_onnx.runtime.packed import unpack
from ptq_onnx.runtime.sessions import Session
from ptq_onnx.telemetry import switch_off

switch_off()  # by its API too, where it is loaded by now

Model = str | Path | bytes

TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
"""What images are fed as."""
_FLOATS = [name for name, kind in TYPES.items() if issubclass(kind, np.floating)]
_WHOLE = [f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_NUMBERS = (*_FLOATS, "tensor(bool)", *_WHOLE)
TENSORRT = "TensorrtExecutionProvider"
_ERROR = 3  # ONNX Runtime's severity


def session(
    model: Model,
    threads: int = 0,
    *,
    optimize: bool = True,
    cpu: bool = False,
    spin: bool = True,
    tensorrt: Mapping[str, str] | None = None,
    name: str | None = None,
) -> ort.InferenceSession:
    """Open a model file, or its bytes, on ``threads`` CPU threads (0: all).

    The GPU is used where CUDA really loads, in full float32 precision, unless ``--device`` says
    otherwise (``cpu=True`` forbids it).
    ``optimize=False`` runs the graph as it is written. ``spin=False``: its threads rest between
    two runs, so that they take no time from another session. ``tensorrt``: run in TensorRT, with
    these options of its provider. ``name``: what errors call the model. Raises ModelError.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERROR
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = [CPU] if cpu else providers_for(AUTO)
    if tensorrt is not None:
        providers.insert(0, (TENSORRT, dict(tensorrt)))
    where = name or ("The model" if isinstance(model, bytes) else f"Model '{model}'")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{where} does not exist: expected an .onnx file.")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return open_with_fp8(source, options, providers)
    except Exception as error:  # its exceptions share no base class
        reason = " ".join(str(error.__cause__ or error).split())
        if name is not None:
            reason = reason.replace(str(model), "it")
        raise ModelError(f"{where} is refused by ONNX Runtime: {reason[:300]}") from error


def open_with_fp8(
    source: str | bytes, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    """A session, without the Q/DQ fusions where the file holds FP8 codes.

    ONNX Runtime 1.31 fuses Q/DQ of FP8 into integer kernels as if they were int8, and then
    refuses its own graph; without them it computes the products on the dequantized floats.
    """
    try:
        return Session(source, options, providers=providers)
    except Exception as error:
        if "float8e4m3fn" not in str(error.__cause__):
            raise
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return Session(source, options, providers=providers)


class Network:
    """A model, whose outputs it gives by name; images [B, C, H, W] are fed in the layout and type
    that the file takes, several inputs packed in one batch (``runtime/packed.py``).

    ``names``: the outputs given; ``left_out``: those that are no tensor of numbers, with their
    type. ``whole``: outputs whose first dimension turned out not to be the batch: one run's is
    one value. A model with a fixed batch size gets just that many images at a time, the last
    batch filled up; what it makes of the filling counts nowhere. Raises ModelError.
    """

    def __init__(
        self,
        model: Model | ort.InferenceSession,
        threads: int = 0,
        *,
        name: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        """``model``: a file, its bytes, or a session that is open. ``name``: what errors call it,
        for files that are not the user's. ``outputs``: those wanted, where not all are."""
        self.name = name or (f"Model '{model}'" if isinstance(model, str | Path) else "The model")
        if isinstance(model, str | Path | bytes):
            self._session = session(model, threads, name=name)
        else:
            self._session = model
        inputs = self._session.get_inputs()
        if not inputs or any(i.type not in INPUTS or not i.shape for i in inputs):
            found = ", ".join(f"{i.name}: {i.type}{list(i.shape)}" for i in inputs)
            raise ModelError(
                f"{self.name}: expected inputs [batch, …] of numbers, as images [batch, C, H, W] or"
                f" [batch, H, W, C], got {found or 'none'}."
            )
        made = [o for o in self._session.get_outputs() if outputs is None or o.name in outputs]
        self.left_out = tuple(f"{o.name} ({o.type})" for o in made if o.type not in _NUMBERS)
        self._made = {o.name: o for o in made if o.type in _NUMBERS}
        self.names = tuple(self._made)
        self.whole: set[str] = set()
        self._inputs = inputs
        self._input = next((i for i in inputs if len(i.shape) == 4 and i.type in TYPES), inputs[0])
        batch = self._input.shape[0]
        self._batch: int | None = batch if isinstance(batch, int) and batch > 0 else None

    @property
    def described(self) -> str:
        """The outputs with their shapes, for errors."""
        return ", ".join(f"{o.name}{list(o.shape)}" for o in self._made.values()) or "none"

    @property
    def class_outputs(self) -> tuple[str, ...]:
        """Outputs that are [batch, classes], or may be where the file states no shape."""
        return tuple(
            o.name
            for o in self._made.values()
            if o.type in _FLOATS and (not o.shape or may_be_classes(o.shape))
        )

    @property
    def loose(self) -> set[str]:
        """Outputs whose size may follow the values: no fixed one is stated beyond the batch."""
        stated = {n: o.shape for n, o in self._made.items()}
        open_ = {n for n, s in stated.items() if any(not isinstance(d, int) for d in s[1:])}
        return open_ | {n for n in self.whole if not all(isinstance(d, int) for d in stated[n])}

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images [C, H, W] that do not fit the input; several inputs were held to it when
        they were opened. Raises ImageError."""
        if len(self._inputs) > 1 or len(self._input.shape) != 4 or self._input.type not in TYPES:
            return
        wanted = list(self._input.shape[1:])
        if channels_last(self._input.shape):
            wanted = [wanted[2], *wanted[:2]]
        if any(isinstance(w, int) and w not in (s, -1) for w, s in zip(wanted, shape, strict=True)):
            raise ImageError(
                f"{self.name} expects images {list(wanted)} (channels, height, width), got "
                f"{list(shape)}: set the preprocessing to the model's input size."
            )

    def __call__(self, images: FloatArray) -> dict[str, NDArray[Any]]:
        """The outputs for images [B, C, H, W]; without those of which only a run with filling
        would tell. Raises ModelError."""
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in self.names}
        for part, real in self._parts(images):
            for name, value in zip(self.names, self._run(part), strict=True):
                if value.ndim and len(value) == len(part):
                    found[name].append(value[:real])
                    continue
                self.whole.add(name)
                if real == len(part):
                    found[name].append(np.atleast_1d(value))
        return {name: np.concatenate(parts) for name, parts in found.items() if parts}

    def _parts(self, images: FloatArray) -> Iterator[tuple[FloatArray, int]]:
        """What is run at once, and how many of it are images."""
        if self._batch is None:
            yield images, len(images)
            return
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            missing = self._batch - len(part)
            # Copies of the last image: zeros could raise a warning, or an error, inside the model
            full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            yield (full if missing else part), len(part)

    def _run(self, images: FloatArray) -> list[NDArray[Any]]:
        plain = len(self._inputs) == 1 and len(self._input.shape) == 4 and self._input.type in TYPES
        if not plain and unpack(images) is None:
            found = ", ".join(f"{i.name}: {i.type}{list(i.shape)}" for i in self._inputs)
            raise ModelError(
                f"{self.name}: images alone are for one input of images, float or uint8,"
                f" [batch, C, H, W] or [batch, H, W, C], got {found}: give the others with --input"
                " NAME=FILE.npz or a number."
            )
        given = feeds(self._inputs, images)
        try:
            result: list[NDArray[Any]] = self._session.run(list(self.names), given)
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ModelError(f"{self.name} fails in ONNX Runtime: {reason[:300]}") from error
        return [np.asarray(value) for value in result]


def may_be_classes(shape: Sequence[Any]) -> bool:
    """Whether a shape is [batch, classes] of several classes; ones may follow, and what is no
    number may be any."""
    return len(shape) >= 2 and shape[1] != 1 and all(d == 1 for d in shape[2:])


class Classifier:
    """A model with one image input whose logits are one output.

    The logits are ``output``, else the only output, or the first of rank 2. Raises ModelError.
    """

    def __init__(
        self,
        model: Model | ort.InferenceSession,
        threads: int = 0,
        output: str | None = None,
    ) -> None:
        """``model``: a file, its bytes, or a session that is open."""
        network = Network(model, threads)
        ranked = network.class_outputs or (network.names if len(network.names) == 1 else ())
        if not ranked:
            raise ModelError(
                f"{network.name}: none of its outputs is [batch, classes]: {network.described}."
            )
        self._output = output or ranked[0]
        network.names = (self._output,)
        self._network, self.name = network, network.name

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images [C, H, W] that do not fit the input. Raises ImageError."""
        self._network.check(shape)

    def __call__(self, images: FloatArray) -> FloatArray:
        """Logits float32 [B, classes] of images [B, C, H, W]. Raises ModelError."""
        found = self._network(images).get(self._output)
        if found is None or found.ndim < 2 or len(found) != len(images):
            shape = "nothing" if found is None else list(found.shape)
            raise ModelError(
                f"{self.name}: expected logits [{len(images)}, classes] in '{self._output}', "
                f"got {shape}."
            )
        return found.astype(np.float32, copy=False).reshape(len(images), -1)
