"""How much of a file its runtime computes in integers, counted in the file that was written.

A product counts where its runtime multiplies codes: for ONNX Runtime both inputs have Q/DQ in the
file and its optimised graph has no float product in its place; for TensorRT and OpenVINO both
inputs have Q/DQ; a file of ``integer`` has nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_linear, is_product
from ptq_onnx.config.targets import TARGETS
from ptq_onnx.graph.known_sizes import Sizes, known_sizes
from ptq_onnx.targets.checking.coding import constant
from ptq_onnx.targets.checking.optimised import optimise
from ptq_onnx.targets.checking.product import Operand, Product
from ptq_onnx.targets.checking.quantized_model import QuantizedModel, open_model

ENOUGH = 90.0
"""Percent of the MACs from which on there is no warning."""
LARGEST = 1 << 30
"""Bytes up to which ONNX Runtime is asked for the graph that it runs."""
REQUEST = "by request"
SIXTEEN_BITS = "16-bit codes have no integer kernel on the CPU; give what it reads 8 bits"
FOUR_BITS = "4-bit weights: their activations stay in float, by request"
CONVOLUTIONS = "ONNX Runtime has no integer kernel for a convolution whose output stays float"
Basis = Literal["optimised graph", "Q/DQ"]
Kind = Literal["linears", "convolutions", "attention products"]


@dataclass(frozen=True)
class Share:
    """Products of one kind: how many run in integers, of how many."""

    integer: int
    all: int


@dataclass(frozen=True)
class Left:
    """Products of one kind that run in float for one reason, and their percentage of all MACs."""

    kind: Kind
    count: int
    percent: float
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Products of a file that its runtime computes in integers.

    ``percent``: of the MACs of one image, which has the size of the file's preprocessing where the
    file takes any; of another axis whose size is known at run time only one. Attention products are
    those of two activations. ``left``: why the others do not. ``basis``: what was counted, the
    graph that the runtime makes of the file, or the Q/DQ in it."""

    linears: Share
    convolutions: Share
    attention: Share
    percent: float
    left: tuple[Left, ...]
    basis: Basis

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the texts that console and page show."""
        return {**asdict(self), "line": self.line, "reasons": list(self.reasons),
                "warning": self.warning}  # fmt: skip

    @property
    def integer(self) -> int:
        """Products of any kind in integers."""
        return self.linears.integer + self.convolutions.integer + self.attention.integer

    @property
    def line(self) -> str:
        """What runs in integers, in one line."""
        kinds = (
            ("linears", self.linears),
            ("convolutions", self.convolutions),
            ("attention products", self.attention),
        )
        parts = [f"{share.integer} of {share.all} {name}" for name, share in kinds if share.all]
        counts = ", ".join(parts) or "the file has no products"
        return f"In integers: {self.percent:.1f} % of the multiplications ({counts})."

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the others do not, one line a reason."""
        return tuple(
            f"in float: {one.count} {_name(one)} ({one.percent:.1f} % of the multiplications):"
            f" {one.reason}."
            for one in self.left
        )

    @property
    def warning(self) -> str | None:
        """One line where less than ``ENOUGH`` runs in integers and nobody asked for that."""
        if self.percent >= ENOUGH or all(_asked(one.reason) for one in self.left):
            return None
        worst = max(self.left, key=lambda one: one.percent)
        why = f"most of the rest: {worst.count} {_name(worst)}, {worst.reason}."
        if not self.integer:
            return f"Nothing runs in integers: every product of the file is in float; {why}"
        return (
            f"Only {self.percent:.1f} % of the multiplications run in integers, so that little"
            f" time is saved; {why}"
        )


def measure_coverage(path: Path, target: str, reasons: Mapping[str, str] | None = None) -> Coverage:
    """Count in a file with Q/DQ. ``reasons``: why products stay in float, by node name."""
    model = open_model(path)
    asked = target == "onnxruntime" and _bytes(path) <= LARGEST
    floats = _floats_in_runtime(model) if asked else frozenset[str]()
    found: list[tuple[Kind, int, str]] = []
    known = known_sizes(model.model)
    for product in model.products:
        kind = _kind(product)
        codes = product.coded if TARGETS[target].all_codes else product.quantized
        integer = codes and product.name not in floats
        why = "" if integer else _why(product, kind, reasons or {}, target)
        found.append((kind, _macs(product, model, known), why))
    return _summed(found, "optimised graph" if asked else "Q/DQ")


def whole_coverage(model: ir.Model) -> Coverage:
    """That of an integer file of a fused model: all of it."""
    found: list[tuple[Kind, int, str]] = []
    for node in model.graph:
        if is_linear(node):
            found.append(("linears", 1, ""))
        elif node.op_type == "Conv":
            found.append(("convolutions", 1, ""))
        elif is_product(node):
            found.append(("attention products", 1, ""))
    return _summed(found, "Q/DQ")


def float_reasons(
    floats: Mapping[str, str], consumers: Mapping[str, Iterable[str]]
) -> dict[str, str]:
    """Reasons by product, under the names that it may have in the file, from those by tensor.

    ``floats``: why tensors have no codes; ``consumers``: what reads them. Of several reasons the
    first that was asked for, else the first.
    """
    found: dict[str, str] = {}
    for tensor, reason in floats.items():
        for name in consumers.get(tensor, ()):
            if name not in found or (_asked(reason) and not _asked(found[name])):
                found[name] = found[f"{name}_matmul"] = reason
    return found


def _summed(found: list[tuple[Kind, int, str]], basis: Basis) -> Coverage:
    total = max(sum(macs for _, macs, _ in found), 1)

    def share(kind: Kind) -> Share:
        mine = [why for k, _, why in found if k == kind]
        return Share(sum(not why for why in mine), len(mine))

    groups: dict[tuple[Kind, str], list[int]] = {}
    for kind, macs, why in found:
        if why:
            groups.setdefault((kind, why), []).append(macs)
    left = [
        Left(kind, len(macs), 100 * sum(macs) / total, why) for (kind, why), macs in groups.items()
    ]
    integer = sum(macs for _, macs, why in found if not why)
    return Coverage(
        share("linears"),
        share("convolutions"),
        share("attention products"),
        100 * integer / total if found else 0.0,
        tuple(sorted(left, key=lambda one: -one.percent)),
        basis,
    )


def _kind(product: Product) -> Kind:
    if product.node.op_type in ("Conv", "ConvTranspose"):
        return "convolutions"
    return "linears" if product.linear else "attention products"


def _why(product: Product, kind: Kind, reasons: Mapping[str, str], target: str) -> str:
    """Why a product runs in float."""
    given = reasons.get(product.name, "")
    if _asked(given):
        return given
    if product.table:
        return f"{product.table.name} codes have no integer kernel; {product.table.instead}"
    if product.four_bits:
        return FOUR_BITS
    if product.sixteen_bits:
        return SIXTEEN_BITS
    if product.quantized:
        return "it has Q/DQ, but the runtime computes it in float"
    if kind == "convolutions" and target == "onnxruntime":
        return given if given and "only products" not in given else CONVOLUTIONS
    if any(o.weight and _rank(o) > 2 for o in product.operands) and kind == "linears":
        return "weights of three axes (experts) are not quantized"
    if product.touched:
        return "only one of its inputs is quantized, with one scale"
    return given if given and "only products" not in given else "its inputs are not quantized"


def _asked(reason: str) -> bool:
    """True for what options leave in float."""
    return REQUEST in reason or "--weights" in reason


def _rank(operand: Operand) -> int:
    array = constant(operand.value)
    return 0 if array is None else array.ndim


def _floats_in_runtime(model: QuantizedModel) -> frozenset[str]:
    """Products of the file that ONNX Runtime computes in float."""
    from ptq_onnx.targets.onnxruntime.rules import product_of

    graph = model.derived(optimise)
    if graph.refusal:
        return frozenset(p.name for p in model.products)
    found = (product_of(left, model) for left in graph.float_products)
    return frozenset(p.name for p in found if p is not None)


def _macs(product: Product, model: QuantizedModel, known: Sizes) -> int:
    """Multiplications of one image."""

    def dims(value: ir.Value) -> list[int]:
        return [_size(d) for d in known.get(value) or model.shape(value) or ()]

    node, (first, second) = product.node, product.operands
    if node.op_type == "ConvTranspose":
        return math.prod(dims(first.value)) * math.prod(dims(second.value)[1:])
    inner = dims(second.value)[1:] if node.op_type == "Conv" else dims(first.value)[-1:]
    return math.prod(dims(node.outputs[0])) * math.prod(inner)


def _size(dim: int | ir.SymbolicDim) -> int:
    """A number; of ``4*batch`` the number; 1 for what is known at run time only."""
    if isinstance(dim, int):
        return dim
    factor = str(dim.value).partition("*")[0]
    return int(factor) if factor.isdecimal() else 1


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def _name(one: Left) -> str:
    return one.kind if one.count > 1 else one.kind.removesuffix("s")


__all__ = ["Coverage", "Left", "Share", "float_reasons", "measure_coverage", "whole_coverage"]
