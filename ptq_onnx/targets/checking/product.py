"""Reads the matrix products of a graph and how each of their inputs is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ptq_onnx.blocks.walking import name_of
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.numerics.codes import by_name
from ptq_onnx.numerics.codes.code import Code
from ptq_onnx.targets.checking.coding import (
    EIGHT_BITS,
    FOUR_BITS,
    INT8,
    SIXTEEN_BITS,
    UINT8,
    Coding,
    back_through_moves,
    constant,
    type_of,
)

CODES = (INT8, UINT8)
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Ops whose inputs 0 and 1 are multiplied, and whose input 2 is a bias."""

INTEGER_PRODUCTS = {
    "QLinearMatMul": 3,
    "QLinearConv": 3,
    "MatMulInteger": 1,
    "ConvInteger": 1,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
"""Ops that multiply codes, with the index of the input that holds the weight."""


@dataclass(frozen=True, eq=False)
class Operand:
    """One of the two factors of a product."""

    index: int
    value: ir.Value
    moves: tuple[ir.Node, ...]
    """Ops between DequantizeLinear and the product, nearest to the product first."""
    dequantize: Coding | None
    quantize: Coding | None
    """None for codes that are stored in the file."""
    weight: bool
    """The factor is a constant of the file."""
    table: Code | None = None
    """The factor is looked up in a table by 8-bit codes of this kind, which has no kernel."""
    scaled: bool = False
    """A weight's codes, whose scale a Mul behind DequantizeLinear gives."""


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product or a convolution."""

    node: ir.Node
    operands: tuple[Operand, Operand]

    @property
    def name(self) -> str:
        """Name of the node."""
        return name_of(self.node)

    @property
    def linear(self) -> bool:
        """One factor is a weight."""
        scaled = self.table is not None and any(operand.scaled for operand in self.operands)
        return scaled or any(operand.weight for operand in self.operands)

    @property
    def touched(self) -> bool:
        """At least one factor is quantized."""
        return any(operand.dequantize for operand in self.operands)

    @property
    def table(self) -> Code | None:
        """The codes of one factor that come from a table, the other being quantized."""
        first, second = self.operands
        if first.table and (second.dequantize or second.scaled):
            return first.table
        return second.table if first.dequantize else None

    @property
    def quantized(self) -> bool:
        """Both factors are quantized to 8 bits."""
        codes = (o.dequantize.dtype for o in self.operands if o.dequantize is not None)
        return [c in EIGHT_BITS for c in codes] == [True, True]

    @property
    def coded(self) -> bool:
        """Both factors are quantized, to 4, 8 or 16 bits."""
        codes = (o.dequantize.dtype for o in self.operands if o.dequantize is not None)
        return [c in (*EIGHT_BITS, *SIXTEEN_BITS, *FOUR_BITS) for c in codes] == [True, True]

    @property
    def weight_only(self) -> bool:
        """The weight is quantized, the activation is not."""
        return (
            self.linear
            and self.touched
            and all(o.weight == bool(o.dequantize) for o in self.operands)
        )

    @property
    def sixteen_bits(self) -> bool:
        """A factor has codes of sixteen bits."""
        return any(o.dequantize and o.dequantize.dtype in SIXTEEN_BITS for o in self.operands)

    @property
    def four_bits(self) -> bool:
        """A factor has codes of four bits."""
        return any(o.dequantize and o.dequantize.dtype in FOUR_BITS for o in self.operands)


def find_products(graph: ir.Graph) -> Iterator[Product]:
    """All products of a graph, in its order."""
    for node in graph:
        if node.op_type in PRODUCTS and node.domain == "":
            first, second = node.inputs[:2]
            if first is not None and second is not None:
                yield Product(node, (_operand(0, first), _operand(1, second)))


def weight_axis(product: Product, operand: Operand) -> int | None:
    """The axis of the output channels at the weight's DequantizeLinear.

    None where an op other than Transpose stands between it and the product.
    """
    axes = _axes(product, operand)
    return None if axes is None else axes[0]


def inner_axis(product: Product, operand: Operand) -> int | None:
    """The axis that is summed over, at the weight's DequantizeLinear; None as above."""
    axes = _axes(product, operand)
    return None if axes is None else axes[1]


def _operand(index: int, value: ir.Value) -> Operand:
    behind, moves = back_through_moves(value)
    node = behind.producer()
    if node is None or node.op_type != DEQUANTIZE or node.inputs[0] is None:
        stored = constant(behind) is not None
        return Operand(index, value, moves, None, None, stored, _table_of(node), _is_scaled(node))
    codes, _ = back_through_moves(node.inputs[0])
    source = codes.producer()
    if source is None or source.op_type != QUANTIZE or source.inputs[0] is None:
        return Operand(index, value, moves, Coding(node), None, constant(codes) is not None)
    data, _ = back_through_moves(source.inputs[0])
    weight = constant(data) is not None
    return Operand(index, value, moves, Coding(node), Coding(source), weight)


def _is_scaled(node: ir.Node | None) -> bool:
    """True for a Mul of DequantizeLinear's output, of stored codes, by a constant."""
    if node is None or node.op_type != "Mul" or constant(node.inputs[1]) is None:
        return False
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    stored = None if maker is None or maker.op_type != DEQUANTIZE else constant(maker.inputs[0])
    return stored is not None


def _table_of(node: ir.Node | None) -> Code | None:
    """The code whose values a Gather looks up by codes of 8 bits; None for anything else.

    What DequantizeLinear is to uniform codes, this is to those.
    """
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, index = constant(node.inputs[0]), node.inputs[1]
    if table is None or index is None or table.ndim != 1 or table.dtype.kind != "f":
        return None
    while type_of(index) not in CODES:
        cast = index.producer()
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
            return None
        if cast.attributes.get_int("to", 0) in CODES:
            break
        index = cast.inputs[0]
    return next((code for code in by_name.CODES if code.recognise(table)), None)


def _axes(product: Product, operand: Operand) -> tuple[int, int] | None:
    """Axes of the output channels and of the sum, seen before the moves."""
    rank = _rank(operand)
    if rank is None or rank < 2:
        return None
    node, first = product.node, operand.index == 0
    match node.op_type:
        case "Conv":
            axes = 0, 1
        case "ConvTranspose":
            axes = 1, 0
        case "Gemm":
            swapped = bool(node.attributes.get_int("transA" if first else "transB", 0))
            axes = (1, 0) if first == swapped else (0, 1)
        case _:
            axes = (rank - 2, rank - 1) if first else (rank - 1, rank - 2)
    for move in operand.moves:
        if move.op_type != "Transpose":
            return None
        permutation = list(move.attributes.get_ints("perm", range(rank)[::-1]))
        axes = permutation[axes[0]], permutation[axes[1]]
    return axes


def _rank(operand: Operand) -> int | None:
    """The rank of the codes."""
    if operand.dequantize is None:
        return None
    data = operand.dequantize.node.inputs[0]
    array = constant(data)
    if array is not None:
        return array.ndim
    return None if data is None or data.shape is None else len(data.shape)
