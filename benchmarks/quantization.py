"""Wall time and peak memory of quantizing, beside onnxruntime's min-max on the same images.

    python benchmarks/quantization.py --data ../shared [--repeat 3] [--only vit-b|vit-ti]

A ViT-B/16 with random weights on 64 images, and the ViT-Ti of the data on 128. Whole commands
in processes of their own, interleaved, the median of the repeats: imports, loading, calibration
and writing included, the check of the preprocessing as well; report and pictures off.
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

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, for all that is started here)

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


def vit_b(path: Path) -> None:
    """Write a ViT-B/16 of random weights, in torch's own layers."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, tokens, width = x.shape
            packed = self.qkv(self.norm1(x)).reshape(-1, tokens, 3, self.heads, width // self.heads)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
            attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            x = x + self.proj((attention @ v).transpose(1, 2).reshape(-1, tokens, width))
            hidden: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
            return x + hidden

    class Network(nn.Module):
        def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 16, 16)
            self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            self.position = nn.Parameter(torch.randn(1, 197, width) * 0.02)
            self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
            self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 1000)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.patches(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
            return logits

    torch.manual_seed(0)
    torch.onnx.export(
        Network().eval(),
        (torch.zeros(2, 3, 224, 224),),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )


def ours(model: str, calib: str, images: int, quantizer: str, output: str) -> list[str]:
    """The command that quantizes with the defaults of a quantizer."""
    command = [sys.executable, "-m", "ptq_onnx", "quantize", model, "--calib", calib]
    command += ["--images", str(images), "--quantizer", quantizer, "--output", output]
    return [*command, "--preprocess", "inception", "--no-report", "--no-pictures"]


def compare(model: str, calib: str, images: int, quantizers: list[str], repeat: int) -> None:
    """Print the seconds and megabytes of the quantizers and of the peer, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: ours(model, calib, images, name, f"{folder}/{name}") for name in quantizers}
        peer = [sys.executable, "-c", PEER, model, calib, str(images), f"{folder}/peer.onnx"]
        jobs["onnxruntime min-max"] = peer
        rounds = [{name: run(command) for name, command in jobs.items()} for _ in range(repeat)]
    for name in jobs:
        seconds = statistics.median(r[name][0] for r in rounds)
        memory = max(r[name][1] for r in rounds)
        ratio = statistics.median(r[name][0] / r["onnxruntime min-max"][0] for r in rounds)
        part = statistics.median(r[name][1] / r["onnxruntime min-max"][1] for r in rounds)
        print(f"{name}: {seconds:.1f} s ({ratio:.2f}x), {memory:.0f} MB ({part:.2f}x)", flush=True)


def main() -> None:
    """Print seconds, megabytes and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("vit-b", "vit-ti"))
    parser.add_argument("--quantizers", nargs="+", default=["deploy", "fqvit"])
    options = parser.parse_args()
    calib = str(options.data / "imagenet/calib")
    if options.only != "vit-ti":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vit_b.onnx"
            vit_b(path)
            print(f"ViT-B/16, random weights, 64 images (median of {options.repeat}):")
            compare(str(path), calib, 64, options.quantizers, options.repeat)
    if options.only == "vit-b":
        return
    model = str(options.data / "models/vit_tiny_patch16_224.opset14.onnx")
    print(f"ViT-Ti, 128 images (median of {options.repeat}):")
    compare(model, calib, 128, options.quantizers, options.repeat)
    with tempfile.TemporaryDirectory() as folder:
        for quantizer in options.quantizers:
            for images in (64, 256):
                seconds, memory = run(ours(model, calib, images, quantizer, f"{folder}/out"))
                print(f"{quantizer}, {images} images: {seconds:.1f} s, {memory:.0f} MB")


if __name__ == "__main__":
    main()
