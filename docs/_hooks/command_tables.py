"""Commands and options as tables, from the command line itself and the fields of the config."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import typer

from ptq_onnx import QuantizeConfig
from ptq_onnx.cli.app import app
from ptq_onnx.cli.help import GROUPS, REST

DEFAULT = re.compile(r"^(.*?) ?\[(?:default: )?([^\[\]]*(?:\[[^\]]*\])?[^\[\]]*)\]$", re.S)
"""``text [default: x]`` or ``text [required]``."""


def all_commands() -> dict[str, Any]:
    """The commands by name, in the order of ``ptq-onnx -h``."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def usage(command: Any) -> str:
    """``ptq-onnx quantize [OPTIONS] MODEL.onnx``"""
    words = [p.metavar for p in command.params if p.param_type_name == "argument"]
    return " ".join(["ptq-onnx", command.name, "[OPTIONS]", *words])


def commands() -> str:
    """Each command and what it is for."""
    rows = [(f"[`{name}`](#{name})", c.short_help) for name, c in all_commands().items()]
    return table(("command", ""), rows)


def options(command: str) -> str:
    """The call of one command, its arguments and its options in groups."""
    found = all_commands()[command]
    left = {p.name: p for p in found.params}
    arguments = [p for p in found.params if p.param_type_name == "argument"]
    parts = [f"    {usage(found)}", sentence(found.help)]
    parts.append(table(("argument", "meaning"), [(code(p.metavar), p.help) for p in arguments]))
    named = {member for members in GROUPS.values() for member in members}
    rest = [name for name in left if name not in named]
    for title, members in {**GROUPS, REST: rest}.items():
        rows = [_row(left[n]) for n in members if n in left and left[n] not in arguments]
        if rows:
            parts.append(table((title, "default", "meaning"), rows))
    return "\n\n".join(parts)


def fields_table() -> str:
    """The fields of QuantizeConfig: name, type, default, and the option of the command line."""
    known = {p.name: p for p in all_commands()["quantize"].params}
    rows = []
    for field in fields(QuantizeConfig):
        option = known.get(field.name)
        name = "" if option is None else code(_names(option))
        rows.append((code(field.name), code(str(field.type)), code(repr(field.default)), name))
    return table(("field", "type", "default", "option"), rows)


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def code(text: str) -> str:
    """In code font."""
    return f"`{text}`"


def sentence(text: str | None) -> str:
    """Text on one line, without an exception's name that only Python's readers need."""
    return " ".join((text or "").split())


def _row(param: Any) -> tuple[str, str, str]:
    text = sentence(param.help)
    found = DEFAULT.match(text)
    meaning, default = (found[1], found[2]) if found else (text, "")
    takes = f" {param.metavar}" if param.metavar else ""
    return code(_names(param) + takes), default, meaning


def _names(param: Any) -> str:
    names = sorted(param.opts, key=lambda name: name.startswith("--"))
    return ", ".join([*names, *param.secondary_opts])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
