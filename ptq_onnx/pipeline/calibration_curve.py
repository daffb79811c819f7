"""What calibration images contribute: quantized with few and many images, and with noise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.stages import RUNNING_FLOAT
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.outputs import MOST_DB
from ptq_onnx.files.file_names import printable
from ptq_onnx.files.held_folder import scratch_folder
from ptq_onnx.files.result_names import QUANTIZED
from ptq_onnx.images.source import NOISE, ImageSource
from ptq_onnx.images.synthetic import SYNTHETIC, is_drawn
from ptq_onnx.progress import Planned, Progress, Stages
from ptq_onnx.runtime.devices import on_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ptq_onnx.analysis.comparison_results import Closeness
    from ptq_onnx.auto.closeness import Recorded

SIZES = (1, 4, 16, 64, 256)
QUANTIZING = "Quantizing and measuring"
IMAGES = "images"
"""The source that is not drawn."""
DRAWN = (NOISE, SYNTHETIC)
"""Those that are drawn. Those made from the model take too long for all sizes."""
LEAST_SPAN = 10
"""Points of accuracy that the axis shows at least."""
LABELS = {"top1": "Top-1 accuracy in %", "sqnr_db": "SQNR in dB"}
LINES = {
    IMAGES: ("real images", "#1f77b4", "-", "o"),
    SYNTHETIC: ("synthetic pictures", "#2a9d6f", "-.", "^"),
    NOISE: ("Gaussian noise", "#c98a00", "--", "s"),
}
"""Name, colour, line style and marker by source."""


@dataclass(frozen=True)
class Point:
    """A model calibrated with ``images`` of ``source``; ``top1`` in % where there are labels."""

    source: str
    images: int
    sqnr_db: float
    agreement: float | None
    top1: float | None = None
    score: float | None = None
    """By the metric that was asked for."""


@dataclass(frozen=True)
class Curve:
    """Points by source and number of images, measured on ``count`` images held out."""

    model: str
    quantizer: str
    bits: str
    method: str
    count: int
    float_top1: float | None
    points: tuple[Point, ...]
    notes: tuple[str, ...]
    metric: str | None = None
    unit: str = ""
    float_score: float | None = None

    def line(self, source: str, metric: str) -> dict[int, float]:
        """A metric by the number of images; what is not finite is left out."""
        values = {p.images: getattr(p, metric) for p in self.points if p.source == source}
        return {n: v for n, v in values.items() if v is not None and math.isfinite(v)}

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, which knows neither infinity nor NaN."""
        plain = asdict(self)
        plain["points"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in p.items()}
            for p in plain["points"]
        ]
        return plain


def measure_curve(
    model: Path,
    *,
    config: QuantizeConfig,
    val: str | Path,
    calib: str | Path | None = None,
    labels: str | Path | None = None,
    targets: str | Path | None = None,
    sizes: Sequence[int] = SIZES,
    progress: Progress | None = None,
) -> Curve:
    """Quantize ``model`` once for each of ``sizes``, with images, and with drawn ones.

    ``val``: the images to measure on; with ``labels``, or class folders, top-1 too. A size
    beyond the number of calibration images is left out. Raises PtqError.
    """
    from ptq_onnx.auto.closeness import Recorded
    from ptq_onnx.evaluation.metrics.by_name import make_metric
    from ptq_onnx.images.labels import labels_for
    from ptq_onnx.pipeline import embedded
    from ptq_onnx.pipeline.preprocessing import resolve_preprocess
    from ptq_onnx.pipeline.several_inputs import open_source

    sizes = _checked(sizes)
    calib = embedded.images_for(model) if calib is None else calib
    if config.auto:
        raise ConfigError("auto would decide anew for every size; use it with quantize.")
    if is_drawn(calib):
        beside = "; it is drawn beside them anyway" if calib in DRAWN else ""
        raise ConfigError(f"--calib {calib}: name real images{beside}.")
    preprocess = resolve_preprocess(model, config)
    available = len(open_source(model, calib, preprocess, config.input))
    tested = open_source(model, val, preprocess, config.input)
    labelled = _labelled(model, tested, labels)  # wrong labels are reported before the work
    metric = make_metric(config.metric, config.metric_option, tested, model, targets, labels)
    runs = [(IMAGES, n) for n in sizes if n <= available]
    runs += [(source, n) for source in DRAWN for n in sizes]
    begin = Stages(progress, [Planned(RUNNING_FLOAT, 1), Planned(QUANTIZING, 2 * len(runs))])
    begin(RUNNING_FLOAT, 1)
    points = []
    with on_device(config.device), scratch_folder() as folder:
        reference = Recorded(
            model,
            tested,
            folder,
            labels_of=(lambda n: labels_for(tested, labels, n)) if labelled else None,
            threads=config.threads,
            metric=metric,
        )
        right = None if reference.truth is None else reference.hits()
        float_top1 = None if right is None else 100 * float(right.mean())
        tell = begin(QUANTIZING, len(runs))
        known = float_top1 if metric is None else None
        for source, n in runs:
            images = source if source in DRAWN else calib
            file = _quantized(model, config, n, images, folder / f"{source}_{n}")
            points.append(measure_point(source, n, reference.measure(file)[0], known))
            tell(1)
    begin.done()
    return _curve(model.name, config, reference, float_top1, points, _left_out(sizes, available))


def _curve(
    model: str,
    config: QuantizeConfig,
    reference: Recorded,
    float_top1: float | None,
    points: Sequence[Point],
    notes: tuple[str, ...],
) -> Curve:
    """The points under the names of what they are of."""
    metric = reference.metric
    return Curve(
        model=model,
        quantizer=config.quantizer,
        bits=config.bits,
        method=config.effective_method,
        count=reference.count,
        float_top1=float_top1,
        points=tuple(points),
        notes=notes,
        metric=None if metric is None else metric.figure,
        unit="" if metric is None else metric.unit,
        float_score=reference.float_score,
    )


def _left_out(sizes: Sequence[int], available: int) -> tuple[str, ...]:
    """A note on the sizes beyond the number of calibration images, where there are any."""
    missing = ", ".join(str(n) for n in sizes if n > available)
    return (f"Left out {missing} images: there are {available} to calibrate with.",) * bool(missing)


def _quantized(
    model: Path, config: QuantizeConfig, count: int, calib: str | Path, output: Path
) -> Path:
    """The file quantized with so many images, without a report."""
    from ptq_onnx.pipeline import quantize as pipeline

    config = replace(
        config, images=count, report=False, check_preprocess=False, metric=None, metric_option=()
    )
    return pipeline.quantize(model, config=config, output=output, calib=calib).output / QUANTIZED


def measure_point(source: str, images: int, found: Closeness, float_top1: float | None) -> Point:
    """Top-1, SQNR of the worst output, and agreement of a file."""
    bounded = abs(found.sqnr_db) < MOST_DB
    return Point(
        source=source,
        images=images,
        sqnr_db=found.sqnr_db if bounded else math.copysign(math.inf, found.sqnr_db),
        agreement=found.agreement,
        top1=None if float_top1 is None or found.drop is None else float_top1 - found.drop,
        score=found.score,
    )


def draw_curve(curve: Curve) -> Figure:
    """A panel for each metric: over the number of images, a line for each source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top1 = curve.float_top1 is not None and curve.metric is None
    first = ["score"] if curve.metric is not None else ["top1"] if top1 else []
    metrics = [*first, "sqnr_db"]
    figure = Figure(figsize=(1 + 4.5 * len(metrics), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{printable(curve.model)}: {curve.quantizer} {curve.bits}, {curve.method},"
        f" on {curve.count} validation images",
        fontsize=10,
        parse_math=False,
    )
    sizes = sorted({p.images for p in curve.points})
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        for source, (name, color, style, marker) in LINES.items():
            line = curve.line(source, metric)
            if not line:
                continue
            axes.plot(
                list(line), list(line.values()), style, color=color, marker=marker, label=name
            )
        if metric == "top1" and curve.float_top1 is not None:
            axes.axhline(curve.float_top1, color="#8a8a8a", linewidth=1, label="float")
            low, high = axes.get_ylim()
            if high - low < LEAST_SPAN:  # a few images more or less are no finding
                middle = min((low + high) / 2, 101 - LEAST_SPAN / 2)
                axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)
        if metric == "score" and curve.float_score is not None:
            axes.axhline(curve.float_score, color="#8a8a8a", linewidth=1, label="float")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("Calibration images")
        named = f"{curve.metric} in %" if curve.unit == "%" else str(curve.metric)
        axes.set_ylabel(LABELS.get(metric, named))
        axes.grid(True, color="#8a8a8a", alpha=0.3, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(frameon=False)
    return figure


def write_curve(curve: Curve, output: Path) -> tuple[Path, Path]:
    """``calibration_curve.png`` and ``.json`` in ``output``, both or neither."""
    from ptq_onnx.files.publishing import added_to
    from ptq_onnx.files.text_file import write_text
    from ptq_onnx.report.plots import save_png

    picture, data = "calibration_curve.png", "calibration_curve.json"
    with added_to(output) as work:
        save_png(draw_curve(curve), work / picture, dpi=120)
        write_text(work / data, json.dumps(curve.to_json(), indent=1, allow_nan=False) + "\n")
    return output / picture, output / data


def _checked(sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--sizes: numbers of images must be at least 1, got {list(sizes)}.")
    return tuple(sorted(set(sizes)))


def _labelled(model: Path, source: ImageSource, labels: str | Path | None) -> bool:
    """Whether there are labels, in the file or as class folders, for a model that has classes.
    Raises ImageError, and ModelError for a file that is of no use."""
    from ptq_onnx.evaluation.evaluate import no_classes
    from ptq_onnx.evaluation.network import Network
    from ptq_onnx.images.labels import labels_for
    from ptq_onnx.pipeline.calibration_images import has_class_folders

    if labels is None and not has_class_folders(source):
        return False
    labels_for(source, labels)
    network = Network(model, 1)
    if labels is not None and not network.class_outputs:
        raise ModelError(no_classes(network))
    return bool(network.class_outputs)
