"""Where int8 does not pay: what is known of the machine, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ptq_onnx.benchmarking.cpu import multiplies_int8
from ptq_onnx.benchmarking.results import Timing
from ptq_onnx.benchmarking.runner import AS_WRITTEN

SMALL_BATCH = 8
"""Below it a GPU mostly waits: for launches, and for weights that int8 makes only 4× smaller."""
LITTLE = 1.05
"""A speed-up below it is none."""


def advice(
    timings: Sequence[Timing], *, runtime: str, on_gpu: bool, cpu: frozenset[str]
) -> list[str]:
    """One sentence for each reason why a quantized file gains little here; none: no entry."""
    written = [t for t in timings if t.precision == AS_WRITTEN]
    quantized = [t for t in written if t.quantized]
    if not quantized:
        return []
    notes = []
    if on_gpu and runtime == "onnxruntime":
        notes.append(
            "onnxruntime's CUDA provider has no int8 products for Q/DQ files: it computes them in"
            " float, with the conversions on top. TensorRT is the way to int8 on a GPU:"
            " --runtime tensorrt."
        )
    small = sorted({t.batch for t in quantized if t.batch < SMALL_BATCH})
    if on_gpu and small:
        listed = ", ".join(map(str, small))
        notes.append(
            f"Batch {listed} on a GPU: so small a batch is bound by launches and memory, not by"
            f" products; int8 pays from about {SMALL_BATCH} images."
        )
    if not on_gpu and multiplies_int8(cpu) is False:
        notes.append(
            "This CPU has neither VNNI nor AMX: int8 products run in 16-bit steps, gain little,"
            " and may overflow. Quantize with --bits 7/8/8 (weights of reduced range) for it."
        )
    for t in quantized:
        if t is not written[0] and t.speedup < LITTLE:
            notes.append(
                f"int8 does not pay here: {t.model} at batch {t.batch} is {t.speedup:.2f}× as"
                f" fast as {written[0].model}."
            )
    for h in timings:
        rivals = [t for t in quantized if t.batch == h.batch]
        if h.precision == AS_WRITTEN or h.quantized or not rivals:
            continue
        best = max(rivals, key=lambda t: t.speedup)
        if h.speedup >= best.speedup:
            notes.append(
                f"At batch {h.batch}, {h.model} in {h.precision} ({h.speedup:.2f}×) is as fast as"
                f" the best int8 file, {best.model} ({best.speedup:.2f}×)."
            )
    return notes
