"""What Qualcomm's compiler says of a file: compiled in a process of its own, whose log is read.

The log is the only place where it names the nodes that it refuses, with the reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ptq_onnx.errors import PtqError
from ptq_onnx.files.held_folder import scratch_folder
from ptq_onnx.graph.codings import CODINGS
from ptq_onnx.targets.qnn.session import Device, npu_session, plugin

LIMIT = 900
"""Seconds that compiling may take."""
UNIT = re.compile(r"Validation (PASSED|FAILED) for (\d+) nodes in OrtNodeUnit \((\w+)\)")
NODE = re.compile(r"Operator type: (\w+) Node name: (.*?) Node index: \d+")
REASON = re.compile(r"REASON : (.*)")
BACKEND = re.compile(r"backendValidateOpConfig\(\) failed for node `.+?` of type `(\w+)`")
WORDLESS = "Failed to add"
"""How reasons begin that tell nothing but that the compiler said no."""


@dataclass(frozen=True)
class Refused:
    """A node that the compiler does not take, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Compiled:
    """``refused``: nodes that would run on the CPU. ``floats``: nodes without codes on all sides,
    by name with their op, which the NPU would compute in float. ``units``: how many units of each
    op it takes. ``error``: why the whole file was refused, empty where it compiles."""

    refused: tuple[Refused, ...]
    floats: Mapping[str, str]
    units: Mapping[str, int]
    error: str


@dataclass(frozen=True)
class Compiler:
    """Compiles files for one device."""

    device: Device

    def __call__(self, source: str | bytes) -> Compiled | None:
        """What the compiler says of a file, or of a model's bytes; None where it is not
        installed. Raises ConfigError where no temporary folder can be made."""
        try:
            plugin()
        except PtqError:
            return None
        with scratch_folder() as folder:
            path = Path(source) if isinstance(source, str) else folder / "model.onnx"
            if isinstance(source, bytes):
                path.write_bytes(source)
            command = [sys.executable, "-m", __name__, str(path)]
            command += [self.device.soc, self.device.htp_arch]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=LIMIT,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Compiled((), {}, {}, f"compiling took more than {LIMIT} seconds")
        return read_log(done.stderr, done.stdout, done.returncode)


@dataclass
class _Unit:
    """A group of nodes that becomes one op of the NPU, as the log tells it."""

    passed: bool
    size: int
    op_type: str
    nodes: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        """The node that computes: the first of the unit's op."""
        return next((n for n, kind in self.nodes.items() if kind == self.op_type), "")


def read_log(log: str, said: str, code: int) -> Compiled:
    """What a log of the compiler says; ``said``: the last words of its process."""
    units: dict[str, _Unit] = {}
    unit, before = None, ""
    for line in log.splitlines():
        if found := UNIT.search(line):
            unit = _Unit(found[1] == "PASSED", int(found[2]), found[3])
        elif found := BACKEND.search(line):
            before = f"HTP has no {found[1]} of these types and shapes (backendValidateOpConfig)"
        elif unit is not None and (found := NODE.search(line)):
            unit.nodes[found[2]] = found[1]
            if unit.name:
                units[unit.name] = unit
        elif unit is not None and (found := REASON.search(line)):
            reason = found[1].strip().rstrip(".")
            unit.reason = before if reason.startswith(WORDLESS) and before else reason
            before = ""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    error = "" if code == 0 else last or f"its process ended with code {code}"
    passed = [u for u in units.values() if u.passed]
    return Compiled(
        tuple(Refused(u.name, u.op_type, u.reason) for u in units.values() if not u.passed),
        {u.name: u.op_type for u in passed if u.size == 1 and u.op_type not in CODINGS},
        Counter(u.op_type for u in passed),
        error,
    )


def main() -> int:
    """Compile one file and tell all of it on stderr."""
    path, soc, arch = sys.argv[1:4]
    try:
        npu_session(path, Device(soc, arch), threads=1, verbose=True)
    except PtqError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
