"""The command ``ptq-onnx``: quantize, evaluate, export. Every option of QuantizeConfig is here.

Heavy modules are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ptq_onnx import __version__
from ptq_onnx.config import (
    METHOD_NAMES,
    OPSETS,
    QUANTIZER_NAMES,
    TARGETS,
    QuantizeConfig,
    read_yaml,
)
from ptq_onnx.console import (
    decibels,
    fail,
    one_line_errors,
    percent,
    progress_bars,
    show,
    simple_table,
    stdout,
)
from ptq_onnx.errors import ConfigError
from ptq_onnx.model_path import find_model

DEFAULT = QuantizeConfig()
PATHS = ("calib", "val", "labels", "scales", "output")
"""Options of the command that decide no numbers; a config file may hold them too."""
FIELDS = tuple(field.name for field in fields(QuantizeConfig))

app = typer.Typer(
    name="ptq-onnx",
    help="Post-training quantization of Vision Transformers, from ONNX to ONNX.",
    add_completion=False,
    rich_markup_mode=None,
)


def _option(*names: str, text: str, default: object, metavar: str | None = None) -> Any:
    """An option that is None unless given, whose help names what None means."""
    return typer.Option(*names, help=f"{text} Default: {default}.", metavar=metavar)


def _switch(name: str, text: str, default: bool) -> Any:
    return _option(f"--{name}/--no-{name}", text=text, default="on" if default else "off")


Config = Annotated[
    str | None,
    _option("--config", text="YAML file of options (name: value); the command line wins.",
            default="none", metavar="FILE"),
]  # fmt: skip
PreprocessName = Annotated[
    str | None,
    _option("--preprocess", text="imagenet or inception (0.5 everywhere).",
            default="the model's metadata, else imagenet", metavar="NAME"),
]  # fmt: skip
Mean = Annotated[
    str | None,
    _option("--mean", text="Per channel, 0 to 1: 0.485,0.456,0.406.",
            default="that of the preprocessing", metavar="R,G,B"),
]  # fmt: skip
Std = Annotated[
    str | None,
    _option("--std", text="Per channel, as --mean.",
            default="that of the preprocessing", metavar="R,G,B"),
]  # fmt: skip
Size = Annotated[
    str | None,
    _option("--size", text="Input pixels, N or HxW.",
            default="the model's input, else 224", metavar="N|HxW"),
]  # fmt: skip
CropPct = Annotated[
    float | None,
    _option("--crop-pct", text="Part of the resized picture that the crop keeps.",
            default="the model's metadata, else 0.875", metavar="0..1"),
]  # fmt: skip
Interpolation = Annotated[
    str | None,
    _option("--interpolation", text="bicubic, bilinear, nearest or lanczos.",
            default="the model's metadata, else bicubic", metavar="NAME"),
]  # fmt: skip
Threads = Annotated[
    int | None,
    _option("--threads", text="Threads of ONNX Runtime and torch; 0 leaves the choice to them.",
            default=DEFAULT.threads, metavar="N"),
]  # fmt: skip
Batch = Annotated[
    int | None,
    _option("--batch", text="Images per batch.", default=DEFAULT.batch, metavar="N"),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL.onnx", help="The float model.")],
    calib: Annotated[
        str | None,
        _option(
            "--calib",
            text="Calibration images: a folder, .npy or .npz.",
            default="the embedded images of digits",
            metavar="DIR",
        ),
    ] = None,
    val: Annotated[
        str | None,
        _option("--val", text="Images to measure the result on.", default="none", metavar="DIR"),
    ] = None,
    labels: Annotated[
        str | None,
        _option(
            "--labels",
            text="Lines 'name label' for --val.",
            default="the class folders of --val, if it has any",
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        str | None,
        _option("--output", text="Folder of the results.", default="output", metavar="DIR"),
    ] = None,
    config: Config = None,
    scales: Annotated[
        str | None,
        _option(
            "--scales",
            text="report.json of an earlier run; its scales are used again.",
            default="none: calibrate",
            metavar="FILE",
        ),
    ] = None,
    quantizer: Annotated[
        str | None,
        _option(
            "--quantizer",
            text=f"One of {', '.join(QUANTIZER_NAMES)}.",
            default=DEFAULT.quantizer,
            metavar="NAME",
        ),
    ] = None,
    bits: Annotated[
        str | None,
        _option(
            "--bits",
            text="Bits of weights/activations/attention, 2 to 8 each.",
            default=DEFAULT.bits,
            metavar="W/A/ATTN",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            "--method",
            text=f"Calibration: one of {', '.join(METHOD_NAMES)}.",
            default="percentile for vanilla, robust for the others",
            metavar="NAME",
        ),
    ] = None,
    images: Annotated[
        int | None,
        _option("--images", text="Calibration images to use.", default=DEFAULT.images, metavar="N"),
    ] = None,
    batch: Batch = None,
    preprocess: PreprocessName = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    keep_float: Annotated[
        list[str] | None,
        _option(
            "--keep-float",
            text="Leave a role in float, as in fc2@5,6; repeatable.",
            default="none",
            metavar="ROLE[@BLOCKS]",
        ),
    ] = None,
    per_channel: Annotated[
        list[str] | None,
        _option(
            "--per-channel",
            text="A scale per channel for a role, as in fc2@0-3; 'all'; or 'auto': fc2 of"
            " the blocks with the widest channel ranges; repeatable.",
            default="what the quantizer does",
            metavar="ROLE[@BLOCKS]",
        ),
    ] = None,
    ptf: Annotated[
        bool | None, _switch("ptf", "fqvit: power-of-two factors per channel.", DEFAULT.ptf)
    ] = None,
    ptf_k: Annotated[
        int | None,
        _option(
            "--ptf-k",
            text="fqvit: largest exponent of a factor, 0 to 12.",
            default="as large as the channels need",
            metavar="K",
        ),
    ] = None,
    lis: Annotated[
        bool | None, _switch("lis", "fqvit: log2 codes for attention maps.", DEFAULT.lis)
    ] = None,
    arithmetic: Annotated[
        str | None,
        _option(
            "--arithmetic",
            text="fqvit: float or integer, inside LayerNorm and softmax of the simulation.",
            default=DEFAULT.arithmetic,
            metavar="NAME",
        ),
    ] = None,
    target: Annotated[
        str | None,
        _option(
            "--target",
            text=f"What the file is for: {', '.join(TARGETS)}.",
            default=DEFAULT.target,
            metavar="NAME",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        _option(
            "--opset",
            text=f"ONNX opset of the file, {OPSETS[0]} to {OPSETS[-1]}.",
            default=DEFAULT.opset,
            metavar="N",
        ),
    ] = None,
    report: Annotated[
        bool | None,
        _switch("report", "Analyse every op and write report.html.", DEFAULT.report),
    ] = None,
    pictures: Annotated[
        bool | None,
        _switch("pictures", "Draw attention maps (needs the report).", DEFAULT.pictures),
    ] = None,
    analysis_images: Annotated[
        int | None,
        _option(
            "--analysis-images",
            text="Images, held apart, that the analysis runs on.",
            default=DEFAULT.analysis_images,
            metavar="N",
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Quantize a model and write it to a folder, with its report."""
    options, paths = _settings(config, locals())
    path = find_model(model)
    from ptq_onnx import pipeline

    with progress_bars() as progress:
        result = pipeline.quantize(path, config=options, progress=progress, **paths)
    show(result)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL.onnx", help="Any classifier.")],
    val: Annotated[
        str | None,
        _option(
            "--val", text="Images: a folder, .npy or .npz.", default="none, required", metavar="DIR"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        _option(
            "--labels",
            text="Lines 'name label'.",
            default="the class folders of --val",
            metavar="FILE",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        _option(
            "--reference",
            text="A float model to compare the logits with.",
            default="none",
            metavar="FLOAT.onnx",
        ),
    ] = None,
    as_json: Annotated[
        bool, _option("--json", text="One line of JSON on stdout.", default="a table")
    ] = False,
    config: Config = None,
    preprocess: PreprocessName = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    batch: Batch = None,
    threads: Threads = None,
) -> None:
    """Measure top-1 and top-5 of a model in ONNX Runtime."""
    options, paths = _settings(config, locals())
    path, other = find_model(model), None if reference is None else find_model(reference)
    if "val" not in paths:
        raise ConfigError("evaluate needs images: --val DIR.")
    from ptq_onnx import evaluation, pipeline
    from ptq_onnx.images import open_images

    source = open_images(paths["val"], pipeline.resolve_preprocess(path, options))
    truth = _labels(source, paths.get("labels"), needed=other is None)
    with progress_bars() as progress:
        found = evaluation.evaluate(
            path,
            source,
            truth,
            batch_size=options.batch,
            threads=options.threads,
            reference=other,
            progress=None if progress is None else _totals(progress("Evaluating", len(source))),
        )
    values = {
        "count": found.count,
        "top1": found.top1,
        "top5": found.top5,
        "sqnr_db": found.sqnr_db,
        "agreement": found.agreement,
        "skipped": len(source.skipped),
    }
    if as_json:
        print(json.dumps({"model": str(path), **{k: _finite(v) for k, v in values.items()}}))
        return
    rows = [("images", str(found.count)), ("unreadable, skipped", str(len(source.skipped)))]
    if truth is not None:
        rows += [("top-1", percent(found.top1)), ("top-5", percent(found.top5))]
    if other is not None:
        rows += [
            ("SQNR against the reference", decibels(found.sqnr_db)),
            ("same top class as the reference", percent(found.agreement)),
        ]
    stdout().print(simple_table((path.name, ""), rows))


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model name of timm.")],
    output: Annotated[
        str | None,
        _option("--output", text="The file to write.", default="NAME.onnx", metavar="FILE"),
    ] = None,
    pretrained: Annotated[
        bool, _switch("pretrained", "Weights from the hub; else random ones.", True)
    ] = True,
    opset: Annotated[
        int, _option("--opset", text="ONNX opset of the file.", default=18, metavar="N")
    ] = 18,
    size: Annotated[
        int | None,
        _option("--size", text="Input pixels.", default="the model's own", metavar="N"),
    ] = None,
) -> None:
    """Write a timm model as ONNX, with its preprocessing inside."""
    from ptq_onnx.timm_export import export_timm

    target = Path(output or f"{name.rpartition('/')[2]}.onnx")
    print(export_timm(name, target, pretrained=pretrained, opset=opset, image_size=size))


def main() -> NoReturn:
    """Run the command line. Bad input: one line on stderr and exit code 2."""
    with one_line_errors():
        try:
            code = app(prog_name="ptq-onnx", standalone_mode=False)
        except typer.Abort:
            code = 130
        except Exception as error:
            # A wrong option; its class is private to typer, its exit code and message are not
            if not (hasattr(error, "exit_code") and hasattr(error, "format_message")):
                raise
            fail(f"{str(error.format_message()).rstrip('.')}. See ptq-onnx --help.")
        sys.exit(code if isinstance(code, int) else 0)
    raise AssertionError("one_line_errors re-raises")


def _settings(config: str | None, given: dict[str, Any]) -> tuple[QuantizeConfig, dict[str, Any]]:
    """The config and the path options: the YAML file's, overruled by those ``given``."""
    values = {} if config is None else read_yaml(config)
    values.update((k, v) for k, v in given.items() if k in (*FIELDS, *PATHS) and v is not None)
    paths = {k: str(v) for k in PATHS if (v := values.pop(k, None)) is not None}
    for name, parse in PARSERS.items():
        if isinstance(values.get(name), str | int | float):
            values[name] = parse(name, str(values[name]))
    return QuantizeConfig.from_mapping(values, str(config or "options")), paths


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5``. Raises ConfigError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} {text}: expected numbers, as in 0.5,0.5,0.5.") from None


def _sides(name: str, text: str) -> tuple[int, int]:
    """``224`` or ``224x192``, height first. Raises ConfigError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"--{name} {text}: expected pixels, as in 224 or 224x192.")
    return int(sides[0]), int(sides[-1])


def _one(_: str, text: str) -> tuple[str, ...]:
    return (text,)


PARSERS: dict[str, Callable[[str, str], tuple[Any, ...]]] = {
    "mean": _numbers,
    "std": _numbers,
    "size": _sides,
    "keep_float": _one,
    "per_channel": _one,
}
"""Options whose text is not their value yet."""


def _labels(source: Any, labels: str | None, needed: bool) -> Any:
    """Labels of the images; None where there are none and a reference will do."""
    from ptq_onnx.errors import ImageError
    from ptq_onnx.labels import labels_for

    try:
        return labels_for(source, labels)
    except ImageError:
        if labels is not None or needed:
            raise
        return None


def _totals(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """From 'done so far, of all' to 'done since'."""
    before = 0

    def tell(done: int, _: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return tell


def _finite(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if value is None or math.isfinite(value) else None


if __name__ == "__main__":
    main()
