"""Prints the table.

    PYTHONPATH=.:tests python -m oracle [--networks plain,…] [--ways fqvit,…] [--bits 8/8/8]

One line a quantizer and target: cells, the worst tensor of all parts in dB, and what stands beyond
rounding in steps; ``--cells`` a line a cell.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

from .cells import WAYS, Cell, Result, cells, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m oracle")
    parser.add_argument("--networks", default="")
    parser.add_argument("--ways", default="")
    parser.add_argument("--bits", default="")
    parser.add_argument("--cells", action="store_true", help="a line a cell")
    options = parser.parse_args()
    chosen = [
        c
        for c in cells()
        if (not options.networks or c.network in options.networks.split(","))
        and (not options.bits or c.bits in options.bits.split(","))
        and (not options.ways or any(w in c.way for w in options.ways.split(",")))
    ]
    found: dict[Cell, Result | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cell in chosen:
            try:
                found[cell] = run(cell, Path(folder))
            except Exception as error:
                found[cell] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if not type(error).__module__.startswith("ptq_onnx"):
                    traceback.print_exc(limit=-3, file=sys.stderr)
            if options.cells:
                print(line(cell, found[cell]), flush=True)
    print("| quantizer/target | cells | refused | worst part, dB | where | steps | whole, dB |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        mine = {c: r for c, r in found.items() if c.way == way}
        if mine:
            print(summary(way, mine))


def line(cell: Cell, result: Result | str) -> str:
    if isinstance(result, str):
        return f"{cell.name}: {result}"
    worst = result.worst
    return (
        f"{cell.name}: {worst.decibels:.1f} dB at {worst.role} {worst.tensor}"
        f" ({worst.steps:.2g} steps, {worst.moved:.1%} moved); whole {result.whole:.1f};"
        f" file {result.file:.1f}, oracle {result.oracle:.1f}"
        + "".join(f" COMPLAINT {c}" for c in result.complaints())
    )


def summary(way: str, found: dict[Cell, Result | str]) -> str:
    results = {c: r for c, r in found.items() if isinstance(r, Result)}
    if not results:
        return f"| {way} | 0 | {len(found)} | | | | |"
    cell = min(results, key=lambda c: results[c].worst.decibels)
    worst = results[cell].worst
    steps = max(p.steps for r in results.values() for p in r.parts)
    least = min(r.whole for r in results.values())
    where = f"{cell.network} {cell.bits}, {worst.role}"
    return (
        f"| {way} | {len(results)} | {len(found) - len(results)} | {worst.decibels:.1f} | {where} |"
        f" {steps:.2g} | {least:.1f} |"
    )


if __name__ == "__main__":
    main()
