"""Wall time and peak memory of quantizing, beside onnxruntime's min-max on the same images.

    python benchmarks/quantization.py --data ../shared [--repeat 3]

Whole commands in processes of their own, interleaved, the median of the repeats: imports,
loading, calibration and writing included, report and pictures off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys
import numpy as np
from pathlib import Path
from PIL import Image
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

model, folder, count, output = sys.argv[1:]
files = sorted(Path(folder).iterdir())
chosen = [files[i * len(files) // int(count)] for i in range(int(count))]


class Reader(CalibrationDataReader):
    def __init__(self):
        self.files = iter(chosen)

    def get_next(self):
        file = next(self.files, None)
        if file is None:
            return None
        picture = Image.open(file).convert("RGB")
        left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32)
        return {"input": ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]}


quantize_static(
    model, output, Reader(), per_channel=True,
    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command[:4])}: {message.decode()[-500:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Print seconds, megabytes and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    model = str(options.data / "models/vit_tiny_patch16_224.opset14.onnx")
    calib = str(options.data / "imagenet/calib")
    with tempfile.TemporaryDirectory() as folder:

        def ours(images: int) -> list[str]:
            out = f"{folder}/ours{images}"
            command = [sys.executable, "-m", "ptq_onnx", "quantize", model, "--calib", calib]
            command += ["--images", str(images), "--quantizer", "fqvit", "--output", out]
            return [*command, "--preprocess", "inception", "--no-report", "--no-pictures"]

        peer = [sys.executable, "-c", PEER, model, calib, "128", f"{folder}/peer.onnx"]
        pairs = [(run(ours(128)), run(peer)) for _ in range(options.repeat)]
        mine = statistics.median(p[0][0] for p in pairs)
        other = statistics.median(p[1][0] for p in pairs)
        ratio = statistics.median(p[0][0] / p[1][0] for p in pairs)
        print(f"ViT-Ti, 128 images: fqvit {mine:.1f} s, onnxruntime min-max {other:.1f} s,")
        print(f"ratio {ratio:.2f} (median of {options.repeat} interleaved pairs)")
        print(f"peak memory: fqvit {pairs[0][0][1]:.0f} MB, onnxruntime {pairs[0][1][1]:.0f} MB")
        for images in (64, 256):
            seconds, memory = run(ours(images))
            print(f"fqvit, {images} images: {seconds:.1f} s, {memory:.0f} MB")


if __name__ == "__main__":
    main()
