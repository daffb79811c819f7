"""``python -m fuzz --minutes n``: cases in processes of their own, as long as there is time.

A worker does a hundred cases of a kind and ends; one that hangs, crashes or takes 2 GB is ended by
its watcher, and the case that it was at is a finding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz.oracle import LARGEST, OWN, SECONDS

TESTS = Path(__file__).resolve().parents[1]
LOT = 100


def worker(kind: str, first: int, count: int) -> None:
    """Cases of a kind, a line of JSON for the begin and the end of each."""
    from fuzz.cases import run_case

    for seed in range(first, first + count):
        print(json.dumps({"begin": seed}), flush=True)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            found = run_case(kind, seed, Path(folder))
        end = {"seed": seed, "code": found.code, "finding": found.finding}
        if found.admits:
            end["admits"] = found.text
        print(json.dumps(end | {"seconds": round(found.seconds, 2)}), flush=True)


def lot(kind: str, first: int, count: int) -> tuple[Counter[int], list[dict[str, object]], int]:
    """Run a worker and watch it; returns counts by exit code, findings, and how many were done."""
    codes: Counter[int] = Counter()
    findings: list[dict[str, object]] = []
    words = [sys.executable, "-m", "fuzz", "--worker", kind, str(first), str(count)]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(words, stdout=out, cwd=TESTS, stderr=subprocess.DEVNULL)
        seen, since, ended = 0, time.monotonic(), ""
        while process.poll() is None:
            time.sleep(0.2)
            out.flush()
            size = out.seek(0, 2)
            if size != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since > 2 * SECONDS:
                ended = "hang"
            elif _memory(process.pid) > LARGEST:
                ended = f"memory: {_memory(process.pid) >> 20} MB"
            if ended:
                process.kill()
                process.wait()
        out.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.endswith("}")]
    done = [line for line in lines if "seed" in line]
    for line in done:
        codes[line["code"]] += 1
        if line["finding"]:
            findings.append({"kind": kind, **line})
        elif "admits" in line:
            findings.append({"kind": kind, **line, "finding": "admits: a fault of its own"})
    if process.returncode:
        at = lines[-1].get("begin", first) if lines else first
        what = ended or f"crash: ended with {process.returncode}"
        findings.append({"kind": kind, "seed": at, "finding": what})
        return codes, findings, int(at) - first + 1
    return codes, findings, count


def _memory(pid: int) -> int:
    """Bytes that a process holds; 0 where that cannot be told, and in the oracle's own work."""
    try:
        if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == OWN:
            return 0
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def campaign(minutes: float, kinds: list[str], first: int) -> int:
    """Lots of each kind in turn until the time is over; prints what was found."""
    end, at = time.monotonic() + 60 * minutes, dict.fromkeys(kinds, first)
    totals: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}
    bad: Counter[str] = Counter()
    while time.monotonic() < end:
        for kind in kinds:
            if time.monotonic() >= end:
                break
            codes, findings, done = lot(kind, at[kind], LOT)
            at[kind] += done
            totals[kind] += codes
            for finding in findings:
                bad[f"{kind} {str(finding['finding']).split(':')[0]}"] += 1
                print(json.dumps(finding), flush=True)
    for kind in kinds:
        print(f"{kind}: seeds {first} to {at[kind] - 1}, by exit code {dict(totals[kind])}")
    print("findings:", dict(bad) or "none")
    return 1 if bad else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "FIRST", "COUNT"))
    given = parser.parse_args()
    if given.worker:
        kind, first, count = given.worker
        worker(kind, int(first), int(count))
        return
    from fuzz.cases import KINDS

    kinds = given.kinds.split(",") if given.kinds else list(KINDS)
    sys.exit(campaign(given.minutes, kinds, given.first))


if __name__ == "__main__":
    main()
