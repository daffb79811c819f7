"""``ptq-onnx check``: does a quantized file follow the rules of a runtime?"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import simple_table
from ptq_onnx.cli.terminal import plain, stdout
from ptq_onnx.errors import ConfigError
from ptq_onnx.pipeline.model_path import find_model
from ptq_onnx.targets.checking.check import TARGETS, Report, explain

CheckTarget = Annotated[
    str,
    o.option("--target", "NAME", "onnxruntime", f"Whose rules: one of {', '.join(TARGETS)}."),
]
Strict = Annotated[
    bool, o.option("--strict", None, "off", "Warnings count as errors for the exit code.")
]


def check(
    model: o.Model,
    target: CheckTarget = "onnxruntime",
    strict: Strict = False,
    soc: o.Soc = None,
    htp_arch: o.HtpArch = None,
    as_json: o.Json = False,
) -> None:
    """List what a runtime would refuse, or compute in float; exit code 1 if anything."""
    path = find_model(model, written=True)
    from ptq_onnx.targets.checking.check import check as run

    given = {"soc": soc, "htp_arch": htp_arch}
    device = {name: value for name, value in given.items() if value is not None}
    if device and target != "qnn":
        raise ConfigError(f"--{next(iter(device)).replace('_', '-')} belongs to --target qnn.")
    report = run(path, target, device)
    if as_json:
        print(json.dumps({"model": str(path), **report.as_dict()}))
    else:
        _show(report, path.name)
    if report.errors or (strict and report.warnings):
        raise typer.Exit(1)


def _show(report: Report, name: str) -> None:
    """A table of violations, what the broken rules are, and counts."""
    console = stdout()
    if report.violations:
        console.print(_table(report, name))
        texts = explain(report.target)
        for rule in dict.fromkeys(v.rule for v in report.violations):
            console.say(f"{rule}: {texts[rule]}")
    for rule, reason in report.skipped.items():
        console.say(f"skipped: {rule}: {reason}")
    console.print(simple_table((f"{name} for {report.target}", ""), _counts(report)))


def _table(report: Report, name: str) -> Table:
    table = Table(title=f"Violations in {name}", box=box.SIMPLE, title_justify="left")
    for column in ("severity", "rule", "node", "what"):
        table.add_column(column, overflow="fold")
    for found in report.violations:
        node = found.node or "(the file)"
        table.add_row(*map(plain, (found.severity, found.rule, node, found.text)))
    return table


def _counts(report: Report) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [
        ("rules checked", len(report.rules)),
        ("errors", len(report.errors)),
        ("warnings", len(report.warnings)),
        ("linears quantized", f"{report.quantized_linears} of {report.linears}"),
        ("attention products quantized", f"{report.quantized_products} of {report.products}"),
    ]
    for title, ops in (("ops", report.ops), *report.facts.items()):
        rows.append((title, ", ".join(f"{op} {count}" for op, count in ops.items())))
    return [(name, str(value)) for name, value in rows]
