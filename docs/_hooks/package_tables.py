"""Tables about the package, from the package: names, rooms, rules, targets, tested models."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ptq_onnx
from command_tables import code, table
from ptq_onnx.config import QUANTIZER_NAMES, QuantizeConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ptq_onnx"


def rooms() -> str:
    """Every folder of the package and every module beside them, with the first line of its text."""
    folders = [p.parent for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE]
    rows = []
    for path in sorted([*folders, *PACKAGE.glob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            modules = sorted(p.stem for p in path.glob("*.py") if p.stem != "__init__")
            text = _first_line(path / "__init__.py")
            rows.append((code(f"{name}/"), text, ", ".join(map(code, modules))))
        elif path.name != "__init__.py":
            rows.append((code(name), _first_line(path), ""))
    return table(("folder or module", "what it is", "modules"), rows)


def public_names() -> str:
    """What ``import ptq_onnx`` gives, as directives of mkdocstrings."""
    first = ("quantize", "analyse", "evaluate", "compare", "check", "benchmark", "inspect", "roles")
    names = [*first, *(n for n in ptq_onnx.__all__ if n not in first)]
    return "\n\n".join(f"::: ptq_onnx.{name}" for name in names)


def quantizers() -> str:
    """The names that ``--quantizer`` takes, with their pages."""
    rows = []
    for name in QUANTIZER_NAMES:
        takes = [t for t in _targets() if name not in _targets()[t].quantizers]
        own = [t for t in takes if _targets()[t].quantizer == name]
        rows.append((f"[`{name}`]({name}.md)", ", ".join(takes), ", ".join(own)))
    return table(("quantizer", "targets", "default for"), rows)


def target(name: str) -> str:
    """What a target takes: quantizers, opsets."""
    found = _targets()[name]
    takes = [q for q in QUANTIZER_NAMES if q not in found.quantizers]
    opsets = f"{found.opsets[0]} to {found.opsets[-1]}, default {found.opset}"
    rows = [
        ("quantizers", ", ".join(map(code, takes)) + f"; default `{found.quantizer}`"),
        ("opset of the file", opsets),
    ]
    rows += [(f"refuses `{q}`", reason) for q, reason in found.quantizers.items()]
    return table(("", ""), rows)


def rules(target: str) -> str:
    """The rules of ``ptq-onnx check`` for a target, and where each is written."""
    from ptq_onnx.conformance import explain

    rows = [(code(name), text) for name, text in explain(target).items()]
    return table(("rule", "what it demands"), rows)


def fusions() -> str:
    """The rule families of fusion, in the order they run."""
    from ptq_onnx.fusion import RULES

    return ", ".join(code(name) for name, _ in RULES)


def methods() -> str:
    """The calibration methods, and which quantizers take each by default."""
    from ptq_onnx.config import METHOD_NAMES

    defaults: dict[str, list[str]] = defaultdict(list)
    for name in QUANTIZER_NAMES:
        defaults[QuantizeConfig(quantizer=name).effective_method].append(code(name))
    rows = [(code(n), ", ".join(defaults[n]) or "none") for n in METHOD_NAMES]
    return table(("method", "default of"), rows)


def roles() -> str:
    """The roles of the tested networks, as ``--keep-float`` takes them."""
    found = ptq_onnx.roles(ROOT / "models" / "digits_vit.onnx")
    return ", ".join(code(name) for name in found)


def models() -> str:
    """Every cell of ``tests/zoo``: a network, how it was exported, and what must be found in it.

    The tests fail where a cell does not hold, so that all that is in the table works.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from zoo.cells import CELLS, EXPECTED
    finally:
        sys.path.pop(0)
    through: dict[str, list[str]] = defaultdict(list)
    for cell in CELLS:
        through[cell.architecture].append(cell.exporter)
    rows = []
    for name, found in EXPECTED.items():
        counts = map(str, (found.blocks, found.norms, found.gelus, found.linears, found.softmaxes))
        rows.append((code(name), *counts, ", ".join(through[name])))
    titles = ("network", "blocks", "norms", "GELUs", "linears", "softmaxes", "exported through")
    return f"{len(CELLS)} cells, {len(rows)} networks.\n\n" + table(titles, rows)


def _targets() -> Mapping[str, Any]:
    from ptq_onnx.targets import TARGETS

    return TARGETS


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())
