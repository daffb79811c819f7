"""Torch functions for ops that PPQ lacks or gets wrong, and for codes that it does not know.

A handler takes the node's attributes and its input tensors, and returns the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ptq_onnx.numerics.around.token_mean import TOKENS
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import fake_quantize as in_numpy
from ptq_onnx.numerics.spec import TensorSpec

Tensor = torch.Tensor
Handler = Callable[[Mapping[str, Any], Sequence[Tensor]], Any]

TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Torch's types by the number of ONNX's TensorProto.DataType."""


def fake_quantize(x: Tensor, spec: TensorSpec) -> Tensor:
    """Quantized and dequantized values. Of plain uniform codes in torch, where a gradient passes
    straight through the rounding and is zero where values are clipped; of all others as NumPy
    computes them."""
    rule = spec.rule
    if not isinstance(rule.code, Uniform) or rule.around:
        found = in_numpy(x.detach().cpu().numpy(), spec)
        return torch.from_numpy(found).to(x.device)
    numbers = spec.numbers(tuple(x.shape))
    scale, zero = (torch.as_tensor(v, device=x.device) for v in (numbers.scale, numbers.zero_point))
    if spec.factor is not None:
        x = x / torch.as_tensor(spec.factor, device=x.device)
    units = x / scale
    rounded = units + (torch.round(units) - units).detach()
    values = (torch.clamp(rounded + zero, *rule.limits) - zero) * scale
    return values if spec.factor is None else values * torch.as_tensor(spec.factor, device=x.device)


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


def _relu(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    return torch.relu(values[0])


TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _conv_transpose(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    """All that it makes, less the pads, which PPQ takes off the wrong sides."""
    x, weight, *bias = values
    sides = x.ndim - 2
    stride = tuple(attributes.get("strides") or [1] * sides)
    made: Tensor = TRANSPOSED[x.ndim](
        x,
        weight,
        bias[0] if bias else None,
        stride=stride,
        output_padding=tuple(attributes.get("output_padding") or [0] * sides),
        groups=int(attributes.get("group", 1)),
        dilation=tuple(attributes.get("dilations") or [1] * sides),
    )
    pads = list(attributes.get("pads") or [0] * (2 * sides))
    auto, wanted = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
    if wanted is not None:  # of an odd number the larger part at the end, or at the start
        total = [size - int(w) for size, w in zip(made.shape[2:], wanted[-sides:], strict=True)]
        less = [t // 2 for t in total]
        more = [t - half for t, half in zip(total, less, strict=True)]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    for side in range(sides):
        begin, end = pads[side], pads[side + sides]
        made = made.narrow(side + 2, begin, made.shape[side + 2] - begin - end)
    return made


INTERPOLATIONS = {
    ("nearest", "asymmetric"): ("nearest", None),
    ("linear", "half_pixel"): ("bilinear", False),
    ("linear", "pytorch_half_pixel"): ("bilinear", False),
    ("linear", "align_corners"): ("bilinear", True),
    ("cubic", "half_pixel"): ("bicubic", False),
    ("cubic", "pytorch_half_pixel"): ("bicubic", False),
    ("cubic", "align_corners"): ("bicubic", True),
}
"""Torch's mode, and whether corners are aligned, by Resize's mode and coordinates."""
CUBIC = -0.75
"""Torch's coefficient."""


def _kind(attributes: Mapping[str, Any]) -> tuple[str, str]:
    """Mode and coordinates of a Resize."""
    where = attributes.get("coordinate_transformation_mode", "half_pixel")
    return str(attributes.get("mode", "nearest")), str(where)


def knows_resize(attributes: Mapping[str, Any]) -> bool:
    """True for a form of Resize that torch has."""
    kind = _kind(attributes)
    plain = not attributes.get("antialias", 0) and not attributes.get("exclude_outside", 0)
    floor = attributes.get("nearest_mode", "round_prefer_floor") == "floor"
    cubic = abs(float(attributes.get("cubic_coeff_a", CUBIC)) - CUBIC) < 1e-6
    fits = floor if kind[0] == "nearest" else cubic or kind[0] != "cubic"
    return plain and fits and kind in INTERPOLATIONS


def resize(attributes: Mapping[str, Any], values: Sequence[Tensor]) -> Tensor:
    """Of height and width, in a form that ``knows_resize``."""
    mode, corners = INTERPOLATIONS[_kind(attributes)]
    scales = values[2] if len(values) > 2 and values[2] is not None else None
    size, factor = None, None
    if scales is not None and scales.numel():
        factor = tuple(float(s) for s in scales.tolist()[-2:])
    else:
        size = tuple(int(s) for s in values[3].tolist()[-2:])
    made: Tensor = F.interpolate(values[0], size, factor, mode, corners)
    return made


HANDLERS: dict[str, Handler] = {
    "Cast": _cast,
    "Concat": _concat,
    "ConvTranspose": _conv_transpose,
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
    "Relu": _relu,
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
