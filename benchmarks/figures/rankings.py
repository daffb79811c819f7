"""The worst modules by layerwise error and by leave-one-out, on two disjoint sets of images.

    python benchmarks/figures/rankings.py --model VIT.onnx --calib DIR --quantizer vanilla

Leave-one-out is ranked by the gain of the features (last norm's output, all tokens): where
everything quantized leaves nothing of the logits, their gain is noise. Takes minutes.
"""

from __future__ import annotations

from subject import load, options, table

from ptq_onnx.analysis.results import Sensitivity, Switched
from ptq_onnx.analysis.sensitivity import sensitivity
from ptq_onnx.analysis.variants import Images

WORST, AMONG = 5, 8


def main() -> None:
    """Print both rankings, and how many of one set's worst five are in the other's worst eight."""
    parser = options(__doc__)
    parser.add_argument("--quantizer", default="vanilla")
    args = parser.parse_args()
    args.apart *= 2
    subject = load(args)
    p = subject.prepared
    specs = subject.quantizer(quantizer=args.quantizer).specs
    runs = [
        sensitivity(
            p.model, specs, p.blocks, p.sites, Images(subject.apart[half::2]), held_apart=True,
            apart=False, threads=subject.threads,
        )
        for half in (0, 1)
    ]  # fmt: skip
    for name in ("layerwise", "leave-one-out"):
        for scope in ("op", "kind"):
            ranked = [ranking(run, name, scope) for run in runs]
            rows = [
                [i + 1, *(f"{one[i][0]} ({one[i][1]:.2f} dB)" for one in ranked)]
                for i in range(min(AMONG, len(ranked[0])))
            ]
            print(f"\n{name}, {scope}s")
            table(("", "first images", "other images"), rows)
            sets = [[m for m, _ in one] for one in ranked]
            common = [len(set(a[:WORST]) & set(b[:AMONG])) for a, b in (sets, sets[::-1])]
            print(f"worst {WORST} among the other's worst {AMONG}: {common[0]} and {common[1]}")
    print(f"\n{runs[0].seconds:.0f} s and {runs[1].seconds:.0f} s")


def ranking(run: Sensitivity, name: str, scope: str) -> list[tuple[str, float]]:
    """Modules with their figure, worst first."""

    def gain(one: Switched) -> float:
        return (one.features_gain_db if one.features_gain_db is not None else one.gain_db) or 0.0

    if name == "layerwise":
        found = [(s.module, s.error.snr_db) for s in run.layerwise if _plain(s, scope)]
        return sorted(found, key=lambda pair: pair[1])
    found = [(s.module, gain(s)) for s in run.leave_one_out if _plain(s, scope)]
    return sorted(found, key=lambda pair: -pair[1])


def _plain(one: Switched, scope: str) -> bool:
    return one.scope == scope and one.part == "all"


if __name__ == "__main__":
    main()
