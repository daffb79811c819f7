"""Below eight bits: top-1 and SQNR of ``lowbit`` by bit widths and calibration draws, or by
ingredient.

    python benchmarks/lowbit.py --data ../shared [--models vit,deit] [--seeds 3] [--rows "4/4/4"]
    python benchmarks/lowbit.py --data ../shared --rows 4/4/4 --images 64 --calib psaq
    python benchmarks/lowbit.py --data ../shared --ablation [--trained] [--images 64] [--tested 200]

Each seed draws its calibration images from the folder; each figure is that of the exported file
in ONNX Runtime, optimizations on. ``--ablation`` takes one ingredient away at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from accuracy import MODELS

from ptq_onnx.config.fields import Fields
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine import learned
from ptq_onnx.equalization import attention_steps, channel_steps
from ptq_onnx.evaluation.evaluate import logits
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.synthetic import DRAWN
from ptq_onnx.numerics import range_search
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.rounding import descended, gptq, nearest
from ptq_onnx.numerics.weights import weight_scale
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.quantizers import block_training, importance, reconstruction, stream_weights
from ptq_onnx.quantizers.lowbit import LowBit

ROWS: dict[str, dict[str, Any]] = {
    "6/6/6": {"bits": "6/6/6"},
    "4/8/8": {"bits": "4/8/8"},
    "4/4/4": {"bits": "4/4/4"},
    "4/4/4, narrow ends": {"bits": "4/4/4", "wide_ends": False},
    "3/3/3": {"bits": "3/3/3"},
    "4/4/4, trained": {"bits": "4/4/4", "reconstruct": True},
    "3/3/3, trained": {"bits": "3/3/3", "reconstruct": True},
    "4 MP": {"bits": "4/4/4", "mixed": True},
    "4 MP, trained": {"bits": "4/4/4", "mixed": True, "reconstruct": True},
    "4 MP by layer": {"bits": "4/4/4", "mixed": True, "mixed_by": "layer"},
    "4 MP by nuclear norm": {"bits": "4/4/4", "mixed": True, "mixed_by": "nuclear"},
    "6 MP": {"bits": "6/6/6", "mixed": True},
    "3 MP": {"bits": "3/3/3", "mixed": True},
}
"""Options by title; MP: widths mixed, of the same mean (8 MP would be 8/8/8: none has more)."""


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _unturned(width: int, seed: int = 0) -> Any:
    return np.eye(width)


def _nearest(weight: Any, moments: Any, bits: int) -> Any:
    scale = weight_scale(weight, 1, bits, power=np.diag(moments).copy())
    return scale, _middle(scale, bits), nearest(weight, scale, bits)


def _symmetric(weight: Any, moments: Any, bits: int) -> Any:
    scale = weight_scale(weight, 1, bits, power=np.diag(moments).copy())
    codes = descended(weight, scale, moments, bits, gptq(weight, scale, moments, bits))
    return scale, _middle(scale, bits), codes


def _middle(scale: Any, bits: int) -> Any:
    return np.full(scale.shape, 1 << bits - 1, np.int32)


def _same(x: Any, spec: Any) -> Any:
    return x


COLUMNS = ((stream_weights, "WIDEST", 0), (channel_steps, "WIDEST", 0))
"""Weights of all widths as those of 5 to 7 bits."""
INGREDIENTS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "all": (),
    "all positions count the same": ((importance, "EVENLY", 1.0),),
    "ranges that cover the sample": ((range_search, "FACTORS", (1.0,)),),
    "q, k, v not turned": ((attention_steps, "even", _unturned),),
    "proj's input with one range": ((attention_steps.AttentionSteps, "product", _nothing),),
    "uniform maps": ((LowBit, "map_code", Uniform()),),
    "uniform behind GELU": ((LowBit, "hidden_code", Uniform()),),
    "the stream turned as drawn": ((QuantizeConfig, "learns_turns", property(lambda self: False)),),
    "the stream not turned": ((Fields, "rotates", property(lambda self: False)),),
    "a step for each column of a weight": COLUMNS,
    "… to the nearest": (*COLUMNS, (stream_weights, "gptq_ranged", _nearest)),
    "… without a zero point": (*COLUMNS, (stream_weights, "gptq_ranged", _symmetric)),
    "weights on the float stream": (
        (stream_weights, "quantized_around", lambda node, specs, kernels: frozenset()),
        (stream_weights, "fake_quantize", _same),
    ),
    "means not corrected": ((stream_weights, "own_bias", _nothing),),
}
"""What is put in place of what, by the name of what is then missing."""


def _rates(*kinds: str) -> dict[str, float]:
    return {kind: rate for kind, rate in learned.RATES.items() if kind in kinds}


TRAINING: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "all, trained": (),
    "biases, γ and β alone": ((learned, "RATES", _rates("affine")),),
    "weights not learned": ((learned, "RATES", _rates("affine", "steps")),),
    "errors count the same everywhere": (
        (reconstruction.Reconstruction, "_weights", lambda self, feed: {}),
    ),
    "nothing dropped": ((block_training, "DROPPED", 0.0),),
}
"""The same of ``--reconstruct``."""


@contextlib.contextmanager
def without(ingredient: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, name, other in {**INGREDIENTS, **TRAINING}[ingredient]:
            stack.enter_context(patch.object(place, name, other))
        yield


def measured(
    name: str, options: dict[str, Any], arguments: argparse.Namespace, seed: int
) -> tuple[float, float, float]:
    """Top-1, SQNR in dB, and seconds of CPU to quantize, with the calibration images of a seed."""
    file, preprocess = MODELS[name]
    path, data = arguments.data / "models" / file, arguments.data / "imagenet"
    config = QuantizeConfig(
        quantizer="lowbit",
        preprocess=preprocess,
        images=arguments.images,
        analysis_images=1,
        report=False,
        check_preprocess=False,
        threads=arguments.threads,
        seed=seed if arguments.calib else None,
        **options,
    )
    files = sorted(p for p in (data / "calib").iterdir() if p.is_file())
    order = np.random.default_rng(seed).permutation(len(files)) if seed else range(len(files))
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out", time.process_time()
        drawn = [str(files[i]) for i in order][: arguments.images]
        quantize(path, config=config, output=out, calib=arguments.calib or drawn)
        seconds = time.process_time() - started
        source = open_images(data / "val", resolve_preprocess(path, config), limit=arguments.tested)
        truth = labels_for(source, data / "val.txt")
        real = float_logits(path, source, arguments.threads)
        found = logits(out / "quantized.onnx", source, threads=arguments.threads)
    noise = float(np.sum((found.astype(np.float64) - real) ** 2))
    top1 = 100 * float(np.mean(found.argmax(axis=1) == truth))
    return top1, 10 * float(np.log10(np.sum(real.astype(np.float64) ** 2) / noise)), seconds


HELD: dict[Path, Any] = {}
"""What the float models give for all images that are tested."""


def float_logits(path: Path, source: Any, threads: int) -> Any:
    if path not in HELD:
        HELD[path] = logits(path, source, threads=threads)
    return HELD[path]


def line(title: str, found: list[tuple[float, float, float]]) -> str:
    """Mean, and what the draws differ by."""
    top1, sqnr, seconds = (np.array(values) for values in zip(*found, strict=True))
    if len(found) > 1:
        spread = f" ± {top1.std(ddof=1):.1f} | {sqnr.mean():.2f} ± {sqnr.std(ddof=1):.2f}"
    else:
        spread = f" | {sqnr.mean():.2f}"
    return f"| {title} | {top1.mean():.1f}{spread} | {seconds.mean():.0f} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="vit,deit")
    parser.add_argument(
        "--seeds", type=int, default=1, help="calibration draws; the first in order"
    )
    parser.add_argument("--rows", default=None, help="only these rows, with ; between")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--calib", choices=tuple(DRAWN), help="in place of photographs")
    parser.add_argument("--tested", type=int, default=500)
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime decides")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--trained", action="store_true", help="--ablation: of --reconstruct")
    arguments = parser.parse_args()
    taken = TRAINING if arguments.trained else INGREDIENTS
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    titles = list(taken if arguments.ablation else ROWS)
    if arguments.rows:
        titles = [t for t in titles if t in arguments.rows.split(";")]
    for name in arguments.models.split(","):
        print(f"\n| {name} | top-1 % | SQNR dB | CPU s |\n|---|---|---|---|", flush=True)
        for title in titles:
            used: Callable[[], Any] = contextlib.nullcontext
            same = "4/4/4, trained" if arguments.trained else "4/4/4"
            options = ROWS[same if arguments.ablation else title]
            with without(title) if arguments.ablation else used():
                found = [measured(name, options, arguments, s) for s in seeds]
            print(line(title, found), flush=True)


if __name__ == "__main__":
    main()
