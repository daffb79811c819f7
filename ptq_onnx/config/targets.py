"""What each target takes: the numbers, the form of the graph, and who may quantize for it.

A target is data. Config, equalisation, the quantizers and the exporter read it; none of them
asks for a target's name. The rules that a finished file must obey are in ``targets/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_onnx.config.bits import BYTE, WIDEST

Stored = Literal["uint8", "int8", "uint16", "int16"]


@dataclass(frozen=True)
class Target:
    """One runtime, as the quantizer ``deploy`` and the equalisation before it see it."""

    name: str
    quantizer: str
    """The default quantizer."""
    refuses: str = ""
    """Why all other quantizers are refused; empty where they work."""
    opsets: range = range(21, 24)
    opset: int = 21
    """The default opset."""
    symmetric: bool = False
    """Inputs of Conv and linears have zero point 0 and a sign."""
    symmetric_attention: bool = False
    """So have q, k and v."""
    signed_attention: bool = False
    """Attention maps too: 1/127 is their step, not 1/255."""
    signed_stored: Stored = "uint8"
    """Type of signed activation codes of 8 bits in the file; in uint8 they are stored 128
    higher, in uint16 32768."""
    widest: int = BYTE
    """The most bits of an activation."""
    rows: bool = True
    """Every row of an attention map is divided by its largest value at run time."""
    centred_values: bool = False
    """v may be quantized without its mean over the tokens of the image, which is added to A·V."""
    eight_bit_floats: bool = False
    """It computes products of FP8 E4M3."""
    quantized_residuals: bool = False
    """A residual add takes its skip input in int8, where asked for."""
    half_floats: bool = False
    """The float part may have 16 bits, where asked for."""
    sixteen_bit_sums: bool = False
    """On x86 CPUs without VNNI its products of bytes are added up in 16 bits, two by two."""
    run_time_ranges: bool = False
    """It finds the range of an activation itself, where asked for."""
    convolutions: bool = False
    """A Conv with a float output is computed in int8 (ONNX Runtime 1.31 leaves it in float)."""
    patches_as_linear: bool = True
    """The patch embedding as a matrix product, where a Conv would stay float."""
    codes_of_convolutions: bool = False
    """The only integer convolution gives codes: every output of a Conv is quantized."""
    split_qkv: bool = True
    """q, k and v as linears of their own."""
    keep_rank: bool = True
    """The head on [batch, 1, C], where a product of two axes would stay float."""
    widens_weights: bool = False
    """Codes of weights may be stored in 4 bits with a Cast to 8, which it folds when it loads."""
    all_codes: bool = False
    """Every op takes codes and gives codes: it has no float part."""
    narrow_second: bool = False
    """The second factor of a product of activations counts with 8 bits, whatever its codes have."""
    fixed_batch: bool = False
    """Its files hold one batch size."""
    kernel_forms: bool = False
    """Its files have the forms that ONNX Runtime's kernels are fastest with
    (``qdq/kernel_forms.py``)."""
    turned_codes: bool = False
    """It swaps the last axes of a product's second factor for nothing behind its codes
    (``qdq/turned_codes.py``)."""

    def refusal(self, quantizer: str) -> str | None:
        """Why a quantizer is refused; None for one that works."""
        return self.refuses if self.refuses and quantizer != self.quantizer else None

    def stored(self, signed: bool) -> Stored:
        """Type of activation codes of 8 bits in the file."""
        return self.signed_stored if signed else "uint8"


_PRODUCTS_ONLY = (
    "it puts Q/DQ around ops that {} computes in float, which only slows them down; use"
    " --quantizer deploy"
)

_NO_INTEGERS = (
    "it has no integer arithmetic of LayerNorm, softmax and residuals; use --quantizer fqvit"
)

_ONE_STEP = (
    "the NPU takes one scale per activation and no op between its codes and the next; use"
    " --quantizer deploy"
)

LATER = range(20, 24)
"""From opset 21 on ONNX Runtime 1.31 refuses signed codes behind a Transpose (see ``lowering``);
such a file is no worse for its own runtime, but cannot be compared in ONNX Runtime."""

ONNXRUNTIME = Target(
    "onnxruntime",
    quantizer="deploy",
    widest=WIDEST,
    codes_of_convolutions=True,
    sixteen_bit_sums=True,
    run_time_ranges=True,
    kernel_forms=True,
    widens_weights=True,
)
TENSORRT = Target(
    "tensorrt",
    opsets=LATER,
    opset=20,
    quantizer="deploy",
    refuses=_PRODUCTS_ONLY.format("TensorRT"),
    symmetric=True,
    symmetric_attention=True,
    signed_attention=True,
    signed_stored="int8",
    rows=False,
    centred_values=True,
    eight_bit_floats=True,
    quantized_residuals=True,
    half_floats=True,
    convolutions=True,
    patches_as_linear=False,
    split_qkv=False,
    keep_rank=False,
)
OPENVINO = Target(
    "openvino",
    opsets=LATER,
    opset=20,
    quantizer="deploy",
    refuses=_PRODUCTS_ONLY.format("OpenVINO"),
    symmetric_attention=True,
    signed_stored="int8",
    convolutions=True,
    patches_as_linear=False,
    keep_rank=False,
    turned_codes=True,
)
INTEGER = Target(
    "integer",
    quantizer="fqvit",
    refuses=_NO_INTEGERS,
    widest=WIDEST,
    patches_as_linear=False,
    keep_rank=False,
)

QNN = Target(
    "qnn",
    quantizer="deploy",
    refuses=_ONE_STEP,
    widest=WIDEST,
    rows=False,
    convolutions=True,
    patches_as_linear=False,
    keep_rank=False,
    all_codes=True,
    narrow_second=True,
    fixed_batch=True,
)

TARGETS = {target.name: target for target in (ONNXRUNTIME, TENSORRT, OPENVINO, INTEGER, QNN)}


def named(name: str) -> Target:
    """The target of that name."""
    return TARGETS[name]
