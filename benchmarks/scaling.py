"""Time and memory of each stage of a quantization: python benchmarks/scaling.py MODEL.onnx CALIB

Seconds are those of the processor, on one thread, so that other work on the machine does not count;
memory is the most that the process had in the stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.progress import WHOLE, silent

PAGE = 4096
INTERVAL = 0.02


class Meter:
    """What the library takes as ``progress``; notes each stage's seconds and most bytes."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, int]] = []
        self._name, self._begin, self._most = "", 0.0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str, total: int) -> Callable[[int], None]:
        if stage != WHOLE:
            self.end()
            self._name, self._begin, self._most = stage, time.process_time(), resident()
        return silent

    def end(self) -> None:
        if self._name:
            spent = time.process_time() - self._begin
            self.stages.append((self._name, spent, self._most))
            self._name = ""

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, resident())
            time.sleep(INTERVAL)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("--quantizer", default="deploy")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    meter = Meter()
    config = QuantizeConfig(
        quantizer=given.quantizer,
        images=given.images,
        report=given.report,
        analysis_images=8,
        threads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        quantize(given.model, config=config, calib=given.calib, output=output, progress=meter)
    meter.end()
    print(f"{given.model.name}, {model_bytes(given.model) / 1e6:.0f} MB")
    for name, seconds, most in meter.stages:
        print(f"{name:34} {seconds:8.1f} s {most / 1e9:6.2f} GB")
    whole = sum(seconds for _, seconds, _ in meter.stages)
    print(f"{'in all':34} {whole:8.1f} s {max(m for *_, m in meter.stages) / 1e9:6.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
