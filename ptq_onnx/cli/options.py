"""The options of the command line: their text, their defaults, and how they become a config.

An option that decides a number has the name of its field in QuantizeConfig.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from ptq_onnx.cli.help import REQUIRED
from ptq_onnx.config.names import (
    GELU_NAMES,
    MAX_DROP,
    METHOD_NAMES,
    MIN_SQNR,
    OPSETS,
    PRECISION_NAMES,
    QUANTIZER_NAMES,
    ROUNDING_NAMES,
    TARGETS,
)
from ptq_onnx.config.quantize_config import QuantizeConfig

DEFAULT = QuantizeConfig()
PATHS = ("calib", "val", "labels", "scales", "output")
"""Options that decide no numbers; a config file may hold them too."""
FIELDS = tuple(field.name for field in fields(QuantizeConfig))


def option(names: str, metavar: str | None, default: object, text: str) -> Any:
    """An option that is None unless given; its help says what None means.

    ``names``: one, or several with spaces between. ``default`` REQUIRED: not to be left out.
    """
    shown = f"[{default}]" if str(default).startswith(REQUIRED) else f"[default: {default}]"
    return typer.Option(*names.split(), metavar=metavar, help=f"{text} {shown}", show_default=False)


def switch(name: str, default: bool, text: str) -> Any:
    """``--name`` and ``--no-name``, None unless one of them is given."""
    return option(f"--{name}/--no-{name}", None, "on" if default else "off", text)


Model = Annotated[str, typer.Argument(metavar="MODEL.onnx", help="The ONNX file.")]
Config = Annotated[
    str | None,
    option(
        "--config", "FILE", "none", "YAML file of options (name: value); the command line wins."
    ),
]

# Files and folders
Calib = Annotated[
    str | None,
    option(
        "--calib",
        "DIR",
        "required; models/digits_vit.onnx alone has its own",
        "Calibration images: a folder, .npy or .npz; or noise: Gaussian ones.",
    ),
]
Val = Annotated[
    str | None, option("--val", "DIR", "none", "Images to measure on: a folder, .npy or .npz.")
]
Measured = Annotated[
    str | None, option("--val", "DIR", REQUIRED, "Images to measure on: a folder, .npy or .npz.")
]
Labels = Annotated[
    str | None,
    option("--labels", "FILE", "the class folders of --val", "Lines 'name label' for --val."),
]
Output = Annotated[
    str | None,
    option(
        "--output -o",
        "PATH",
        "output",
        "x.onnx: the file to write, its reports in the folder x beside it; any other name: a"
        " folder of everything.",
    ),
]
Folder = Annotated[str | None, option("--output -o", "DIR", "output", "Folder of the results.")]
AnalysisFolder = Annotated[
    str | None, option("--output -o", "DIR", "analysis", "Folder of the results.")
]
Scales = Annotated[
    str | None,
    option("--scales", "FILE", "none", "report.json of an earlier run, whose scales to re-use."),
]
Reference = Annotated[
    str | None,
    option("--reference", "FLOAT.onnx", "none", "A float model to compare the logits with."),
]
Json = Annotated[bool, option("--json", None, "a table", "One line of JSON on stdout.")]

# What numbers
Quantizer = Annotated[
    str | None,
    option(
        "--quantizer",
        "NAME",
        DEFAULT.quantizer,
        f"One of {', '.join(QUANTIZER_NAMES)}; the target integer takes fqvit by itself.",
    ),
]
Bits = Annotated[
    str | None,
    option("--bits", "W/A/ATTN", DEFAULT.bits, "Of weights/activations/attention, 2 to 8 each."),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        "NAME",
        DEFAULT.precision,
        f"One of {', '.join(PRECISION_NAMES)}; fp8 is E4M3, for the target tensorrt.",
    ),
]
Weights = Annotated[
    int | None,
    option(
        "--weights",
        "N",
        DEFAULT.weights,
        "4: int4 weights of linears in blocks, for onnxruntime; activations stay float.",
    ),
]
KeepFloat = Annotated[
    list[str] | None,
    option(
        "--keep-float",
        "ROLE[@BLOCKS]",
        "none",
        "Leave a role in float, as in fc2 or fc2@5,6; repeatable.",
    ),
]
MoreBits = Annotated[
    list[str] | None,
    option(
        "--more-bits",
        "ROLE[@BLOCKS]",
        "none",
        "8 bits for a role where --bits has fewer, as in fc2 or fc2@5,6; repeatable.",
    ),
]
Auto = Annotated[
    bool | None,
    switch(
        "auto",
        DEFAULT.auto,
        "Leave few, cheap ops in float, or at 8 bits, that keep the loss in bounds: none of them"
        " can be done without; another set may be smaller.",
    ),
]
MaxDrop = Annotated[
    float | None,
    option(
        "--max-drop",
        "POINTS",
        f"{MAX_DROP} where --val has labels",
        "auto: top-1 that may be lost on the images of --val.",
    ),
]
MinSqnr = Annotated[
    float | None,
    option(
        "--min-sqnr",
        "DB",
        f"{MIN_SQNR:g} without labels",
        "auto: SQNR that every output must have, on --val or on calibration images held apart.",
    ),
]
PerChannel = Annotated[
    list[str] | None,
    option(
        "--per-channel",
        "ROLE[@BLOCKS]",
        "what the quantizer does by itself",
        "A scale per channel for a role, as in fc2@0-3; 'all'; or 'auto': fc2 of the blocks"
        " with the widest channel ranges; repeatable.",
    ),
]
Ptf = Annotated[bool | None, switch("ptf", DEFAULT.ptf, "fqvit: power-of-two factors per channel.")]
PtfK = Annotated[
    int | None,
    option("--ptf-k", "K", "as large as the channels need", "fqvit: largest exponent, 0 to 12."),
]
Lis = Annotated[bool | None, switch("lis", DEFAULT.lis, "fqvit: log2 codes for attention maps.")]
Equalize = Annotated[
    bool | None,
    switch(
        "equalize",
        DEFAULT.equalize,
        "deploy: move shifts and factors per channel between ops, equal in float.",
    ),
]
BiasCorrection = Annotated[
    bool | None,
    switch(
        "bias-correction",
        DEFAULT.bias_correction,
        "deploy: take the mean error of quantized weights out of the biases.",
    ),
]
Rounding = Annotated[
    str | None,
    option(
        "--rounding",
        "NAME",
        DEFAULT.rounding,
        f"deploy: how weights are rounded, one of {', '.join(ROUNDING_NAMES)}.",
    ),
]
CentreValues = Annotated[
    bool | None,
    switch(
        "centre-values",
        DEFAULT.centre_values,
        "tensorrt: take the mean of the image out of v and add it to A·V: more accurate, but an Add"
        " stands in the fused attention.",
    ),
]
QuantizeResidual = Annotated[
    bool | None,
    switch(
        "quantize-residual",
        DEFAULT.quantize_residual,
        "tensorrt: Q/DQ on the skip input of residual adds, so that they fuse with the product.",
    ),
]
Float16 = Annotated[
    bool | None,
    switch("float16", DEFAULT.float16, "tensorrt: the float part of the file in 16 bits."),
]
Arithmetic = Annotated[
    str | None,
    option(
        "--arithmetic",
        "NAME",
        DEFAULT.arithmetic,
        "fqvit: float, or integer as --target integer computes, in the simulation.",
    ),
]
MultiplierBits = Annotated[
    int | None,
    option(
        "--multiplier-bits",
        "N",
        DEFAULT.multiplier_bits,
        "Integer arithmetic: width of the fixed-point multipliers, 4 to 31.",
    ),
]
Gelu = Annotated[
    str | None,
    option(
        "--gelu",
        "NAME",
        DEFAULT.gelu,
        f"Integer arithmetic: how GELU is computed, one of {', '.join(GELU_NAMES)}.",
    ),
]
Target = Annotated[
    str | None,
    option("--target", "NAME", DEFAULT.target, f"What the file is for: {', '.join(TARGETS)}."),
]
Opset = Annotated[
    int | None,
    option(
        "--opset",
        "N",
        DEFAULT.opset,
        f"ONNX opset, up to {OPSETS[-1]}; tensorrt and openvino take 20 by themselves.",
    ),
]

# Calibration
Method = Annotated[
    str | None,
    option(
        "--method",
        "NAME",
        "percentile for vanilla, robust for the others",
        f"One of {', '.join(METHOD_NAMES)}.",
    ),
]
Images = Annotated[
    int | None, option("--images", "N", DEFAULT.images, "Calibration images to use.")
]
Batch = Annotated[int | None, option("--batch", "N", DEFAULT.batch, "Images per batch.")]
Threads = Annotated[
    int | None,
    option("--threads", "N", DEFAULT.threads, "Threads to compute with; 0: the runtime decides."),
]

# From a picture to the model's input
PreprocessName = Annotated[
    str | None,
    option(
        "--preprocess",
        "NAME",
        "the model's metadata, else such a file beside it, else by its first ops, else imagenet",
        "imagenet, inception (0.5 everywhere), none (pixels as they are, 0 to 255), or a folder"
        " with Hugging Face's preprocessor_config.json.",
    ),
]
Mean = Annotated[
    str | None,
    option("--mean", "R,G,B", "that of the preprocessing", "0 to 1, as in 0.485,0.456,0.406."),
]
Std = Annotated[str | None, option("--std", "R,G,B", "that of the preprocessing", "As --mean.")]
Size = Annotated[
    str | None, option("--size", "N|HxW", "the model's input, else 224", "Pixels of the input.")
]
CropPct = Annotated[
    float | None,
    option(
        "--crop-pct",
        "0..1",
        "the model's metadata, else 0.875",
        "Part of the resized picture that the crop keeps.",
    ),
]
Interpolation = Annotated[
    str | None,
    option(
        "--interpolation",
        "NAME",
        "the model's metadata, else bicubic",
        "bicubic, bilinear, nearest or lanczos.",
    ),
]
CheckPreprocess = Annotated[
    bool | None,
    switch(
        "check-preprocess",
        DEFAULT.check_preprocess,
        "Warn where another normalisation makes the float model surer of its answers.",
    ),
]

# What is shown
Report = Annotated[
    bool | None, switch("report", DEFAULT.report, "Analyse every op and write report.html.")
]
Sensitivity = Annotated[
    bool | None,
    switch(
        "sensitivity",
        DEFAULT.sensitivity,
        "Switch every module by itself, to see what it costs; takes minutes; on for analyse.",
    ),
]
Pictures = Annotated[
    bool | None, switch("pictures", DEFAULT.pictures, "Draw attention maps into the report.")
]
AttentionBlocks = Annotated[
    list[int] | None,
    option("--attention-blocks", "BLOCK", "the last", "Block whose attention to draw; repeatable."),
]
AttentionHeads = Annotated[
    list[int] | None,
    option("--attention-heads", "HEAD", "all", "Head to draw by itself; repeatable."),
]
AnalysisImages = Annotated[
    int | None,
    option(
        "--analysis-images", "N", DEFAULT.analysis_images, "Images of the analysis, held apart."
    ),
]
