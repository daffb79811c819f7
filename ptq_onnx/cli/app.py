"""The command ``ptq-onnx``: quantize, evaluate, export, check.

Heavy modules are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ptq_onnx.cli import analyse as cli_analyse
from ptq_onnx.cli import compare as cli_compare
from ptq_onnx.cli import help as cli_help
from ptq_onnx.cli import options as o
from ptq_onnx.cli.benchmark import benchmark
from ptq_onnx.cli.check import check
from ptq_onnx.cli.console import (
    INTERRUPTED,
    decibels,
    fail,
    one_line_errors,
    outputs_table,
    percent,
    progress_bars,
    show,
    simple_table,
    stay_done,
)
from ptq_onnx.cli.curve import calibration_curve
from ptq_onnx.cli.given import settings
from ptq_onnx.cli.inspect import inspect
from ptq_onnx.cli.npu import WORDS, npu_of
from ptq_onnx.cli.sweep import sweep
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.outputs import decibels as in_json
from ptq_onnx.files.output_paths import OUTPUT, Output
from ptq_onnx.pipeline.model_path import find_model
from ptq_onnx.version import __version__

if TYPE_CHECKING:
    from ptq_onnx.evaluation.evaluate import Evaluation
    from ptq_onnx.images.source import ImageSource

app = typer.Typer(
    name="ptq-onnx",
    help="Post-training quantization of Vision Transformers, from ONNX to ONNX.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": cli_help.NAMES},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=cli_help.Command, short_help="Write a quantized model and its report.")
@o.takes()
def quantize(
    model: o.Model,
    calib: o.Calib = None,
    val: o.Val = None,
    labels: o.Labels = None,
    output: o.Output = None,
    config: o.Config = None,
    scales: o.Scales = None,
    **given: Any,
) -> None:
    """Quantize a model and write it to a folder, with its report."""
    options, paths = settings(config, locals() | given)
    Output.at(paths.get("output", OUTPUT)).keep(config=config)
    path = find_model(model)
    with progress_bars() as progress:
        from ptq_onnx.pipeline import quantize as pipeline  # seconds

        result = pipeline.quantize(path, config=options, progress=progress, **paths)
    show(result)


app.command(cls=cli_help.Command, short_help="Write only the report: what each module costs.")(
    cli_analyse.analyse
)
app.command(cls=cli_help.Command, short_help="Put quantized files side by side.")(
    cli_compare.compare
)


@app.command(cls=cli_help.Command, short_help="Measure the accuracy of a model on images.")
@o.takes(*o.PICTURES, "batch", "threads", "workers")
def evaluate(
    model: o.Model,
    val: o.Measured = None,
    labels: o.Labels = None,
    reference: o.Reference = None,
    runtime: o.Runtime = "onnxruntime",
    soc: o.Soc = None,
    htp_arch: o.HtpArch = None,
    context: o.Context = None,
    as_json: o.Json = False,
    config: o.Config = None,
    **given: Any,
) -> None:
    """Measure top-1 and top-5 of a model in ONNX Runtime, or on Qualcomm's NPU."""
    options, paths = settings(config, locals() | given)
    path = find_model(model, written=True)
    npu = npu_of(runtime, soc, htp_arch, context)
    other = None if reference is None else find_model(reference)
    if "val" not in paths:
        raise ConfigError("evaluate needs images: --val DIR.")
    with progress_bars() as progress:
        from ptq_onnx.calibration.class_output import features_of
        from ptq_onnx.evaluation import evaluate as evaluation
        from ptq_onnx.evaluation import network
        from ptq_onnx.images.opening import open_images
        from ptq_onnx.pipeline.preprocessing import resolve_preprocess

        source = open_images(paths["val"], resolve_preprocess(path, options))
        classes = bool(network.Network(path, 1).class_outputs)
        if not classes and other is None:
            raise ConfigError(
                f"{path} has no output [batch, classes], so that only closeness to the float model"
                " can be measured: name that with --reference FLOAT.onnx."
            )
        truth = None
        if classes or "labels" in paths:  # the second is refused, before any image is read
            truth = _truth(source, paths.get("labels"), needed=other is None)
        features = []
        if other is not None and classes and truth is None:
            features = features_of(other, source.preprocess.size)
        found = evaluation.evaluate(
            path if npu is None else npu.open(path, options.threads),
            source,
            truth,
            batch_size=options.batch,
            threads=options.threads,
            workers=options.workers,
            reference=other,
            features=features,
            progress=None
            if progress is None
            else evaluation.since(progress("Measuring the model", len(source))),
            names=(f"Model '{path}'", None),
        )
    if npu is not None:
        print(WORDS, file=sys.stderr)
    if as_json:
        _print_json(path, source, found)
    else:
        _print_table(path, source, found, compared=other is not None)


@app.command(cls=cli_help.Command, short_help="Write a timm model as ONNX.")
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model name of timm.")],
    output: Annotated[
        str | None, o.option("--output -o", "FILE", "NAME.onnx", "The file to write.")
    ] = None,
    pretrained: Annotated[
        bool, o.switch("pretrained", True, "Weights from the hub; off: random ones.")
    ] = True,
    opset: Annotated[int, o.option("--opset", "N", 18, "ONNX opset of the file.")] = 18,
    size: Annotated[
        int | None, o.option("--size", "N", "the model's own", "Pixels of the square input.")
    ] = None,
) -> None:
    """Write a timm model as ONNX, with its preprocessing inside."""
    from ptq_onnx.pipeline.timm_export import export_timm

    path = Path(output or f"{name.rpartition('/')[2]}.onnx")
    written = export_timm(name, path, pretrained=pretrained, opset=opset, image_size=size)
    stdout().say(written)


app.command(cls=cli_help.Command, short_help="Will a runtime compute a file in int8?")(check)
app.command(cls=cli_help.Command, short_help="Time files side by side.")(benchmark)
app.command(cls=cli_help.Command, short_help="Draw accuracy over the number of images.")(
    calibration_curve
)
app.command(cls=cli_help.Command, short_help="Show what is in a model.")(inspect)
app.command(cls=cli_help.Command, short_help="Quantize a matrix of models and recipes.")(sweep)


def main() -> NoReturn:
    """Run the command line. Bad input: one line on stderr and exit code 2."""
    with one_line_errors():
        try:
            code = app(prog_name="ptq-onnx", standalone_mode=False)
        except Exception as error:
            # A wrong option: typer keeps the class to itself, not its message
            if not hasattr(error, "format_message"):
                raise
            fail(cli_help.told(error))
        if code == INTERRUPTED:  # typer's word for it
            raise KeyboardInterrupt
    stay_done()
    sys.exit(code if isinstance(code, int) else 0)


def _print_json(path: Path, source: ImageSource, found: Evaluation) -> None:
    numbers = {
        "count": found.count,
        "skipped": len(source.skipped),
        "top1": found.top1,
        "top5": found.top5,
        "sqnr_db": in_json(found.sqnr_db),
        "agreement": found.agreement,
    }
    text = {"model": str(path), **{k: _finite(v) for k, v in numbers.items()}}
    print(json.dumps({**text, "outputs": [asdict(one) for one in found.outputs]}))


def _print_table(path: Path, source: ImageSource, found: Evaluation, *, compared: bool) -> None:
    """What was measured, row by row; ``compared``: with a reference."""
    rows = [
        ("preprocessing", source.preprocess.described),
        ("images", str(found.count)),
        ("unreadable, skipped", str(len(source.skipped))),
    ]
    several = len(found.outputs) > 1
    for one in found.outputs:
        if one.top1 is not None:
            where = f" of '{one.name}'" if several else ""
            rows += [(f"top-1{where}", percent(one.top1)), (f"top-5{where}", percent(one.top5))]
    if compared:
        worst = " of the worst output" if several else ""
        rows.append((f"SQNR against the reference{worst}", decibels(found.sqnr_db)))
        if found.agreement is not None:
            where = f" in '{found.main}'" if several else ""
            rows.append((f"same top class as the reference{where}", percent(found.agreement)))
    stdout().print(simple_table((path.name, ""), rows))
    if several and compared:
        stdout().print(outputs_table([asdict(one) for one in found.outputs]))
    for note in found.notes:
        stdout().say(f"note: {note}")


def _truth(source: Any, labels: str | None, needed: bool) -> Any:
    """Labels of the images; None where there are none and a reference will do."""
    from ptq_onnx.images.labels import labels_for

    try:
        return labels_for(source, labels)
    except ImageError:
        if labels is not None or needed:
            raise
        return None


def _finite(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if value is None or math.isfinite(value) else None


if __name__ == "__main__":
    main()
