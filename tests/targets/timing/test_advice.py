"""Where int8 does not pay: one sentence for each reason, and none without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptq_onnx.targets.timing.advice import advice
from ptq_onnx.targets.timing.cpu import flags, multiplies_int8
from ptq_onnx.targets.timing.results import Timing

VNNI = frozenset(("avx2", "avx512_vnni"))
OLD = frozenset(("avx2", "avx512f"))


def timing(
    model: str, speedup: float, *, quantized: bool = True, batch: int = 8, half: bool = False
) -> Timing:
    precision = "fp16" if half else "as written"
    return Timing(model, model, quantized, 10, batch, precision, 5, 100 / speedup, 1, 2, 3, speedup)


FAST = [timing("f", 1, quantized=False), timing("q", 2)]


def test_no_advice_where_int8_pays() -> None:
    assert advice(FAST, runtime="onnxruntime", on_gpu=False, cpu=VNNI) == []
    assert advice(FAST, runtime="tensorrt", on_gpu=True, cpu=OLD) == []
    assert advice(FAST, runtime="onnxruntime", on_gpu=False, cpu=frozenset()) == []


def test_no_advice_without_a_quantized_file() -> None:
    floats = [timing("f", 1, quantized=False, batch=1), timing("g", 0.5, quantized=False, batch=1)]
    assert advice(floats, runtime="onnxruntime", on_gpu=True, cpu=OLD) == []


LITTLE = [timing("f", 1, quantized=False), timing("q", 1.01)]


def test_cpu_without_int8_products() -> None:
    note, _ = advice(LITTLE, runtime="openvino", on_gpu=False, cpu=OLD)
    assert "VNNI" in note
    assert "gain little" in note
    assert "--bits 7/8/8" in note
    (note,) = advice(FAST, runtime="openvino", on_gpu=False, cpu=OLD)
    assert "may overflow" in note
    assert "gain little" not in note  # 2.00× stands in the table


def test_cuda_provider() -> None:
    note, _ = advice(LITTLE, runtime="onnxruntime", on_gpu=True, cpu=VNNI)
    assert "no int8 products" in note
    assert "--runtime tensorrt" in note
    assert advice(FAST, runtime="onnxruntime", on_gpu=True, cpu=VNNI) == []
    assert len(advice(FAST[1:], runtime="onnxruntime", on_gpu=True, cpu=VNNI)) == 1


def test_small_batches_on_a_gpu() -> None:
    first = timing("f", 1, quantized=False, batch=1)
    many = [first, *(timing("q", s, batch=b) for s, b in ((1.0, 1), (0.9, 4), (2.0, 8)))]
    note = advice(many, runtime="tensorrt", on_gpu=True, cpu=VNNI)[0]
    assert note.startswith("Batch 1, 4 on a GPU")
    assert advice([first, many[3]], runtime="tensorrt", on_gpu=True, cpu=VNNI) == []


def test_a_quantized_file_that_is_not_faster() -> None:
    slow = [timing("f", 1, quantized=False), timing("q", 0.9), timing("p", 1.2)]
    (note,) = advice(slow, runtime="onnxruntime", on_gpu=False, cpu=VNNI)
    assert note == "int8 does not pay here: q at batch 8 is slower than f (0.90×)."
    slow.append(timing("q", 0.1, half=True))
    assert len(advice(slow, runtime="onnxruntime", on_gpu=False, cpu=VNNI)) == 1
    alone = [timing("q", 1)]
    assert advice(alone, runtime="onnxruntime", on_gpu=False, cpu=VNNI) == []


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (0.90, "slower than f (0.90×)"),
        (0.94, "slower than f (0.94×)"),
        (0.97, "about as fast as f (0.97×)"),
        (1.01, "about as fast as f (1.01×)"),
        (1.06, None),
    ],
)
def test_words_fit_the_figure(speedup: float, said: str | None) -> None:
    notes = advice(
        [timing("f", 1, quantized=False), timing("q", speedup)],
        runtime="onnxruntime",
        on_gpu=False,
        cpu=VNNI,
    )
    assert [said in note for note in notes] == ([] if said is None else [True])
    assert all(("does not pay" in note) == (speedup < 1 / 1.05) for note in notes)


def test_the_first_file_is_not_measured_against_itself() -> None:
    """At every batch size; nor is the same file under another name."""
    first = [timing("q", 1, batch=b) for b in (1, 8)]
    assert advice(first, runtime="onnxruntime", on_gpu=False, cpu=VNNI) == []
    twin = replace(timing("p", 0.9), same_as="q")
    assert advice([*first, twin], runtime="onnxruntime", on_gpu=False, cpu=VNNI) == []


def test_half_precision_that_is_as_fast() -> None:
    def told(speedup: float, batch: int = 8) -> list[str]:
        half = timing("f", speedup, quantized=False, half=True, batch=batch)
        return advice([*FAST, half], runtime="openvino", on_gpu=False, cpu=VNNI)

    assert told(1.9) == []
    assert told(2.5, batch=1) == []  # no int8 file was timed there
    (note,) = told(2.5)
    assert note == "At batch 8, f in fp16 (2.50×) is faster than the best int8 file, q (2.00×)."
    (note,) = told(2.05)
    assert "(2.05×) is about as fast as the best int8 file, q (2.00×)" in note


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Old\nflags\t\t: fpu avx2 avx512f\nbugs : avx512_vnni\n", False),
        ("processor: 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags : fpu avx_vnni\n", True),
        ("flags : amx_int8\n", True),
        ("Features\t: fp asimd asimddp\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor : 0\n", None),
    ],
)
def test_what_the_cpu_can_do(text: str, expected: bool | None) -> None:
    assert multiplies_int8(flags(text)) is expected
