"""What calibration data is worth: quantized with few and many images, and with noise."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.image_source import NOISE, ImageSource
from ptq_onnx.preprocess import FloatArray
from ptq_onnx.progress import Planned, Progress, Stages
from ptq_onnx.stages import RUNNING_FLOAT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1, 4, 16, 64, 256)
QUANTIZING = "Quantizing and measuring"
IMAGES = "images"
"""The source that is no noise."""
LEAST_SPAN = 10
"""Points of accuracy that the axis shows at least."""
LABELS = {"top1": "Top-1 accuracy in %", "sqnr_db": "SQNR of the logits in dB"}
LINES = {IMAGES: ("#1f77b4", "-", "o"), NOISE: ("#c98a00", "--", "s")}
"""Colour, line style and marker by source."""


@dataclass(frozen=True)
class Point:
    """A model calibrated with ``images`` of ``source``; ``top1`` in % where there are labels."""

    source: str
    images: int
    sqnr_db: float
    agreement: float
    top1: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points by source and number of images, measured on ``count`` images held apart."""

    model: str
    quantizer: str
    bits: str
    method: str
    count: int
    float_top1: float | None
    points: tuple[Point, ...]
    notes: tuple[str, ...]

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
    sizes: Sequence[int] = SIZES,
    progress: Progress | None = None,
) -> Curve:
    """Quantize ``model`` once for each of ``sizes``, with images and with noise.

    ``val``: the images to measure on; with ``labels``, or class folders, top-1 too. A size
    beyond the number of calibration images is left out. Raises PtqError.
    """
    from ptq_onnx import pipeline
    from ptq_onnx.evaluation import logits, since
    from ptq_onnx.images import open_images

    sizes = _checked(sizes)
    if config.auto:
        raise ConfigError("auto would decide anew for every size; use it with quantize.")
    if calib == NOISE:
        raise ConfigError("--calib noise: name real images; noise is drawn beside them anyway.")
    preprocess = pipeline.resolve_preprocess(model, config)
    available = len(open_images(calib or pipeline.EMBEDDED, preprocess))
    tested = open_images(val, preprocess)
    _truth(tested, labels)  # wrong labels are told before the work, not after
    usable = [n for n in sizes if n <= available]
    notes = []
    if calib is None:
        notes.append("No --calib: the real images are the embedded digits.")
    if len(usable) < len(sizes):
        missing = ", ".join(str(n) for n in sizes if n > available)
        notes.append(f"Left out {missing} images: there are {available} to calibrate with.")
    runs = [(IMAGES, n) for n in usable] + [(NOISE, n) for n in sizes]
    begin = Stages(progress, [Planned(RUNNING_FLOAT, 1), Planned(QUANTIZING, 2 * len(runs))])
    reference = logits(
        model,
        tested,
        batch_size=config.batch,
        threads=config.threads,
        progress=since(begin(RUNNING_FLOAT, len(tested))),
    )
    tell = begin(QUANTIZING, len(runs))
    truth = _truth(tested, labels, reference.shape[1])  # by now, unreadable images are out
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for source, n in runs:
            result = pipeline.quantize(
                model,
                config=replace(config, images=n, report=False, check_preprocess=False),
                output=Path(folder) / f"{source}_{n}",
                calib=NOISE if source == NOISE else calib,
            )
            file = result.output / "quantized.onnx"
            found = logits(file, tested, batch_size=config.batch, threads=config.threads)
            points.append(measure_point(source, n, found, reference, truth))
            tell(1)
    begin.done()
    return Curve(
        model=model.name,
        quantizer=config.quantizer,
        bits=config.bits,
        method=config.effective_method,
        count=len(reference),
        float_top1=None if truth is None else _top1(reference, truth),
        points=tuple(points),
        notes=tuple(notes),
    )


def measure_point(
    source: str,
    images: int,
    logits: FloatArray,
    reference: FloatArray,
    truth: NDArray[np.int64] | None,
) -> Point:
    """Top-1, SQNR = 10·log10(Σ fp² / Σ (fp − q)²) and agreement of logits [N, classes]."""
    fp = reference.astype(np.float64)
    signal, noise = float(np.square(fp).sum()), float(np.square(fp - logits).sum())
    return Point(
        source=source,
        images=images,
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise),
        agreement=100 * float((logits.argmax(axis=1) == fp.argmax(axis=1)).mean()),
        top1=None if truth is None else _top1(logits, truth),
    )


def draw_curve(curve: Curve) -> Figure:
    """A panel for each metric: over the number of images, a line for each source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = ["sqnr_db"] if curve.float_top1 is None else ["top1", "sqnr_db"]
    figure = Figure(figsize=(1 + 4.5 * len(metrics), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{curve.model}: {curve.quantizer} {curve.bits}, {curve.method},"
        f" on {curve.count} validation images",
        fontsize=10,
    )
    sizes = sorted({p.images for p in curve.points})
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        for source, (color, style, marker) in LINES.items():
            line = curve.line(source, metric)
            name = "real images" if source == IMAGES else "Gaussian noise"
            axes.plot(
                list(line), list(line.values()), style, color=color, marker=marker, label=name
            )
        if metric == "top1" and curve.float_top1 is not None:
            axes.axhline(curve.float_top1, color="#8a8a8a", linewidth=1, label="float")
            low, high = axes.get_ylim()
            if high - low < LEAST_SPAN:  # a few images more or less are no finding
                middle = min((low + high) / 2, 101 - LEAST_SPAN / 2)
                axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("Calibration images")
        axes.set_ylabel(LABELS[metric])
        axes.grid(True, color="#8a8a8a", alpha=0.3, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(frameon=False)
    return figure


def write_curve(curve: Curve, output: Path) -> tuple[Path, Path]:
    """``calibration_curve.png`` and ``.json`` in ``output``, each all at once or not at all."""
    from ptq_onnx.analysis.plots import save_png
    from ptq_onnx.text_file import write_text

    output.mkdir(parents=True, exist_ok=True)
    picture, data = output / "calibration_curve.png", output / "calibration_curve.json"
    save_png(draw_curve(curve), picture, dpi=120)
    write_text(data, json.dumps(curve.to_json(), indent=1, allow_nan=False) + "\n")
    return picture, data


def _checked(sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--sizes: numbers of images must be at least 1, got {list(sizes)}.")
    return tuple(sorted(set(sizes)))


def _truth(
    source: ImageSource, labels: str | Path | None, classes: int | None = None
) -> NDArray[np.int64] | None:
    """Labels from the file or the class folders; None where there are neither."""
    from ptq_onnx.labels import labels_for
    from ptq_onnx.pipeline import has_class_folders

    if labels is None and not has_class_folders(source):
        return None
    return labels_for(source, labels, classes)


def _top1(logits: FloatArray, truth: NDArray[np.int64]) -> float:
    return 100 * float((logits.argmax(axis=1) == truth).mean())
