"""The command ``ptq-onnx analyse``: where a quantized model breaks, and why."""

from __future__ import annotations

from typing import Any

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import progress_bars, show
from ptq_onnx.cli.given import settings
from ptq_onnx.files.output_paths import ANALYSIS, Output
from ptq_onnx.pipeline.model_path import find_model


@o.takes(without=("auto", "max_drop", "min_sqnr", "report"))
def analyse(
    model: o.Model,
    calib: o.Calib = None,
    val: o.Val = None,
    labels: o.Labels = None,
    targets: o.Targets = None,
    output: o.AnalysisFolder = None,
    config: o.Config = None,
    scales: o.Scales = None,
    **given: Any,
) -> None:
    """Quantize a model and write only the report: what every module costs, and why."""
    options, paths = settings(config, {"report": True, **locals(), **given}, sensitivity=True)
    paths.setdefault("output", ANALYSIS)
    Output.of_reports(paths["output"]).keep(config=config)
    path = find_model(model)
    with progress_bars() as progress:
        from ptq_onnx.pipeline import quantize as pipeline  # seconds

        result = pipeline.quantize(
            path, config=options, progress=progress, keep_models=False, **paths
        )
    show(result)
