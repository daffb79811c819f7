"""What ops of a convolutional region cost in ONNX Runtime, in floats and on codes.

Nanoseconds per element of the output, on one core of a CPU with VNNI (AVX-512, ONNX Runtime 1.31),
as ``benchmarks/convolutions.py`` prints them: they are compared with each other only, and both
sides grow alike on another CPU. A region ends where codes become floats or floats codes: its tensor
is converted, and mostly transposed too, since integer kernels take channels last.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ptq_onnx.graph.known_sizes import ELEMENTS

ENTER = LEAVE = 0.4
"""QuantizeLinear or DequantizeLinear, and a Transpose."""
CONVERT = 0.12
"""One of them without a Transpose."""
NODE = 1500.0
"""Nanoseconds to start a node, whatever its size."""
ARITHMETIC = {"HardSwish": 0.3, "Sigmoid": 0.7, "Add": 0.1, "Mul": 0.1}
"""Of floats behind an integer convolution; others as ``OTHER``."""
CODES = {"HardSwish": 0.95, "Sigmoid": 0.9, "Add": 0.14, "Mul": 0.23}
"""Of codes; HardSwish with factors per channel."""
OTHER = 0.1
UNKNOWN = 32
"""What an axis of unknown size counts: both sides of a comparison have it."""
FEW = 16
"""Input channels below which pixels are gathered one by one."""
NARROW = 32
"""Channels of a group below which the integer kernel is slower than the float one."""


def elements(value: ir.Value | None) -> int:
    """How many a tensor has for one image; as noted, of a graph for images of any size."""
    if value is not None and ELEMENTS in value.meta:
        return int(value.meta[ELEMENTS])
    if value is None or value.shape is None:
        return 0
    return math.prod(d if isinstance(d, int) else UNKNOWN for d in list(value.shape)[1:])


def terms(conv: ir.Node) -> tuple[int, int, int]:
    """Channels of a group, pixels of the kernel and groups."""
    weight = conv.inputs[1]
    dims = [] if weight is None or weight.shape is None else list(weight.shape)
    numbers = [d if isinstance(d, int) else 1 for d in dims]
    return numbers[1], math.prod(numbers[2:]), conv.attributes.get_int("group", 1)


def has_one_output_per_group(conv: ir.Node) -> bool:
    """True for a depthwise convolution whose kernel takes all channels at once; with several
    outputs for a channel each group is a product of its own."""
    weight = conv.inputs[1]
    first = None if weight is None or weight.shape is None else weight.shape[0]
    return first == terms(conv)[2]


def channels_read(conv: ir.Node) -> int:
    """Input channels of all groups."""
    channels, _, groups = terms(conv)
    return channels * groups


def multiplications(conv: ir.Node) -> float:
    """How many a convolution does for one image."""
    channels, pixels, _ = terms(conv)
    return float(max(channels * pixels * elements(conv.outputs[0]), 1))


def float_time(conv: ir.Node) -> float:
    """Nanoseconds of a convolution of floats."""
    channels, pixels, groups = terms(conv)
    each = 0.15 + 0.018 * pixels if channels == 1 < groups else 0.05 + 0.0185 * channels * pixels
    return NODE + each * elements(conv.outputs[0])


def integer_time(conv: ir.Node) -> float:
    """Nanoseconds of one on codes."""
    channels, pixels, groups = terms(conv)
    if groups == 1:
        gathered = channels < FEW and pixels > 1
        each = (0.7 + 0.0085 * channels * pixels) if gathered else 0.15 + 0.0053 * channels * pixels
    elif channels == 1 and has_one_output_per_group(conv):
        each = 0.25 + 0.033 * pixels
    else:
        each = 0.5 + 0.008 * channels * pixels if channels >= NARROW else math.inf
    return NODE + each * elements(conv.outputs[0])
