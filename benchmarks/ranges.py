"""How often unseen images pass a calibrated range: what ``robust`` promises and what holds.

    python benchmarks/ranges.py MODEL --calib DIR --val DIR [--preprocess imagenet]

The ranges of all activations are taken from the calibration images by ``minmax`` and ``robust``;
then every image of ``--val`` is run. Printed by role: how many images of a thousand pass the range
of a tensor, of its two sides the one that more do. ``robust`` aims at 1000 / (8 N) for N images.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from ptq_onnx.calibration.methods import FROM_EXTREMES, collect
from ptq_onnx.calibration.robust import HORIZON
from ptq_onnx.calibration.statistics import _by_image, open_taps, tap
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.preparation.prepare import prepare

METHODS = ("minmax", "robust")
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--preprocess", default="imagenet")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    found = prepare(given.model)
    size = found.model.graph.inputs[0].shape[2]  # type: ignore[index]
    preprocess = Preprocess.named(given.preprocess, int(size))  # type: ignore[arg-type]
    seen = open_images(given.calib, preprocess, limit=given.images)
    unseen = open_images(given.val, preprocess)
    sites = [s for s in found.sites.values() if not s.is_parameter and s.role != "input"]
    batches = list(seen.batches(BATCH))
    stats = collect(found.model, sites, batches, threads=given.threads)
    bounds = {
        (method, s.tensor): [
            tuple(float(b[0]) for b in FROM_EXTREMES[method](stats.channels[s.tensor].pooled()))
        ]
        for method in METHODS
        for s in sites
    }
    tapped, names = tap(found.model, sites)
    session, feed, _ = open_taps(tapped, [], given.threads)
    wanted = [name for s in sites for name in names[s.tensor][:2]]
    passed: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for batch in unseen.batches(BATCH):
        values = dict(zip(wanted, session.run(wanted, {feed: batch}), strict=True))
        for s in sites:
            low, high = (values[name] for name in names[s.tensor][:2])
            lowest = _by_image(low, len(batch), np.min).min(axis=1)
            highest = _by_image(high, len(batch), np.max).max(axis=1)
            for method in METHODS:
                ((first, last),) = bounds[method, s.tensor]
                passed[method, s.tensor] += [(lowest < first).sum(), (highest > last).sum()]
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for s in sites:
        for method in METHODS:
            rate = 1000 * float(passed[method, s.tensor].max()) / len(unseen)
            for role in (s.role, "all"):
                rates[role][method].append(rate)
    print(f"{given.model.name}: {given.images} images seen, {len(unseen)} not")
    print(f"of a thousand images pass (robust aims at {1000 / HORIZON / given.images:.2f}):")
    for role in sorted(rates, key=lambda name: (name == "all", name)):
        text = ", ".join(
            f"{m} {np.mean(r):.2f} (worst tensor {max(r):.1f})" for m, r in rates[role].items()
        )
        print(f"  {role:12} {len(rates[role]['minmax']):3} tensors: {text}")


if __name__ == "__main__":
    main()
