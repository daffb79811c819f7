"""The command ``ptq-onnx``: quantize, evaluate, export, check.

Heavy modules are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ptq_onnx.cli import analyse as cli_analyse
from ptq_onnx.cli import compare as cli_compare
from ptq_onnx.cli import evaluate as cli_evaluate
from ptq_onnx.cli import help as cli_help
from ptq_onnx.cli import options as o
from ptq_onnx.cli.benchmark import benchmark
from ptq_onnx.cli.check import check
from ptq_onnx.cli.console import (
    INTERRUPTED,
    fail,
    one_line_errors,
    progress_bars,
    show,
    stay_done,
)
from ptq_onnx.cli.curve import calibration_curve
from ptq_onnx.cli.given import settings
from ptq_onnx.cli.inspect import inspect
from ptq_onnx.cli.sweep import sweep
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.files.output_paths import OUTPUT, Output
from ptq_onnx.pipeline.model_path import find_model
from ptq_onnx.runtime.garbage import search_seldom
from ptq_onnx.version import __version__

if TYPE_CHECKING:
    pass

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
    targets: o.Targets = None,
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


app.command(cls=cli_help.Command, short_help="Measure the accuracy of a model on images.")(
    cli_evaluate.evaluate
)


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
    search_seldom()
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


if __name__ == "__main__":
    main()
