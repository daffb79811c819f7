"""What it costs the runtime to leave tensors in float, or to give them more bits.

A product (Conv, linear, QKᵀ, A·V) works at the width of its widest input, which is 32 bits where
one of them is float; any other op reads and writes each element once. The unit is one operation
taken from 8 bits to 32: a MAC of a product, an element of any other tensor. A runtime without a
float part counts elements that have more than 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.numerics.spec import Rule, Site

FLOAT_BITS = 32
UNIT = FLOAT_BITS - 8


def macs(node: ir.Node) -> int:
    """Multiplications of one image in a Conv, linear or product; 0 for other ops.

    An axis whose size is not known counts once.
    """
    if len(node.inputs) < 2:
        return 0
    out, left, weight = _sizes(node.outputs[0])[1:], node.inputs[0], node.inputs[1]
    if left is None or weight is None:
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(_sizes(weight)[1:])
    if is_linear(node) or node.op_type == "MatMul":
        return math.prod(out) * _sizes(left)[-1]
    return 0


def cost(
    model: ir.Model,
    sites: Mapping[str, Site],
    before: Mapping[str, Rule],
    after: Mapping[str, Rule],
) -> float:
    """Operations of one image, each by the bits it gains, from rules before to rules after.

    A rule that is missing means float. Tensors that only products read count through those.
    """
    products = {name_of(node): node for node in model.graph if macs(node)}
    was, now = (_widths(products, sites, rules) for rules in (before, after))
    total = sum(macs(node) * (now[name] - was[name]) for name, node in products.items())
    others = (s for s in sites.values() if not s.consumers or set(s.consumers) - products.keys())
    return (total + _gained(others, before, after)) / UNIT


def elements(
    model: ir.Model,
    sites: Mapping[str, Site],
    before: Mapping[str, Rule],
    after: Mapping[str, Rule],
) -> float:
    """Elements of one image, and of weights, by the bytes that they gain."""
    return _gained(sites.values(), before, after) / BYTE


def cost_of(config: QuantizeConfig) -> Cost:
    """How the config's target counts."""
    return elements if config.runtime.all_codes else cost


Cost = Callable[[ir.Model, Mapping[str, Site], Mapping[str, Rule], Mapping[str, Rule]], float]
"""Of a model, its sites, and the rules before and after."""


def _gained(sites: Iterable[Site], before: Mapping[str, Rule], after: Mapping[str, Rule]) -> int:
    """Elements of one image by the bits that each gains."""
    return sum(s.elements * (_bits(after, s.tensor) - _bits(before, s.tensor)) for s in sites)


def _widths(
    products: Mapping[str, ir.Node], sites: Mapping[str, Site], rules: Mapping[str, Rule]
) -> dict[str, int]:
    """The bits of the widest input of every product."""
    found = dict.fromkeys(products, 0)
    for site in sites.values():
        for name in products.keys() & set(site.consumers):
            found[name] = max(found[name], _bits(rules, site.tensor))
    for name, node in products.items():  # a weight that several share names one reader only
        weight = str(node.inputs[1].name) if node.inputs[1] is not None else ""
        if weight in sites:
            found[name] = max(found[name], _bits(rules, weight))
    return {name: bits or FLOAT_BITS for name, bits in found.items()}


def _bits(rules: Mapping[str, Rule], tensor: str) -> int:
    return rules[tensor].bits if tensor in rules else FLOAT_BITS


def _sizes(value: ir.Value) -> list[int]:
    shape = () if value.shape is None else value.shape
    return [d if isinstance(d, int) else 1 for d in shape]
