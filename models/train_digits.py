"""Train the embedded model: a small Vision Transformer on scikit-learn's handwritten digits.

    python models/train_digits.py

1,797 real 8×8 scans, enlarged to 32×32. A quarter of them, stratified, is held out and never seen
in training. Writes `models/digits_vit.onnx`, 128 training images for calibration, all held-out
images and their labels below `img/digits`, and prints the accuracy of the written file on the
written images. Takes a few minutes on two cores.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
SIZE, PATCH, CLASSES = 32, 4, 10
DIM, DEPTH, HEADS = 64, 6, 4
MASSIVE, MAGNITUDE = (5, 23), 8.0  # channels that start large, see VisionTransformer
EPOCHS, BATCH, RATE, DECAY = 20, 32, 1e-3, 0.05
SHIFT, SMOOTHING, CLIP = 2, 0.05, 1.0
HELD_OUT, CALIBRATION = 0.25, 128
PREPROCESS = Preprocess((0.5,) * 3, (0.5,) * 3, (SIZE, SIZE), crop_pct=1.0)

Pixels = NDArray[np.uint8]


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v packed in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q * (DIM // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, DIM))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """[B, 3, 32, 32] → logits [B, 10].

    Two channels of the position embedding start far above the others. Large models, trained for
    long, grow such channels in the residual stream, and they are what makes them hard to quantize.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2 + 1, DIM) * 0.2)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.head = nn.Linear(DIM, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.pos_embed[..., MASSIVE] += torch.tensor([MAGNITUDE, -MAGNITUDE])
            for module in self.modules():  # bring the other channels back to about one
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(4.0)
                    module.weight[list(MASSIVE)] = 0.25

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def digits() -> tuple[Pixels, NDArray[np.int64]]:
    """The scans as uint8 [N, 32, 32], enlarged from 8×8 with 17 gray levels, and their classes."""
    data = load_digits()
    small = (data.images * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in small]
    return np.stack([np.asarray(image) for image in large]), data.target.astype(np.int64)


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, 32, 32] → float32 [B, 3, 32, 32] in -1…1, as PREPROCESS does."""
    return (pixels.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def shifted(pixels: Tensor) -> Tensor:
    """Each image moved by up to SHIFT pixels, black coming in at the edges."""
    padded = nn.functional.pad(pixels, (SHIFT,) * 4)
    corners = torch.randint(0, 2 * SHIFT + 1, (len(pixels), 2)).tolist()
    return torch.stack(
        [image[y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, corners, strict=True)]
    )


def train(pixels: Pixels, classes: NDArray[np.int64]) -> VisionTransformer:
    """A trained model in evaluation mode; the same seed gives the same model up to rounding."""
    torch.manual_seed(SEED)
    model, images, truth = VisionTransformer(), torch.tensor(pixels), torch.tensor(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    loss_of = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    for epoch in range(EPOCHS):
        total = 0.0
        for indices in torch.randperm(len(images))[: steps // EPOCHS * BATCH].split(BATCH):
            loss = loss_of(model(to_input(shifted(images[indices]))), truth[indices])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  loss {total * EPOCHS / steps:.3f}", flush=True)
    return model.eval()


def write_model(model: VisionTransformer, path: Path) -> None:
    """Export through TorchScript at opset 17, with the preprocessing in the metadata."""
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, SIZE, SIZE),),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )
    proto = onnx.load(path)
    labels = ",".join(map(str, range(CLASSES)))
    onnx.helper.set_model_props(
        proto, {METADATA_KEY: PREPROCESS.to_json(), "ptq_onnx.labels": labels}
    )
    onnx.save(proto, path)


def write_images(folder: Path, pixels: Pixels, indices: NDArray[np.int64]) -> list[str]:
    """The images as PNG files named after their index; returns the names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [f"digit_{index:04d}.png" for index in indices]
    for name, index in zip(names, indices, strict=True):
        Image.fromarray(pixels[index]).save(folder / name, optimize=True)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT, help="root to write below")
    root = parser.parse_args().output
    (root / "models").mkdir(parents=True, exist_ok=True)
    pixels, classes = digits()
    fit, held_out = train_test_split(
        np.arange(len(pixels)), test_size=HELD_OUT, stratify=classes, random_state=SEED
    )
    start = time.perf_counter()
    model = train(pixels[fit], classes[fit])
    print(f"trained on {len(fit)} images in {time.perf_counter() - start:.0f} s")

    path, images = root / "models/digits_vit.onnx", root / "img/digits"
    write_model(model, path)
    chosen = np.random.default_rng(SEED).choice(fit, CALIBRATION, replace=False)
    write_images(images / "calib", pixels, np.sort(chosen))
    names = write_images(images / "val", pixels, np.sort(held_out))
    lines = [f"{n} {c}" for n, c in zip(names, classes[np.sort(held_out)], strict=True)]
    (images / "val.txt").write_text("\n".join(lines) + "\n")

    source = open_images(images / "val", PREPROCESS)
    result = evaluate(path, source, labels_for(source, images / "val.txt"), batch_size=64)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"test accuracy {result.top1:.2f} % on {result.count} held-out images")


if __name__ == "__main__":
    main()
