"""What ``--help`` prints: options in groups, plain text that a pipe of 80 columns holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from ptq_onnx.config.fields import Fields
from ptq_onnx.config.flags import ANALYSIS, INPUT, NUMBERS, RUNNING, TARGET, flags

NAMES = ["-h", "--help"]
"""What asks for help, in every command."""
REQUIRED = "required"
"""What an option has in place of a default where the command does not work without it."""

OUTPUT = "Output"

PLACES: Mapping[str, Sequence[str]] = {
    INPUT: ("calib", "val", "labels", "targets", "reference", "sizes", "config"),
    NUMBERS: ("scales",),
    TARGET: ("runtime", "soc", "htp_arch", "pretrained", "strict"),
    OUTPUT: ("output", "context", "as_json"),
    RUNNING: ("seconds", "address"),
}
"""The groups of the options that are no fields of the config."""


def _groups() -> Mapping[str, Sequence[str]]:
    """Headings, and the options below each."""
    own = flags(Fields)
    return {
        group: (
            *PLACES.get(group, ()),
            *(name for name, flag in own.items() if flag.group == group),
        )
        for group in (INPUT, NUMBERS, TARGET, ANALYSIS, OUTPUT, RUNNING)
    }


GROUPS = _groups()
"""Headings, and the options below each, in order; what stands in none comes last."""
REST = "Other"
EXTRA = "Got unexpected extra argument"
"""How the parser begins where words are left over."""
UNKNOWN = "No such command"


class Command(TyperCommand):
    """A command whose help has its options in groups."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS] MODEL.onnx``: an argument as it is called, without braces."""
        names = [_shown(p) for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *names]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the groups."""
        params = [p for p in self.get_params(ctx) if not getattr(p, "hidden", False)]
        arguments = [p for p in params if p.param_type_name == "argument"]
        options = {str(p.name): p for p in params if p.param_type_name != "argument"}
        sections = {"Arguments": [_argument(p) for p in arguments]}
        for title, members in GROUPS.items():
            sections[title] = [_option(options.pop(n)) for n in members if n in options]
        sections[REST] = [_option(p) for p in options.values()]
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def told(error: Any) -> str:
    """A wrong word on the command line in one sentence, and where to read on."""
    context: Any = getattr(error, "ctx", None)
    where = getattr(context, "command_path", "ptq-onnx")
    text = str(error.format_message()).rstrip(".")
    if text.startswith(EXTRA):
        taken = " ".join(context.command.collect_usage_pieces(context)[1:])
        words = text.rpartition(" (")[2].rstrip(")")
        text = (
            f"{where} takes only {taken or 'options'}, so '{words}' is one too many; folders and"
            " files are given by options, as in --calib DIR"
        )
    elif text.startswith(UNKNOWN) and ".onnx" in text:
        model = text.split("'")[1]
        text = f"{text}. The command comes first: ptq-onnx quantize {model}"
    return f"{text}{'' if text.endswith('?') else '.'} See {where} --help."


def _shown(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _argument(param: Any) -> tuple[str, str]:
    return _shown(param), f"{param.help} [{REQUIRED}]"


def _option(param: Any) -> tuple[str, str]:
    """``-o, --output PATH`` and its text."""
    names = ", ".join(sorted(param.opts, key=lambda name: name.startswith("--")))
    if param.secondary_opts:
        names += f", {', '.join(param.secondary_opts)}"
    takes = f" {param.metavar}" if param.metavar else ""
    return f"{names}{takes}", str(param.help or "")
