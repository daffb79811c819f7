"""The command ``ptq-onnx analyse``: where a quantized model breaks, and why."""

from __future__ import annotations

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import progress_bars, show
from ptq_onnx.cli.given import settings
from ptq_onnx.files.output_paths import ANALYSIS, Output
from ptq_onnx.pipeline.model_path import find_model


def analyse(
    model: o.Model,
    calib: o.Calib = None,
    val: o.Val = None,
    labels: o.Labels = None,
    output: o.AnalysisFolder = None,
    config: o.Config = None,
    quantizer: o.Quantizer = None,
    bits: o.Bits = None,
    precision: o.Precision = None,
    weights: o.Weights = None,
    method: o.Method = None,
    images: o.Images = None,
    batch: o.Batch = None,
    scales: o.Scales = None,
    preprocess: o.PreprocessName = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    crop_pct: o.CropPct = None,
    interpolation: o.Interpolation = None,
    check_preprocess: o.CheckPreprocess = None,
    keep_float: o.KeepFloat = None,
    more_bits: o.MoreBits = None,
    per_channel: o.PerChannel = None,
    ptf: o.Ptf = None,
    ptf_k: o.PtfK = None,
    lis: o.Lis = None,
    equalize: o.Equalize = None,
    bias_correction: o.BiasCorrection = None,
    rounding: o.Rounding = None,
    centre_values: o.CentreValues = None,
    quantize_residual: o.QuantizeResidual = None,
    float16: o.Float16 = None,
    arithmetic: o.Arithmetic = None,
    multiplier_bits: o.MultiplierBits = None,
    gelu: o.Gelu = None,
    target: o.Target = None,
    opset: o.Opset = None,
    sensitivity: o.Sensitivity = None,
    pictures: o.Pictures = None,
    attention_blocks: o.AttentionBlocks = None,
    attention_heads: o.AttentionHeads = None,
    analysis_images: o.AnalysisImages = None,
    threads: o.Threads = None,
) -> None:
    """Quantize a model and write only the report: what every module costs, and why."""
    options, paths = settings(config, {"report": True, **locals()}, sensitivity=True)
    paths.setdefault("output", ANALYSIS)
    Output.of_reports(paths["output"]).keep(config=config)
    path = find_model(model)
    with progress_bars() as progress:
        from ptq_onnx.pipeline import quantize as pipeline  # seconds

        result = pipeline.quantize(
            path, config=options, progress=progress, keep_models=False, **paths
        )
    show(result)
