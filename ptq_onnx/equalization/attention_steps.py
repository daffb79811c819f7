"""Ranges for few bits in attention: q, k and v turned head by head, and the input of proj."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.roles import Role
from ptq_onnx.blocks.walking import is_linear, is_product, name_of
from ptq_onnx.calibration.product_samples import PairSample
from ptq_onnx.equalization.channel_steps import Array, Double, Steps, numbers
from ptq_onnx.equalization.foldings import (
    columns_behind,
    insert_affine,
    keys_may_shift,
    new_nodes_as,
    value_path,
)
from ptq_onnx.equalization.linear_weights import move_rows, turn_rows
from ptq_onnx.numerics.codes.code import Solved
from ptq_onnx.numerics.ptf import least_steps
from ptq_onnx.numerics.range_search import channel_bounds, share_rate
from ptq_onnx.numerics.rotations import even
from ptq_onnx.numerics.spec import Site


class AttentionSteps(Steps):
    """See the module's text."""

    def queries(self, q: Site, k: Site | None) -> None:
        """q R and k R - t, and a scale for each head."""
        if k is None or k.tensor not in self.samples:
            return
        rows_q, rows_k = self.samples[q.tensor], self.samples[k.tensor]
        shape_q, shape_k = (tuple(int(s.shape[a]) for a in s.channel_axes) for s in (q, k))
        left = columns_behind(self.values[q.tensor], _spread(q))
        right = columns_behind(self.values[k.tensor], _spread(k))
        uses = {use.node for use in self.values[k.tensor].uses()}
        reads = {use.node for use in self.values[q.tensor].uses()}
        if left is None or right is None or shape_q != shape_k or len(uses) != 1 or uses != reads:
            return
        product = next(iter(uses))
        apart = all(len(np.unique(side.columns)) == side.columns.size for side in (left, right))
        if not is_product(product) or not apart:
            return
        heads = shape_q[0] if len(shape_q) == 2 else 1
        width = rows_q.shape[1] // heads
        rotation = even(width)
        rows_q, rows_k = (_turned(rows, rotation) for rows in (rows_q, rows_k))
        shift, zero = np.zeros(rows_k.shape[1]), np.zeros(rows_k.shape[1])
        if keys_may_shift(product):
            shift = rows_k.mean(axis=0, dtype=np.float64)
        rows_k = np.asarray(rows_k - shift, np.float32)
        head_q, solved_q = self.heads(q, rows_q, heads)
        head_k, solved_k = self.heads(k, rows_k, heads)
        for side in (left, right):
            side.turn(self.graph, rotation)
        left.apply(self.graph, zero, np.repeat(head_q, width))
        right.apply(self.graph, shift, np.repeat(head_k, width))
        if heads > 1:
            self.scores(q, product, head_q * head_k)
        self.settle(q, q.tensor, solved_q)
        self.settle(k, k.tensor, solved_k)

    def heads(self, site: Site, rows: Array, heads: int) -> tuple[Double, Solved]:
        """The factor of every head [H], and the one scale and zero point then."""
        levels = self.levels(site)
        flat = rows.reshape(len(rows), heads, -1).transpose(0, 2, 1).reshape(-1, heads)
        low, high = channel_bounds(flat[:: max(1, flat.shape[0] // len(rows) // 8)], levels)
        rule = self.rules[site.tensor]
        zero, step = least_steps(low, high, rule.limits, rule.symmetric)
        scale = float(np.exp(np.mean(np.log(step))))
        self.note(site, low, high)
        return step / scale, numbers(scale, zero)

    def scores(self, site: Site, product: ir.Node, factor: Double) -> None:
        """Multiply QKᵀ by a factor per head [H]."""
        inverse = 1 / factor.reshape(-1, 1, 1)
        with new_nodes_as(self.graph, Role(site.block, "qk_scale"), self.roles):
            insert_affine(self.graph, product.outputs[0], np.zeros(1), inverse, "headwise")

    def attended(self, v: Site) -> None:
        """(v - m) / s, which A·V passes on, into the rows of proj."""
        value = self.values[v.tensor]
        path, columns = value_path(value), columns_behind(value, _spread(v))
        if path is None or columns is None:
            return
        product, linear = path
        read = linear.inputs[0]
        if read is None or len(np.unique(columns.columns)) != columns.columns.size:
            return
        rows = _rows(product.outputs[0], read, v)
        if rows is None:
            return
        av = str(product.outputs[0].name)
        width = int(v.shape[v.channel_axes[-1]])
        rotation = even(width)
        columns.turn(self.graph, rotation)
        turn_rows(self.graph, linear, np.argsort(rows).reshape(-1, width), rotation)
        for tensor in {v.tensor, av} & {*self.samples}:
            self.samples[tensor] = _turned(self.samples[tensor], rotation)
        shift, factor, solved = self.steps(v)
        columns.apply(self.graph, shift, factor)
        move_rows(self.graph, linear, factor[rows], shift[rows])
        if av in self.samples:
            moved = (self.samples[av] - shift) / factor
            self.samples[av] = np.asarray(moved, np.float32)
        self.settle(v, v.tensor, solved)

    def product(self, av: Site) -> None:
        """(A·V - m) / s by a Mul and an Add in front of proj."""
        value = self.values[av.tensor]
        nodes = {name_of(n): n for n in self.graph}
        linears = [nodes[name] for name in av.consumers]
        if len(linears) != 1 or not is_linear(linears[0]) or (read := linears[0].inputs[0]) is None:
            return
        rows = _rows(value, read, av)
        if rows is None:
            return
        products = self.products(linears, np.argsort(rows))
        shift, factor, solved = self.steps(av, products)
        shift, factor = shift[rows], factor[rows]
        made = self.behind(av, read, shift, factor)
        move_rows(self.graph, linears[0], factor, shift)
        self.settle(av, str(made.name), solved)

    def maps(self, pairs: dict[str, PairSample]) -> None:
        """τ of attention maps."""
        for node in self.graph:
            if name_of(node) not in pairs or (read := node.inputs[0]) is None:
                continue
            tensor = str(read.name)
            attention, values = pairs[name_of(node)].factors
            bits = self.rules[tensor].bits
            rate = share_rate(attention, values, bits)
            self.solved[tensor] = numbers(1.0, (1 << bits) - 1, {"eighths": rate})


def _turned(rows: Array, rotation: Double) -> Array:
    """Rows [n, H d] with the channels of every head times R [d, d]."""
    turned = rows.reshape(len(rows), -1, len(rotation)) @ rotation.astype(np.float32)
    return np.asarray(turned.reshape(rows.shape), np.float32)


def _spread(site: Site) -> tuple[int, ...]:
    """The shape in which an array per channel broadcasts against the tensor, without the batch."""
    axes = {axis - len(site.shape) for axis in site.channel_axes}
    full = [int(site.shape[a]) if a in axes else 1 for a in range(-len(site.shape) + 1, 0)]
    return tuple(full)


def _rows(value: ir.Value, read: ir.Value, site: Site) -> NDArray[np.int64] | None:
    """The channel of each row of a linear that reads ``value`` behind layout ops; None where rows
    are no channels of their own."""
    shape = _spread(site)
    index = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    rows = rows_of(value, read, index)
    if rows is None or not np.array_equal(np.sort(rows), index.ravel()):
        return None
    return rows.astype(np.int64)
