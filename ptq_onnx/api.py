"""The package from Python: models and images as they are at hand in, results as objects out.

What the commands do, on paths or on models in memory. Bad input raises PtqError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.options import Options, configured
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.opening import Images
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.preprocess_input import Given, Preprocessing, taken
from ptq_onnx.pipeline.result import Result
from ptq_onnx.preparation.model_input import Model, model_file
from ptq_onnx.runtime.installed import require_runtime

if TYPE_CHECKING:
    from ptq_onnx.analysis.comparison_results import Comparison
    from ptq_onnx.evaluation.evaluate import Evaluation
    from ptq_onnx.evaluation.metrics.metric import Metric
    from ptq_onnx.preparation.inspection import Inspection
    from ptq_onnx.targets.checking.check import Report
    from ptq_onnx.targets.timing.results import Benchmark

require_runtime()

Path = str | os.PathLike[str]
Labels = Path | Sequence[int] | NDArray[np.integer[Any]]
"""A file of lines ``name label``, or the class of each image."""
Progress = Callable[[str, int], Callable[[int], None]]
"""Called with (stage, steps in all); returns what is called with steps done."""


@dataclass(frozen=True)
class RoleUse:
    """Where a role occurs: ``blocks`` it is in (none: outside of them), and its ``nodes``."""

    name: str
    blocks: tuple[int, ...]
    nodes: tuple[str, ...]


def quantize(
    model: Model,
    *,
    calib: Images | None = None,
    val: Images | None = None,
    labels: Labels | None = None,
    targets: Path | None = None,
    output: Path = "output",
    preprocess: Preprocessing | None = None,
    config: QuantizeConfig | None = None,
    scales: Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Result:
    """Quantize a model and write it, with its report, to ``output``.

    ``model``: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``. ``calib`` and ``val``,
    images to calibrate with and to measure on: what :func:`open_images` takes; what can be read
    only once is kept in a temporary file, 4 bytes for each value of at most ``images`` (of ``val``:
    all) images. ``labels``: classes of ``val``; a loader may yield them too. ``targets``: the truth
    of the option ``metric`` on them. ``output``: ``x.onnx`` is the file, its reports go to the
    folder ``x`` beside it; any other name is a folder of everything. ``preprocess``:
    ``"imagenet"``, ``"inception"``, a Hugging Face folder, a Preprocess, or a function from a
    picture to an array [C, H, W]. ``options``: the fields of :class:`QuantizeConfig`, which win
    over ``config``. Raises PtqError.
    """
    return _run(
        model, config, options, preprocess,
        calib=calib, val=val, labels=labels, targets=targets, output=output, scales=scales,
        progress=progress,
    )  # fmt: skip


def analyse(
    model: Model,
    *,
    calib: Images | None = None,
    val: Images | None = None,
    labels: Labels | None = None,
    targets: Path | None = None,
    output: Path = "analysis",
    preprocess: Preprocessing | None = None,
    config: QuantizeConfig | None = None,
    scales: Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Result:
    """Quantize a model and write only the report: what every module costs, and why.

    Takes what :func:`quantize` takes; ``sensitivity`` is on unless it is switched off. The
    measurements are ``analysis`` of the result. Raises PtqError.
    """
    return _run(
        model, config, {"sensitivity": True, **options, "report": True}, preprocess,
        calib=calib, val=val, labels=labels, targets=targets, output=output, scales=scales,
        progress=progress, keep_models=False,
    )  # fmt: skip


def check(model: Model, target: str = "onnxruntime") -> Report:
    """Will a runtime take a quantized model as it is? ``target``: whose rules, one of
    ``ptq_onnx.targets.checking.check.TARGETS``. Raises PtqError."""
    from ptq_onnx.targets.checking import check as conformance

    with model_file(model) as path:
        return conformance.check(path, target)


def inspect(model: Model) -> Inspection:
    """What is in a model: inputs, blocks, roles, and what was not understood. Raises PtqError."""
    from ptq_onnx.preparation import inspection

    with model_file(model) as path:
        return inspection.inspect(path)


def roles(model: Model) -> dict[str, RoleUse]:
    """The roles of a model by name, as ``keep_float``, ``more_bits`` and ``per_channel`` take them.

    Raises PtqError.
    """
    from ptq_onnx.blocks.selectors import known_roles
    from ptq_onnx.preparation.prepare import prepare

    with model_file(model) as path:
        prepared = prepare(path)
    found = {}
    for name in sorted(known_roles(prepared.blocks, prepared.sites)):
        at = {n: r.block for n, r in prepared.blocks.roles.items() if r.name == name}
        of_sites = [s.block for s in prepared.sites.values() if s.role == name]
        blocks = {block for block in (*at.values(), *of_sites) if block is not None}
        found[name] = RoleUse(name, tuple(sorted(blocks)), tuple(at))
    return found


def compare(
    models: Sequence[Path],
    images: Images,
    *,
    labels: Labels | None = None,
    reference: Path | None = None,
    metric: str | None = None,
    metric_option: Sequence[str] = (),
    targets: Path | None = None,
    preprocess: Preprocessing | None = None,
    input: Sequence[str] = (),
    block_images: int = 32,
    batch: int = 8,
    threads: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Quantized files of one float model side by side: accuracy, SQNR, blocks, size, speed.

    ``models``: folders or files that ``quantize`` wrote, or files of any tool. ``reference``: the
    float model; None: that of the first folder. ``metric``, ``metric_option``,
    ``targets``, ``input``: as of :func:`evaluate`. Raises PtqError.
    """
    from ptq_onnx.analysis import compare as comparison

    if isinstance(models, str | os.PathLike):
        models = [models]
    named = [os.fspath(path) for path in models]
    base = comparison.find_reference(named, None if reference is None else os.fspath(reference))
    source, truth = _measured(base, images, labels, preprocess, input)
    return comparison.compare(
        named,
        source,
        reference=base,
        labels=truth,
        block_images=block_images,
        batch=batch,
        threads=threads,
        progress=progress,
        metric=_metric(metric, metric_option, source, base, targets),
    )


def evaluate(
    model: Model,
    images: Images,
    labels: Labels | None = None,
    *,
    reference: Model | None = None,
    metric: str | None = None,
    metric_option: Sequence[str] = (),
    targets: Path | None = None,
    preprocess: Preprocessing | None = None,
    input: Sequence[str] = (),
    batch_size: int = 8,
    threads: int = 0,
    workers: int = 1,
    device: str = "auto",
    progress: Callable[[int, int], Any] | None = None,
) -> Evaluation:
    """Top-1 and top-5 of a model in ONNX Runtime, and how close it is to a ``reference``.

    ``images``: what :func:`open_images` takes, or returned. ``metric``: another measure, a name or
    ``module:function``, with its options ``KEY=VALUE``, against ``targets``, else against the
    ``reference``: ``score`` of the result. ``input``: what inputs besides the images get, as
    ``NAME=FILE.npz``. ``workers``: processes that run the models, in a script whose main part is
    guarded. ``device``: auto, cpu or cuda. Raises PtqError.
    """
    from ptq_onnx.calibration.class_output import features_of
    from ptq_onnx.evaluation import evaluate as evaluation
    from ptq_onnx.runtime.devices import on_device

    with ExitStack() as files:
        files.enter_context(on_device(QuantizeConfig(device=device).device))
        path = files.enter_context(model_file(model))
        other = None if reference is None else files.enter_context(model_file(reference))
        source, truth = _measured(path, images, labels, preprocess, input)
        features = []
        if other is not None and truth is None:
            features = features_of(other, source.preprocess.size)
        return evaluation.evaluate(
            path,
            source,
            truth,
            batch_size=batch_size,
            threads=threads,
            workers=workers,
            reference=other,
            features=features,
            progress=progress,
            metric=_metric(metric, metric_option, source, other or path, targets),
        )


def benchmark(
    models: Sequence[Model] | Model,
    *,
    runtime: str = "onnxruntime",
    batches: Sequence[int] | None = None,
    threads: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """How fast models run, side by side; the first is what the others are compared with.

    ``runtime``: ``onnxruntime``, ``openvino`` or ``tensorrt``. Raises PtqError.
    """
    from ptq_onnx.targets.timing import benchmark as timing
    from ptq_onnx.targets.timing.runtimes import open_runtime

    several = list(models) if isinstance(models, list | tuple) else [models]
    with ExitStack() as files:
        paths = [files.enter_context(model_file(one)) for one in several]
        return timing.benchmark(
            paths,
            open_runtime(runtime),
            batches=batches,
            threads=threads,
            seconds=timing.SECONDS if seconds is None else seconds,
            progress=progress,
        )


def _run(
    model: Model,
    config: QuantizeConfig | None,
    options: Any,
    preprocess: Any,
    *,
    val: Images | None,
    labels: Labels | None,
    targets: Path | None,
    scales: Path | None,
    output: Path,
    **more: Any,
) -> Result:
    """The pipeline, on what it takes."""
    if "preprocess" in options:
        raise ConfigError("preprocess was given twice.")
    settings, given = taken(preprocess, configured(config, options))
    from ptq_onnx.pipeline import quantize as pipeline

    with model_file(model) as path:
        if labels is not None and not isinstance(labels, str | os.PathLike):
            if val is None:
                raise ConfigError("labels without val: give the labelled images too.")
            val = _labelled(path, val, labels, settings, given)
            labels = None
        return pipeline.quantize(
            path,
            config=settings,
            val=val,
            labels=None if labels is None else os.fspath(labels),
            targets=None if targets is None else os.fspath(targets),
            scales=None if scales is None else os.fspath(scales),
            output=os.fspath(output),
            given=given,
            **more,
        )


def _opened(path: Any, images: Images, settings: QuantizeConfig, given: Given) -> ImageSource:
    """Images as a model takes them."""
    if isinstance(images, ImageSource):
        return images
    from ptq_onnx.blocks.sites import image_input
    from ptq_onnx.pipeline.preprocessing import resolve_preprocess
    from ptq_onnx.pipeline.several_inputs import open_source
    from ptq_onnx.preparation import model_files as graphs

    shown = resolve_preprocess(path, settings, given)
    name = image_input(graphs.outline(path)).name
    how: dict[str, Any] = {"transform": given.transform, "name": name}
    return open_source(path, images, shown, settings.input, **how)


def _metric(
    name: str | None,
    given: Sequence[str],
    images: ImageSource,
    model: Any,
    targets: Path | None,
) -> Metric | None:
    """The metric of that name. Raises ConfigError, ImageError."""
    from ptq_onnx.config.metric_options import check_metric
    from ptq_onnx.evaluation.metrics.by_name import make_metric

    options = (given,) if isinstance(given, str) else tuple(given)
    check_metric(name, options)
    truth = None if targets is None else os.fspath(targets)
    return make_metric(name, options, images, model, truth)


def _labelled(
    path: Any, images: Images, labels: Any, settings: QuantizeConfig, given: Given
) -> ImageSource:
    """Images with a class for each. Raises ImageError."""
    source = _opened(path, images, settings, given)
    truth = np.asarray(labels)
    if truth.shape != (len(source),) or truth.dtype.kind not in "iu":
        raise ImageError(
            f"labels: expected {len(source)} whole numbers, one for each image, or the path of a"
            f" labels file; got {truth.dtype}{list(truth.shape)}."
        )
    source.labels = truth.astype(np.int64)
    return source


def _measured(
    path: Any,
    images: Images,
    labels: Labels | None,
    preprocess: Preprocessing | None,
    given_inputs: Sequence[str] = (),
) -> tuple[ImageSource, NDArray[np.int64] | None]:
    """Images, and their classes where there are any; folders are none to a model without."""
    from ptq_onnx.evaluation.network import Network
    from ptq_onnx.images.labels import labels_for
    from ptq_onnx.pipeline.calibration_images import has_class_folders

    own = (given_inputs,) if isinstance(given_inputs, str) else tuple(given_inputs)
    settings, given = taken(preprocess, QuantizeConfig(input=own))
    if labels is not None and not isinstance(labels, str | os.PathLike):
        source = _labelled(path, images, labels, settings, given)
        return source, source.labels
    source = _opened(path, images, settings, given)
    if labels is not None:
        return source, labels_for(source, os.fspath(labels))
    classes = has_class_folders(source) and bool(Network(path, 1).class_outputs)
    return source, labels_for(source) if classes else None
