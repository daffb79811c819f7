"""Where int8 does not pay: what is known of the machine, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ptq_onnx.targets.timing.cpu import multiplies_int8
from ptq_onnx.targets.timing.results import Timing
from ptq_onnx.targets.timing.runner import AS_WRITTEN

SMALL_BATCH = 8
"""Below it a GPU mostly waits: for launches, and for weights that int8 makes only 4× smaller."""
LITTLE = 1.05
"""A speed-up below it is none, and one above its inverse no loss: runs differ by as much."""


def advice(
    timings: Sequence[Timing], *, runtime: str, on_gpu: bool, cpu: frozenset[str]
) -> list[str]:
    """One sentence for each reason why a quantized file gains little here; none: no entry.

    A reason why int8 does not pay is given only where the figures show that it does not.
    """
    written = [t for t in timings if t.precision == AS_WRITTEN]
    quantized = [t for t in written if t.quantized]
    if not quantized:
        return []
    first = written[0].path
    measured = [t for t in quantized if t.path != first and t.same_as is None]
    little = [t for t in measured if t.speedup < LITTLE]
    unknown = not measured  # one file alone: nothing says that it does pay
    notes = []
    if on_gpu and runtime == "onnxruntime" and (little or unknown):
        notes.append(
            "onnxruntime's CUDA provider has no int8 products for Q/DQ files: it computes them in"
            " float, with the conversions on top. TensorRT is the way to int8 on a GPU:"
            " --runtime tensorrt."
        )
    small = sorted({t.batch for t in (little or quantized) if t.batch < SMALL_BATCH})
    if on_gpu and small and (little or unknown):
        listed = ", ".join(map(str, small))
        notes.append(
            f"Batch {listed} on a GPU: so small a batch is bound by launches and memory, not by"
            f" products; int8 pays from about {SMALL_BATCH} images."
        )
    if not on_gpu and multiplies_int8(cpu) is False:
        gain = ", gain little," if little or unknown else ""
        notes.append(
            f"This CPU has neither VNNI nor AMX: int8 products run in 16-bit steps{gain}"
            " and may overflow. Quantize with --bits 7/8/8 (weights of reduced range) for it."
        )
    notes += [_little(t, written[0].model) for t in little]
    for h in timings:
        rivals = [t for t in quantized if t.batch == h.batch]
        if h.precision == AS_WRITTEN or h.quantized or not rivals:
            continue
        best = max(rivals, key=lambda t: t.speedup)
        if h.speedup * LITTLE >= best.speedup:
            faster = h.speedup >= best.speedup * LITTLE
            notes.append(
                f"At batch {h.batch}, {h.model} in {h.precision} ({h.speedup:.2f}×) is"
                f" {'faster than' if faster else 'about as fast as'} the best int8 file,"
                f" {best.model} ({best.speedup:.2f}×)."
            )
    return notes


def _little(t: Timing, first: str) -> str:
    """What a file gains that gains nothing, in words that fit the figure."""
    if t.speedup * LITTLE > 1:
        return (
            f"int8 gains nothing here: {t.model} at batch {t.batch} is about as fast as {first}"
            f" ({t.speedup:.2f}×)."
        )
    return (
        f"int8 does not pay here: {t.model} at batch {t.batch} is slower than {first}"
        f" ({t.speedup:.2f}×)."
    )
