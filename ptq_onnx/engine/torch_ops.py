"""Torch functions for ops that PPQ lacks or gets wrong, and for codes that it does not know.

A handler takes the node's attributes and its input tensors, and returns the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ptq_onnx.calibration.mean_centred import TOKENS
from ptq_onnx.numerics.log2 import THRESHOLD, top_code
from ptq_onnx.numerics.spec import TensorSpec

Tensor = torch.Tensor
Handler = Callable[[Mapping[str, Any], Sequence[Tensor]], Any]

TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Torch's types by the number of ONNX's TensorProto.DataType."""


def fake_quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """Quantize and dequantize ``x`` by a spec with a factor, rows of their own or log2
    codes."""
    if spec.rule.code == "log2":
        return log2_fake_quantize(x, spec.rule.bits)
    if spec.rule.centred:
        # Of values rounded to the step, as in the file (qdq/lowering.py).
        step = torch.as_tensor(spec.scale, device=x.device)
        whole = torch.round(x * (1 / step)).sum(dim=TOKENS, keepdim=True)
        mean = whole * (step / x.shape[TOKENS])
        return dequantize(quantize(x - mean, spec), spec) + mean
    if spec.rule.granularity == "row":
        top = x.amax(dim=-1, keepdim=True)
        return dequantize(quantize(x / top, spec), spec) * top
    return dequantize(quantize(x, spec), spec)


def _parts(spec: TensorSpec, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and factor as tensors that broadcast against ``x``."""
    shape = [1] * x.ndim
    if spec.axis is not None:
        shape[spec.axis] = -1
    scale = torch.as_tensor(spec.scale, device=x.device)
    zero = torch.as_tensor(spec.zero_point, device=x.device)
    if spec.rule.block_size:
        size = spec.rule.block_size
        scale, zero = (v.repeat_interleave(size, 0)[: x.shape[0]] for v in (scale, zero))
    elif spec.axis is not None:
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    factor = torch.ones((), device=x.device)
    if spec.factor is not None:
        factor = torch.as_tensor(spec.factor, device=x.device)
    return scale, zero, factor


def quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """Codes (float tensor that holds integers, shape of ``x``)."""
    scale, zero, factor = _parts(spec, x)
    low, high = spec.rule.limits
    if spec.rule.code == "e4m3":
        held = torch.clamp(x / factor / scale, low, high)
        return held.to(torch.float8_e4m3fn).to(x.dtype)
    return torch.clamp(torch.round(x / factor / scale) + zero, low, high)


def dequantize(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Values of codes: (code - zero_point) · scale · factor."""
    scale, zero, factor = _parts(spec, codes)
    return (codes - zero) * scale * factor


def log2_fake_quantize(attention: Tensor, bits: int) -> Tensor:
    """2^-code of attention values (see quantizers/log2.py)."""
    top = top_code(bits)
    t = torch.round(1 / attention)
    code = torch.floor(torch.log2(t.double() * THRESHOLD)).clamp(0, top)
    return torch.where(code >= top, torch.zeros_like(code), torch.exp2(-code)).to(attention.dtype)


def _axes(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> list[int] | None:
    if len(values) > 1 and values[1] is not None:
        return [int(a) for a in values[1].tolist()]
    axes = attributes.get("axes")
    return None if axes is None else [int(a) for a in axes]


def _layer_norm(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, weight = values[0], values[1]
    bias = values[2] if len(values) > 2 else None
    axis = int(attributes.get("axis", -1)) % x.ndim
    return F.layer_norm(x, x.shape[axis:], weight, bias, float(attributes.get("epsilon", 1e-5)))


def _gelu(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return F.gelu(values[0], approximate=str(attributes.get("approximate", "none")))


def _quick_gelu(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x = values[0]
    return x * torch.sigmoid(float(attributes.get("alpha", 1.702)) * x)


def _silu(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return F.silu(values[0])


def _rms_norm(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, weight = values
    return F.rms_norm(x, x.shape[-1:], weight, float(attributes.get("epsilon", 0.0)))


def _l2_norm(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return F.normalize(values[0], dim=-1, eps=float(attributes.get("epsilon", 0.0)))


def _softmax(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return torch.softmax(values[0], dim=int(attributes.get("axis", -1)))


def _matmul(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    if attributes.get("centred"):  # what rounding A loses is no part of the mean of V
        mean = values[1].mean(dim=TOKENS, keepdim=True)
        return torch.matmul(values[0], values[1] - mean) + mean
    product = torch.matmul(values[0], values[1])
    if attributes.get("normalize_rows"):
        product = product / values[0].sum(dim=-1, keepdim=True)
    return product


def _shape(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    start, end = int(attributes.get("start", 0)), attributes.get("end")
    return torch.tensor(list(values[0].shape)[start:end], dtype=torch.int64)


def _slice(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, starts, ends = values[0], values[1].tolist(), values[2].tolist()
    given = [v is not None for v in values]
    axes = values[3].tolist() if len(values) > 3 and given[3] else range(len(starts))
    steps = values[4].tolist() if len(values) > 4 and given[4] else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # slice().indices clamps the huge and negative bounds that ONNX allows.
        picks = torch.arange(*slice(start, end, step).indices(x.shape[axis]), device=x.device)
        x = x.index_select(axis, picks)
    return x


def _gather(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, indices = values
    axis = int(attributes.get("axis", 0)) % x.ndim
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1).to(x.device)
    picked = x.index_select(axis, flat)
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _split(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
    x, axis = values[0], int(attributes.get("axis", 0))
    size = x.shape[axis]
    if len(values) > 1 and values[1] is not None:
        return list(torch.split(x, [int(v) for v in values[1].tolist()], dim=axis))
    parts = int(attributes["num_outputs"])
    return list(torch.split(x, math.ceil(size / parts), dim=axis))


def _reshape(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, shape = values[0], [int(v) for v in values[1].tolist()]
    if not attributes.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x.reshape(shape)


def _expand(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, shape = values[0], [int(v) for v in values[1].tolist()]
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


def _squeeze(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    axes = _axes(attributes, values)
    return values[0].squeeze() if axes is None else values[0].squeeze(dim=tuple(axes))


def _unsqueeze(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x, axes = values[0], _axes(attributes, values) or []
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    x = values[0]
    return x.permute(attributes.get("perm") or list(range(x.ndim))[::-1])


def _concat(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return torch.cat([v for v in values if v is not None], dim=int(attributes["axis"]))


def _cast(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return values[0].to(TYPES[int(attributes["to"])])


def _reduce(reduction: Callable[..., Tensor]) -> Handler:
    def run(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
        # ONNX takes an empty list of axes for none given.
        x, axes = values[0], _axes(attributes, values) or None
        if axes is None and attributes.get("noop_with_empty_axes", 0):
            return x
        dims = list(range(x.ndim)) if axes is None else axes
        return reduction(x, dim=dims, keepdim=bool(attributes.get("keepdims", 1)))

    return run


def _round(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return torch.round(values[0])


HANDLERS: dict[str, Handler] = {
    "Cast": _cast,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "L2Normalization": _l2_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "QuickGelu": _quick_gelu,
    "RMSNormalization": _rms_norm,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Round": _round,
    "Shape": _shape,
    "Silu": _silu,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
