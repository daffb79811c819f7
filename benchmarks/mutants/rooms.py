"""Which tests are asked about which room: the quick ones, which run in this process."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_NUMBERS = ("tests/numerics", "tests/quantizers")
_INTEGER = (
    "tests/targets/integer/test_integer_steps.py",
    "tests/targets/integer/test_integer_lowering.py",
    "tests/targets/integer/test_integer_reasons.py",
    "tests/targets/integer/test_conformance_integer.py",
    "tests/targets/integer/test_integer_interpreter.py",
    "tests/targets/integer/test_integer_ops.py",
    "tests/targets/integer/test_integer_ranges.py",
    "tests/targets/integer/test_integer_known_ranges.py",
    "tests/targets/integer/test_integer_known_ops.py",
    "tests/targets/integer/test_integer_plans.py",
    "tests/targets/integer/test_integer_claims.py",
    "tests/targets/integer/test_integer_targets.py",
)

ROOMS: dict[str, tuple[str, ...]] = {
    "numerics": (*_NUMBERS, "tests/calibration/test_methods.py", "tests/test_centring.py"),
    "calibration": (
        "tests/calibration",
        "tests/quantizers/test_scale_search.py",
        "tests/quantizers/test_uniform.py",
        "tests/pipeline/test_calibration_notes.py",
        "tests/test_centring.py",
    ),
    "equalization": (
        "tests/equalization",
        "tests/qdq/test_convolution.py",
        "tests/test_grouped_heads.py",
        "tests/quantizers/test_quantize_residual.py",
        "tests/quantizers/test_code_regions.py",
        "tests/quantizers/test_lowbit.py",
    ),
    "qdq": (
        "tests/qdq/test_convolution.py",
        "tests/qdq/test_factors.py",
        "tests/qdq/test_known_bounds.py",
        "tests/qdq/test_known_steps_behind.py",
        "tests/qdq/test_four_bits.py",
        "tests/qdq/test_half.py",
        "tests/qdq/test_kernel_forms.py",
        "tests/qdq/test_known_kernel_forms.py",
        "tests/qdq/test_lowering.py",
        "tests/qdq/test_known_lowering.py",
        "tests/qdq/test_known_nodes.py",
        "tests/numerics/test_row_maximum.py",
        "tests/numerics/test_token_mean.py",
        "tests/npu/test_units.py",
        "tests/npu/test_unit_types.py",
        "tests/npu/test_spelling.py",
        "tests/npu/test_options.py",
        "tests/quantizers/test_weight_only.py",
        "tests/quantizers/test_e4m3.py",
        "tests/quantizers/test_ptq4vit.py",
    ),
    "targets/integer": _INTEGER,
}


def files_of(room: str) -> list[Path]:
    """The room's modules, as paths from the root."""
    found = (ROOT / "ptq_onnx" / room).rglob("*.py")
    return sorted(path.relative_to(ROOT) for path in found if path.name != "__init__.py")
