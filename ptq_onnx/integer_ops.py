"""Integer LayerNorm and softmax inside the simulator (``--arithmetic integer``).

Torch int64 tensors compute what quantizers/integer.py states as formulas in NumPy; a test
holds both equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ptq_onnx.blocks import consumers, is_layout, name_of
from ptq_onnx.errors import ConfigError
from ptq_onnx.quantizers.integer import (
    EXP_B,
    EXP_C,
    EXP_FRACTION_BITS,
    EXP_SHIFT,
    IntegerLayerNorm,
    IntegerSoftmax,
)
from ptq_onnx.quantizers.log2 import log2_values, top_code
from ptq_onnx.spec import TensorSpec
from ptq_onnx.torch_ops import dequantize, quantize

Tensor = torch.Tensor
Override = Callable[[list[Tensor]], Tensor]


def integer_overrides(
    model: ir.Model, specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, Override], list[str]]:
    """Arithmetic of every LayerNorm and softmax between quantized tensors, by node name,
    and the names of those that stay in float because a tensor around them does.

    Raises ConfigError where an input's factors are no powers of two.
    """
    found: dict[str, Override] = {}
    left: list[str] = []
    for node in model.graph:
        if node.op_type not in ("LayerNormalization", "Softmax"):
            continue
        before = specs.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
        after = _spec_behind(node.outputs[0], specs)
        if before is None or after is None or before.rule.code != "uniform":
            left.append(name_of(node))
        elif node.op_type == "Softmax":
            found[name_of(node)] = SoftmaxOverride(before, after)
        else:
            found[name_of(node)] = LayerNormOverride(node, before, after)
    return found, left


def _spec_behind(value: ir.Value, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """The spec of a tensor, or of the one place behind layout ops where it is quantized."""
    spec = specs.get(str(value.name))
    readers = list(consumers(value))
    if spec is not None or len(readers) != 1 or not is_layout(readers[0][0]):
        return spec
    return _spec_behind(readers[0][0].outputs[0], specs)


def floor_divide(a: Tensor, b: Tensor) -> Tensor:
    """⌊a / b⌋ of int64 tensors with 0 ≤ a < 2^52 and b ≥ 1, by float64 division.

    Exact: a quotient below an integer is at least 1/b below it, a relative distance of more
    than 1/(a + b), which float64's rounding (2^-53) cannot bridge. Ten times faster than
    int64 division.
    """
    return torch.floor(a.double() / b.double()).to(torch.int64)


@dataclass(frozen=True)
class LayerNormOverride:
    """Integer LayerNorm of one node: floats on the grid in, floats on the grid out."""

    node: ir.Node
    before: TensorSpec
    after: TensorSpec

    def constants(self, channels: int) -> IntegerLayerNorm:
        """The numbers of the formula for inputs with that many channels."""
        alpha = np.zeros(channels, np.int64)
        if self.before.factor is not None:
            if self.before.alpha is None or self.before.factor.ndim != 1:
                raise ConfigError(
                    f"Node '{name_of(self.node)}': integer LayerNorm needs power-of-two factors"
                    " on its input; use the quantizer fqvit without --per-channel."
                )
            alpha = self.before.alpha.astype(np.int64)
        values = [
            None if v is None or v.const_value is None else v.const_value.numpy()
            for v in self.node.inputs[1:]
        ]
        gamma = np.ones(channels) if not values or values[0] is None else values[0]
        beta = np.zeros(channels) if len(values) < 2 or values[1] is None else values[1]
        factor = np.ones(1, np.float32) if self.after.factor is None else self.after.factor
        return IntegerLayerNorm(
            zero_point=int(self.before.zero_point),
            alpha=alpha,
            in_scale=float(self.before.scale),
            gamma=np.asarray(gamma, np.float64),
            beta=np.asarray(beta, np.float64),
            epsilon=float(self.node.attributes.get_float("epsilon", 1e-5)),
            out_scale=float(self.after.scale) * factor.astype(np.float64),
            out_zero_point=int(self.after.zero_point),
            limits=self.after.rule.limits,
        )

    def codes(self, codes: Tensor) -> Tensor:
        """Output codes of input codes [..., C], int64, on the codes' device."""
        c = self.constants(codes.shape[-1])
        on = codes.device
        gamma, beta = torch.from_numpy(c.gamma).to(on), torch.from_numpy(c.beta).to(on)
        out_scale = torch.from_numpy(np.asarray(c.out_scale)).to(on)
        x = (codes - c.zero_point) << torch.from_numpy(c.alpha).to(on)
        channels = x.shape[-1]
        total = x.sum(-1, keepdim=True)
        spread = channels * (x * x).sum(-1, keepdim=True) - total * total
        mean = total.double() / channels
        sigma = torch.sqrt(spread.double() / (channels * channels) + c.epsilon / c.in_scale**2)
        a = gamma / (sigma * out_scale)
        magnitude = a.abs()
        exponent = torch.frexp(magnitude).exponent.to(torch.int64)
        n = torch.clamp(c.bits - exponent, 0, 31)
        m = torch.floor(magnitude * torch.exp2(n.double())).to(torch.int64)
        m = torch.clamp(m, max=(1 << c.bits) - 1)
        n = torch.where(magnitude > 0, n, torch.zeros_like(n))
        b = torch.round((beta - mean * gamma / sigma) / out_scale * torch.exp2(n.double()))
        value = torch.sign(a).to(torch.int64) * m * x + b.to(torch.int64)
        one = torch.ones_like(n)
        half = torch.where(n > 0, one << torch.clamp(n - 1, min=0), torch.zeros_like(n))
        return torch.clamp(((value + half) >> n) + c.out_zero_point, *c.limits)

    def __call__(self, values: list[Tensor]) -> Tensor:
        codes = self.codes(quantize(values[0], self.before).to(torch.int64))
        return dequantize(codes.to(torch.float32), self.after)


@dataclass(frozen=True)
class SoftmaxOverride:
    """Integer softmax of one node, to log2 (LIS) or uniform codes."""

    before: TensorSpec
    after: TensorSpec

    @property
    def constants(self) -> IntegerSoftmax:
        """The numbers of the formula."""
        rule = self.after.rule
        return IntegerSoftmax(float(self.before.scale), rule.bits, rule.code == "log2")

    def codes(self, codes: Tensor) -> Tensor:
        """Codes of the attention map from codes of the logits [..., N], int64."""
        c = self.constants
        unit = c.unit
        ln2 = max(math.floor(math.log(2) / unit), 1)
        b, constant = math.floor(EXP_B / unit), math.floor(EXP_C / unit**2)
        x = (codes - codes.amax(-1, keepdim=True)) << EXP_FRACTION_BITS
        q = floor_divide(-x, torch.tensor(ln2, device=x.device))
        r = x + q * ln2
        width = constant.bit_length() - EXP_SHIFT
        e = torch.clamp(r * (r + b) + constant, min=0)
        e = (e >> max(width, 0)) << max(-width, 0)
        e = e >> torch.clamp(q, max=62)
        total = e.sum(-1, keepdim=True)
        top = (1 << c.bits) - 1
        if not c.log2:
            return torch.clamp(floor_divide(2 * e * top + total, 2 * total), max=top)
        safe = torch.clamp(e, min=1)
        t = floor_divide(2 * total + safe, 2 * safe)
        k = torch.frexp(t.double()).exponent.to(torch.int64) - 1
        code = k + (2 * t >= 3 * (torch.ones_like(k) << k)).to(torch.int64)
        limit = top_code(c.bits)
        return torch.where(e == 0, torch.full_like(code, limit), torch.clamp(code, max=limit))

    def __call__(self, values: list[Tensor]) -> Tensor:
        codes = self.codes(quantize(values[0], self.before).to(torch.int64))
        if self.after.rule.code == "log2":
            bits = self.after.rule.bits
            levels = log2_values(np.arange(top_code(bits) + 1, dtype=np.int32), bits)
            return torch.from_numpy(levels).to(codes.device)[codes]
        return dequantize(codes.to(torch.float32), self.after)
