"""A sweep whose cells cost nothing: ``python -m sweep.stub FOLDER CELLS WORKERS SECONDS``.

Each cell writes bytes that follow from its name, after some seconds; a file ``die`` in the folder
lets the process that takes it end itself.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from ptq_onnx.cli.console import one_line_errors
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.files.publishing import publish, workshop
from ptq_onnx.files.text_file import write_text
from ptq_onnx.sweep.cell import DONE, NOTHING, RECORD, Row, _text
from ptq_onnx.sweep.matrix import AXES, Cell
from ptq_onnx.sweep.running import Found, Machines, run
from ptq_onnx.sweep.stages import PREPARE, Measured, Task
from ptq_onnx.sweep.work import Place

MODEL = Path(__file__).resolve().parents[2] / "models" / "digits_vit.onnx"
RESULT = "quantized.onnx"


def cells(count: int) -> list[Cell]:
    config = QuantizeConfig(threads=1, report=False)
    axes = [dict.fromkeys(AXES, "x") | {"model": "m", "seed": str(i)} for i in range(count)]
    return [Cell(one, MODEL, None, None, None, config) for one in axes]


def content(cell: Cell) -> bytes:
    return hashlib.sha256(cell.name.encode()).digest()


def work(task: Task, where: Place, mark: str, attempt: int) -> Row | Measured:
    """As ``do``, without a quantization."""
    cell, folder = task.cell, where.folder
    if task.stage == PREPARE:
        return Measured(True, NOTHING)
    with suppress(FileNotFoundError):
        (folder / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    place = folder / cell.name
    with workshop(place) as made:
        (made / RESULT).write_bytes(content(cell))
        time.sleep(float(os.environ["STUB_SECONDS"]))
        publish(made, place)
    row = Row.of(cell, DONE, attempts=attempt)
    write_text(place / RECORD, _text(row, mark))
    return row


def stub_sweep(folder: Path, count: int, workers: int) -> Found:
    return run(cells(count), folder, Machines(workers), 2, lambda *_: lambda row: None, work)


if __name__ == "__main__":
    os.environ["STUB_SECONDS"] = sys.argv[4]
    with one_line_errors():
        found = stub_sweep(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        print(found.before, [row.attempts for row in found.rows], flush=True)
