"""The options of the command line.

Those that decide a number are fields of the config, which carry all that is said about them; here
stand the files and folders, and how a field becomes an option of a command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ptq_onnx.cli.help import REQUIRED
from ptq_onnx.config.flags import Flag, flags
from ptq_onnx.config.quantize_config import QuantizeConfig

PATHS = ("calib", "val", "labels", "targets", "scales", "output")
"""Options that decide no numbers; a config file may hold them too."""
FIELDS = tuple(field.name for field in fields(QuantizeConfig))
METRIC = ("metric", "metric_option")
PICTURES = ("preprocess", "mean", "std", "size", "crop_pct", "interpolation", "input")
"""From a picture to the model's input."""
AS_TEXT = ("mean", "std", "size")
"""Options of several numbers in one word."""


READ_AS: dict[Any, Any] = {
    bool: bool | None,
    int: int | None,
    float: float | None,
    str: str | None,
}
"""The type of an option by that of its field; None means not given."""
MANY: dict[Any, Any] = {int: list[int] | None, str: list[str] | None}
"""The same of fields that hold several."""


def option(names: str, metavar: str | None, default: object, text: str) -> Any:
    """An option that is None unless given; its help says what None means.

    ``names``: one, or several with spaces between. ``default`` REQUIRED: not to be left out.
    """
    shown = f"[{default}]" if str(default).startswith(REQUIRED) else f"[default: {default}]"
    return typer.Option(*names.split(), metavar=metavar, help=f"{text} {shown}", show_default=False)


def switch(name: str, default: bool, text: str) -> Any:
    """``--name`` and ``--no-name``, None unless one of them is given."""
    return option(f"--{name}/--no-{name}", None, "on" if default else "off", text)


def takes(*names: str, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of these fields of the config, or of all but ``without``.

    The command receives those that it does not name itself as keywords, None where not given.
    """
    wanted = [name for name in names or FIELDS if name not in without]

    def decorate(command: Callable[..., None]) -> Any:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in ((name, _of_field(name)) for name in wanted)
        ]

        def run(**given: Any) -> None:
            command(**given)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
        return run

    return decorate


def _of_field(name: str) -> Any:
    """The option of a field: its type on the command line, and its flag."""
    flag: Flag = flags(QuantizeConfig)[name]
    dashed = name.replace("_", "-")
    names = f"--{dashed}" if flag.metavar else f"--{dashed}/--no-{dashed}"
    return Annotated[_kind(name), option(names, flag.metavar, flag.shown, flag.text)]


def _kind(name: str) -> Any:
    """What the command line reads for a field: a number, a word, a switch, or a list of them."""
    hint = get_type_hints(QuantizeConfig)[name]
    if name in AS_TEXT or get_origin(hint) is Literal:
        return str | None
    kinds = [kind for kind in get_args(hint) or (hint,) if kind not in (type(None), Ellipsis)]
    return (MANY if get_origin(hint) is tuple else READ_AS)[kinds[0]]


Model = Annotated[str, typer.Argument(metavar="MODEL.onnx", help="The ONNX file.")]
Config = Annotated[
    str | None,
    option(
        "--config", "FILE", "none", "YAML file of options (name: value); the command line wins."
    ),
]
Calib = Annotated[
    str | None,
    option(
        "--calib",
        "DIR",
        "required, but where --activations are dynamic; models/digits_vit.onnx brings its own",
        "Calibration images: a folder, .npy or .npz; or psaq: made from the model; or synthetic:"
        " drawn pictures; or noise: Gaussian ones.",
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
Targets = Annotated[
    str | None,
    option(
        "--targets",
        "PATH",
        "the float model's answers",
        "metric: the truth of --val: a folder of a file for each image, an array, lines 'name"
        " value', or COCO's JSON.",
    ),
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
    option("--scales", "FILE", "none", "report.json of an earlier run, to use its scales."),
]
Reference = Annotated[
    str | None,
    option("--reference", "FLOAT.onnx", "none", "A float model to compare the logits with."),
]
Json = Annotated[bool, option("--json", None, "a table", "One line of JSON on stdout.")]
Soc = Annotated[
    str | None, option("--soc", "N", "the compiler's", "qnn: number of the SoC to compile for.")
]
HtpArch = Annotated[
    str | None, option("--htp-arch", "N", "the compiler's", "qnn: version of its NPU, as in 73.")
]
Runtime = Annotated[
    str,
    option(
        "--runtime",
        "NAME",
        "onnxruntime",
        "What computes the quantized file: onnxruntime, or qnn, Qualcomm's NPU or its emulator.",
    ),
]
Context = Annotated[
    str | None,
    option("--context", "FILE.onnx", "none", "qnn: where to write the compiled graph (EPContext)."),
]
Threads = _of_field("threads")
Batch = _of_field("batch")
