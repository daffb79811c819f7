"""Where int8 does not pay: one sentence for each reason, and none without one."""

from __future__ import annotations

import pytest

from ptq_onnx.benchmarking.advice import advice
from ptq_onnx.benchmarking.cpu import flags, multiplies_int8
from ptq_onnx.benchmarking.results import Timing

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


def test_cpu_without_int8_products() -> None:
    (note,) = advice(FAST, runtime="openvino", on_gpu=False, cpu=OLD)
    assert "VNNI" in note
    assert "--bits 7/8/8" in note


def test_cuda_provider() -> None:
    (note,) = advice(FAST, runtime="onnxruntime", on_gpu=True, cpu=VNNI)
    assert "no int8 products" in note
    assert "--runtime tensorrt" in note


def test_small_batches_on_a_gpu() -> None:
    many = [timing("f", 1, quantized=False, batch=1), *(timing("q", 2, batch=b) for b in (1, 4, 8))]
    (note,) = advice(many, runtime="tensorrt", on_gpu=True, cpu=VNNI)
    assert note.startswith("Batch 1, 4 on a GPU")


def test_a_quantized_file_that_is_not_faster() -> None:
    slow = [timing("f", 1, quantized=False), timing("q", 0.9), timing("p", 1.2)]
    (note,) = advice(slow, runtime="onnxruntime", on_gpu=False, cpu=VNNI)
    assert note == "int8 does not pay here: q at batch 8 is 0.90× as fast as f."
    slow.append(timing("q", 0.1, half=True))
    assert len(advice(slow, runtime="onnxruntime", on_gpu=False, cpu=VNNI)) == 1
    alone = [timing("q", 1)]
    assert advice(alone, runtime="onnxruntime", on_gpu=False, cpu=VNNI) == []


def test_half_precision_that_is_as_fast() -> None:
    def told(speedup: float, batch: int = 8) -> list[str]:
        half = timing("f", speedup, quantized=False, half=True, batch=batch)
        return advice([*FAST, half], runtime="openvino", on_gpu=False, cpu=VNNI)

    assert told(1.9) == []
    assert told(2.5, batch=1) == []  # no int8 file was timed there
    (note,) = told(2.5)
    assert note == "At batch 8, f in fp16 (2.50×) is as fast as the best int8 file, q (2.00×)."


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
