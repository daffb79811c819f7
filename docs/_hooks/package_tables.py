"""Tables about the package, from the package: names, rooms, rules, targets, tested models."""

from __future__ import annotations

import ast
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from command_tables import code, table

import ptq_onnx
from ptq_onnx.config.names import METHOD_NAMES, QUANTIZER_NAMES
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ptq_onnx"


def rooms() -> str:
    """The floors that ``tests/test_layers.py`` holds every import to, with what is on them."""
    return table(("floor", "room", "what it is", "modules"), list(_rooms()))


def public_names() -> str:
    """What ``import ptq_onnx`` gives, as directives of mkdocstrings."""
    first = ("quantize", "analyse", "evaluate", "compare", "check", "benchmark", "inspect", "roles")
    names = [*first, *(n for n in ptq_onnx.__all__ if n not in first)]
    return "\n\n".join(f"::: ptq_onnx.{name}" for name in names)


def quantizers() -> str:
    """The names that ``--quantizer`` takes, with their pages."""
    rows = []
    for name in QUANTIZER_NAMES:
        takes = [t for t in TARGETS if TARGETS[t].refusal(name) is None]
        own = [t for t in takes if TARGETS[t].quantizer == name]
        rows.append((f"[`{name}`]({name}.md)", ", ".join(takes), ", ".join(own)))
    return table(("quantizer", "targets", "default for"), rows)


def target(name: str) -> str:
    """What a target takes: quantizers, opsets."""
    found = TARGETS[name]
    refused = {q: found.refusal(q) for q in QUANTIZER_NAMES}
    takes = [q for q, reason in refused.items() if reason is None]
    opsets = f"{found.opsets[0]} to {found.opsets[-1]}, default {found.opset}"
    rows = [
        ("quantizers", ", ".join(map(code, takes)) + f"; default `{found.quantizer}`"),
        ("opset of the file", opsets),
    ]
    rows += [(f"refuses `{q}`", reason) for q, reason in refused.items() if reason is not None]
    return table(("", ""), rows)


def rules(target: str) -> str:
    """The rules of ``ptq-onnx check`` for a target, and where each is written."""
    from ptq_onnx.targets.checking.check import explain

    rows = [(code(name), text) for name, text in explain(target).items()]
    return table(("rule", "what it demands"), rows)


def fusions() -> str:
    """The rule families of fusion, in the order they run."""
    from ptq_onnx.fusion.rules import RULES

    return ", ".join(code(name) for name, _ in RULES)


def methods() -> str:
    """The calibration methods, and which quantizers take each by default."""
    defaults: dict[str, list[str]] = defaultdict(list)
    for name in QUANTIZER_NAMES:
        defaults[QuantizeConfig(quantizer=name).effective_method].append(code(name))
    rows = [(code(n), ", ".join(defaults[n]) or "none") for n in METHOD_NAMES]
    return table(("method", "default of"), rows)


def models() -> str:
    """Every cell of ``tests/zoo``: a network, how it was exported, and what must be found in it.

    The tests fail where a cell does not hold, so that all that is in the table works. Those that
    every run of the suite tries are bold.
    """
    cells = _of_tests("zoo.cells")
    through: dict[str, list[str]] = defaultdict(list)
    for cell in cells.CELLS:
        bold = "**" if cell in cells.ALWAYS else ""
        through[cell.architecture].append(f"{bold}{cell.exporter}{bold}")
    rows = []
    for name, found in cells.EXPECTED.items():
        counts = map(str, (found.blocks, found.norms, found.gelus, found.linears, found.softmaxes))
        rows.append((code(name), *counts, ", ".join(through[name])))
    titles = ("network", "blocks", "norms", "GELUs", "linears", "softmaxes", "exported through")
    return f"{len(cells.CELLS)} cells, {len(rows)} networks.\n\n" + table(titles, rows)


def _rooms() -> Iterator[tuple[str, str, str, str]]:
    for number, names in enumerate(_of_tests("test_layers").FLOORS, start=1):
        for name in names:
            folder = PACKAGE / name
            if not folder.is_dir():
                yield str(number), code(f"{name}.py"), _first_line(PACKAGE / f"{name}.py"), ""
                continue
            inside = sorted(p.relative_to(folder) for p in folder.rglob("*.py"))
            modules = [p.with_suffix("").as_posix() for p in inside if p.stem != "__init__"]
            text = _first_line(folder / "__init__.py")
            yield str(number), code(f"{name}/"), text, ", ".join(map(code, modules))


def _of_tests(name: str) -> ModuleType:
    """A module of ``tests/``."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())
