"""Several quantized files of one float model side by side, whichever tool wrote them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.comparison_results import BlockMatch, Comparison, Contender
from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.errors import Sums
from ptq_onnx.analysis.matching import Tapped, match
from ptq_onnx.analysis.same_model import check_same_model, preprocess_notes
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.class_output import features_of
from ptq_onnx.config.stages import READING
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.evaluate import Evaluation, evaluate, no_classes, since
from ptq_onnx.evaluation.metrics.metric import Metric
from ptq_onnx.evaluation.network import Network, session
from ptq_onnx.evaluation.outputs import decibels as in_json
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.files.output_paths import find_output
from ptq_onnx.files.result_names import FLOAT, FORMED, REPORT
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.scales_file import read_scales
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.progress import Planned, Progress, Stages

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

TIMING, MEASURING = "Timing the files", "Measuring the files"
"""Stages, as the user reads them."""
LOOKED = 2
"""Images that matching looks at."""
ROUNDS = 21
"""Timings per file; the files take turns, so that all meet the same load."""


def quantized_file(path: str | Path) -> Path:
    """The model of an output folder, or the file itself. Raises ConfigError."""
    return find_output(path).model


def find_reference(paths: Sequence[str | Path], reference: str | Path | None) -> Path:
    """The float model: the one named, else that of the first output. Raises ConfigError."""
    if reference is not None:
        if not Path(reference).is_file():
            raise ConfigError(f"--reference {reference} does not exist.")
        return Path(reference)
    beside = (find_output(path).beside(FLOAT) for path in paths)
    found = next((path for path in beside if path is not None), None)
    if found is None:
        raise ConfigError("Files alone do not identify the float model: name it with --reference.")
    return found


def compare(
    paths: Sequence[str | Path],
    images: ImageSource,
    *,
    reference: str | Path | None = None,
    labels: Labels | None = None,
    block_images: int = 32,
    batch: int = 8,
    threads: int = 0,
    progress: Progress | None = None,
    metric: Metric | None = None,
    opened: Callable[[Path], Any] | None = None,
) -> Comparison:
    """Measure every file, and the float model, on the same images. Raises PtqError.

    ``opened``: makes the session that the quantized files are measured in, where that is not ONNX
    Runtime's own; blocks are looked at, and times taken, in ONNX Runtime.
    """
    if not paths:
        raise ConfigError("compare needs output folders or quantized .onnx files.")
    base = find_reference(paths, reference)
    files = [quantized_file(path) for path in paths]
    names = _names([Path(p) for p in paths])
    _check_labels(base, labels)
    check_same_model(base, paths, names, images, threads)
    count = len(files) + 1
    plan = [Planned(READING, 10), Planned(TIMING, ROUNDS * count)]
    begin = Stages(progress, [*plan, Planned(MEASURING, 2 * count * len(images))])
    begin(READING, 1)
    features = features_of(base, images.preprocess.size)
    outputs = block_outputs(base, images.preprocess.size)
    tensors = list(outputs.values())
    floats = FloatBlocks(base, tensors, images, block_images, threads) if outputs else None
    times = _times([base, *files], images, threads, begin(TIMING, ROUNDS))
    advance = begin(MEASURING, count * len(images))
    contenders = []
    for index, (name, file) in enumerate(zip(["float", *names], [base, *files], strict=True)):
        measured = evaluate(
            opened(file) if index and opened is not None else file,
            images,
            labels,
            batch_size=batch,
            threads=threads,
            reference=base if index else None,
            features=features,
            progress=since(advance),
            names=(f"Model '{file}'", None),
            metric=metric if index else None,
        )
        tapped = Tapped(file, threads, _specs(file) if index else None)
        blocks: tuple[BlockMatch, ...] = ()
        if index and floats is not None:
            own = turned_model(file)
            if own is not None:
                mine = block_outputs(own, images.preprocess.size)
                turned = FloatBlocks(own, list(mine.values()), images, block_images, threads)
                blocks = turned.blocks(tapped, mine)
            else:
                blocks = floats.blocks(tapped, outputs)
        contenders.append(_contender(name, file, measured, tapped, times[index], blocks))
    begin.done()
    notes = preprocess_notes(files, names, images.preprocess)
    looked = min(block_images, len(images))
    return Comparison(base.name, len(images), looked, tuple(contenders), notes)


def _contender(
    name: str,
    file: Path,
    measured: Evaluation,
    tapped: Tapped,
    milliseconds: float,
    blocks: tuple[BlockMatch, ...],
) -> Contender:
    """What was measured of one file."""
    return Contender(
        name=name,
        file=file.name,
        bytes=model_bytes(file),
        quantized_ops=tapped.quantized_ops(),
        top1=measured.top1,
        top5=measured.top5,
        sqnr_db=in_json(measured.sqnr_db),
        agreement=measured.agreement,
        ms_per_image=milliseconds,
        blocks=blocks,
        outputs=measured.outputs,
        score=measured.score,
    )


def block_outputs(path: Path, size: tuple[int, int] | None = None) -> dict[int, str]:
    """The tensor behind each transformer block of a float model; none where it has no blocks, or
    cannot be prepared."""
    try:
        prepared = prepare(path, size=size)
    except ModelError:
        return {}
    return {
        role.block: str(node.outputs[0].name)
        for node in prepared.model.graph
        if (role := prepared.blocks.roles[name_of(node)]).name == "residual2"
        and role.block is not None
    }


class FloatBlocks:
    """The float model's block outputs, and the errors of other files against them."""

    def __init__(
        self, path: Path, tensors: list[str], images: ImageSource, limit: int, threads: int
    ) -> None:
        self._tensors = tensors
        self._images, self._limit = images, limit
        copy = graphs.to_standard(prepare(path, size=images.preprocess.size).model)
        values = {v.name: v for node in copy.graph for v in node.outputs}
        own = {v.name for v in copy.graph.outputs}
        copy.graph.outputs.extend(values[t] for t in tensors if t not in own)
        self._session = session(ir.to_proto(copy).SerializeToString(), threads, cpu=True)
        self._input = self._session.get_inputs()[0]
        size = self._input.shape[0]
        self._size = size if isinstance(size, int) else LOOKED

    def run(self, batch: Array) -> dict[str, Array]:
        """The block outputs of images [B, C, H, W], by name."""
        missing = self._size - len(batch)
        full = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        found: list[Any] = self._session.run(self._tensors, {self._input.name: full})
        return {t: f[: len(batch)] for t, f in zip(self._tensors, found, strict=True)}

    def blocks(self, tapped: Tapped, outputs: dict[int, str]) -> tuple[BlockMatch, ...]:
        """The SNR of every block in another file."""
        if not outputs:
            return ()
        first = next(self._images.batches(self._size))
        found = match(tapped, self.run(first), first)
        pairs = {tensor: one[0] for tensor, one in found.items() if one is not None}
        sums = {tensor: Sums() for tensor in pairs}
        reader = tapped.session(list(dict.fromkeys(pairs.values()))) if pairs else None
        done = 0
        for batch in self._images.batches(self._size):
            if reader is None or done >= self._limit:
                break
            floats, others = self.run(batch), reader.run(batch)
            for tensor, name in pairs.items():
                sums[tensor].add(floats[tensor], others[name])
            done += len(batch)
        out = []
        for block, tensor in sorted(outputs.items()):
            one = found[tensor]
            if one is None:
                out.append(BlockMatch(block, None, None, None))
            else:
                ratio = sums[tensor].snr
                out.append(BlockMatch(block, one[0], one[1], decibels(ratio), ratio))
        return tuple(out)


def turned_model(file: Path) -> Path | None:
    """The float model beside a file of ours whose residual stream was turned: its blocks' outputs
    are those of the file, the original's are the same in other coordinates."""
    try:
        beside = find_output(file)
    except ConfigError:
        return None
    report, formed = beside.beside(REPORT), beside.beside(FORMED)
    if report is None or formed is None:
        return None
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
        turned = (values.get("rotation") or {}).get("turned") or []
        matrices = [one for one in turned if not one["by"].startswith("none")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return formed if matrices else None


def _specs(file: Path) -> Mapping[str, TensorSpec]:
    """What the codes of an integer file mean, by the report beside it; nothing where there is
    none of this tool."""
    try:
        report = find_output(file).beside(REPORT)
        return {} if report is None else read_scales(report)
    except ConfigError:
        return {}


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names, made longer where two are the same."""
    names = [p.name if p.is_dir() else p.stem for p in paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in paths]
    return [n if names.index(n) == i else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _times(
    files: Sequence[Path], images: ImageSource, threads: int, progress: Callable[[int], None]
) -> list[float]:
    """Median milliseconds of one image, file by file."""
    one = next(images.batches(1))
    models = [Network(file, threads) for file in files]
    for model in models:
        model.check(images.preprocess.shape)
        model(one)
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, times in zip(models, taken, strict=True):
            start = time.perf_counter()
            model(one)
            times.append(time.perf_counter() - start)
        progress(1)
    return [1000 * statistics.median(times) for times in taken]


def classifies(base: Path) -> bool:
    """Whether a model has an output [batch, classes]. Raises ModelError."""
    return bool(Network(base, 1).class_outputs)


def _check_labels(base: Path, labels: Labels | None) -> None:
    """Refuse labels for a model that has no classes, before the work. Raises ModelError."""
    if labels is None:
        return
    network = Network(base, 1)
    if not network.class_outputs:
        raise ModelError(no_classes(network))
