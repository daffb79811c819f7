"""A quantization whose file is measured by others: its first half, parts of the images, the rest.

The halves are those of ``quantize``, run one after the other by different processes, and the result
is the same, byte by byte. What lies between them is in a folder that all of them see.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

from ptq_onnx.config import stages
from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.parts import Part, keep_part, parts_of
from ptq_onnx.evaluation.recorded import Record
from ptq_onnx.files.held_folder import remove
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.files.publishing import parents_of
from ptq_onnx.files.result_names import FLOAT, QUANTIZED
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.job import Job
from ptq_onnx.pipeline.made_images import with_made_images
from ptq_onnx.pipeline.measurement import BATCH, NAMES
from ptq_onnx.pipeline.quantize import (
    faults_of,
    load,
    measured,
    published,
    quantize_read,
    unmeasured,
)
from ptq_onnx.pipeline.reading import Inputs, read_inputs, without_images
from ptq_onnx.pipeline.request import Request
from ptq_onnx.pipeline.result import Result
from ptq_onnx.pipeline.several_inputs import open_source
from ptq_onnx.pipeline.sharing import with_workers_that_pay
from ptq_onnx.progress import Stages
from ptq_onnx.runtime.devices import on_device
from ptq_onnx.runtime.processes import kept_processes

FILES, STATE, OUTPUTS = "files", "state.pickle", "outputs.npy"


@dataclass(frozen=True)
class Unfinished:
    """A quantization whose file is written and not measured. ``folder``: of all that is between;
    ``parts``: of the images ``val``; ``floats``: the place of the float model's outputs on them,
    which is the same for all runs that share them."""

    request: Request
    folder: Path
    preprocess: Preprocess
    parts: tuple[Part, ...]
    floats: Record

    @property
    def own(self) -> Record:
        """The place of the quantized file's outputs."""
        return Record(self.folder / OUTPUTS)


def quantize_apart(request: Request, folder: Path) -> Result | Unfinished:
    """The first half, where the images ``val`` make more than one part and the request names a
    folder for the float model's outputs; else the whole. Raises PtqError."""
    with on_device(request.config.device):
        request = without_images(request)
        begin = Stages(None)
        begin(stages.READING, 1)
        inputs = read_inputs(request)
        parts = _parts(request, inputs)
        floats = request.shared.floats
        if len(parts) < 2 or floats is None:
            return quantize_read(request, inputs, begin)
        paying, notes = with_workers_that_pay(request, inputs)
        load(paying, inputs, begin)
        inputs = with_made_images(paying, inputs, begin)
        remove(folder)
        work = folder / FILES
        work.mkdir(parents=True)
        job = Job(paying, inputs, work, begin, [*inputs.notes, *notes])
        with kept_processes(), faults_of(job):
            made = unmeasured(job)
            config, images = request.config, inputs.preprocess
            record = Record.of(floats, work / FLOAT, images, BATCH, config.threads)
        (folder / STATE).write_bytes(pickle.dumps((made, job.notes)))
        return Unfinished(request, folder, images, tuple(parts), record)


def measure_part(unfinished: Unfinished, part: Part, opened: Opened, *, quantized: bool) -> bool:
    """Run the quantized file, or the float one, on a part of the images and keep the outputs;
    whether they are all there. Raises PtqError."""
    with on_device(unfinished.request.config.device):
        images = opened.images(unfinished).part(*part)
        if images is None:
            return False
        record = unfinished.own if quantized else unfinished.floats
        model = unfinished.folder / FILES / (QUANTIZED if quantized else FLOAT)
        network = opened.network(model, unfinished.request.config.threads, NAMES[not quantized])
        return keep_part(network, images, record.part(part[0]), BATCH)


def finish(unfinished: Unfinished, *, whole: bool) -> Result:
    """The second half; all of it once more where a process was killed while the files moved to
    their place. ``whole``: all outputs are there; else the models run here. Raises PtqError."""
    request, begin = unfinished.request, Stages(None)
    state = unfinished.folder / STATE
    with on_device(request.config.device):
        inputs = read_inputs(request)
        if not state.exists():
            return quantize_read(request, inputs, begin)
        made, notes = pickle.loads(state.read_bytes())
        job = Job(request, inputs, unfinished.folder / FILES, begin, notes)
        with faults_of(job):
            finished = measured(job, made, unfinished.own if whole else None)
        state.unlink()  # what is in the folder from here on may be what was in the place before
        with parents_of(request.place.folder):
            result = published(job, finished)
        remove(unfinished.folder)
        return result


def _parts(request: Request, inputs: Inputs) -> list[Part]:
    """Those of the images ``val``; one where they can only be read from the beginning."""
    tested = inputs.tested
    if tested is None:
        return []
    parts = parts_of(len(tested), model_bytes(request.model), BATCH)
    return parts if tested.part(0, 1) is not None else parts[:1]


class Opened:
    """What a process has open for the parts that it runs: the images, and the model of the last."""

    def __init__(self) -> None:
        self._images: tuple[object, ImageSource] | None = None
        self._network: tuple[object, Network] | None = None

    def close(self) -> None:
        """Let go of the model."""
        self._network = None

    def images(self, unfinished: Unfinished) -> ImageSource:
        """The images ``val``. Raises PtqError."""
        request, preprocess = unfinished.request, unfinished.preprocess
        key = request.model, request.val, preprocess, request.config.input
        if self._images is None or self._images[0] != key:
            found = open_source(request.model, request.val, preprocess, request.config.input)
            self._images = key, found
        return self._images[1]

    def network(self, model: Path, threads: int, name: str) -> Network:
        """A model. Raises ModelError."""
        key = model, model.stat().st_mtime_ns, threads
        if self._network is None or self._network[0] != key:
            self._network = None  # one at a time in memory
            self._network = key, Network(model, threads, name=name)
        return self._network[1]
