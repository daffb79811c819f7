"""Writes the zoo's matrix into the README, from what the tests have recorded.

    ZOO_RESULTS=/tmp/zoo.jsonl python -m pytest tests/zoo -m 'not full_zoo'
    python tests/zoo/matrix.py /tmp/zoo.jsonl README.md

Cells that fail are in the table with the reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- zoo: written by tests/zoo/matrix.py -->", "<!-- zoo ends -->"


def table(lines: list[dict[str, Any]]) -> str:
    """One row an architecture."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault(line["cell"].split("/")[0], []).append(line)
    passed = sum(not line["complaints"] for line in lines)
    out = [
        f"{passed} of {len(lines)} cells pass.",
        "",
        "| architecture | blocks | works through | does not |",
        "|---|---|---|---|",
    ]
    for name, cells in rows.items():
        blocks = next((str(c["found"]["blocks"]) for c in cells if "found" in c), "")
        works = [c["cell"].split("/")[1] for c in cells if not c["complaints"]]
        fails = [
            f"{c['cell'].split('/')[1]}: {'; '.join(c['complaints'])}"
            for c in cells
            if c["complaints"]
        ]
        out.append(f"| {name} | {blocks} | {', '.join(works)} | {'. '.join(fails)} |")
    return "\n".join(out)


def main() -> None:
    """Replace what stands between the two marks."""
    source, readme = Path(sys.argv[1]), Path(sys.argv[2])
    lines: dict[str, dict[str, Any]] = {}
    for text in source.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[line["cell"]] = line  # the last run of a cell counts
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    found = f"{before}{BEGIN}\n{table(list(lines.values()))}\n{END}{after}"
    readme.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
