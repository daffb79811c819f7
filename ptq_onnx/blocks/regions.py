"""Regions of a graph that a runtime computes on codes: convolutions and what stands between them.

Of a runtime whose integer convolution takes codes and gives codes. Between two of them Add, Mul,
Sigmoid, pools, Concat and the like stay on codes too; an activation that only clips (Relu, Clip
from 0 on) is part of the codes of what it reads. Where a region borders on floats, its tensors are
converted: a convolution that saves less time than the conversions it causes stays float
(``region_costs.py``). One that nothing but floats surround pays twice, one in a chain not at all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks import region_costs as costs
from ptq_onnx.blocks.region_ops import (
    KERNELS,
    ON_CODES,
    SMOOTH,
    is_factor,
    is_made_by_convolution,
    is_one_pixel,
    maker_of,
    next_to,
    per_channel,
    reader_of,
    result_of,
    scales_hard_swish,
)
from ptq_onnx.blocks.walking import consumers, data_inputs, is_constant, name_of
from ptq_onnx.graph.formula import constant

GATE = 16
"""A factor or summand this much smaller than the result is made codes of its own."""
TIE = 0.002
"""Of the time: below it integers are preferred, whose weights take a quarter of the memory."""
MORE = 0.08
"""Of the time: what more integers may cost in all beyond the fastest choice, where they are asked
for, as long as they take less than floats."""
DECIDED = "ptq_onnx.codes"
"""Key of a convolution's ``meta``: whether it is on codes."""
COSTS_MORE = "codes around it would cost more time than its integers save"
ONE_PIXEL = "one number per channel and image: no time to save, and whole channels hang on it"
NO_KERNEL = "its weight is no constant, or its image has no two sides"
SLOW_GROUPS = "the integer kernel is slower than the float one where groups have few channels"


@dataclass(frozen=True)
class Regions:
    """What runs on codes, and why other convolutions do not."""

    convolutions: frozenset[ir.Node] = frozenset()
    ops: frozenset[ir.Node] = frozenset()
    codes: tuple[ir.Value, ...] = ()
    """Tensors that have codes, in graph order."""
    entering: frozenset[ir.Value] = frozenset()
    """Those of them that ops of floats make, and the graph's inputs."""
    constants: tuple[ir.Value, ...] = ()
    """Numbers beside codes."""
    floats: dict[str, str] = field(default_factory=dict)
    """Reasons by name of a convolution."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of what has codes, but for constants."""
        return frozenset(str(value.name) for value in self.codes)


@dataclass(frozen=True)
class _Drawn:
    """The region of some convolutions: the ops on codes, what they make, what enters."""

    ops: frozenset[ir.Node]
    made: frozenset[ir.Value]
    entering: frozenset[ir.Value]


def find_regions(graph: ir.Graph, blocked: Collection[str] = (), spared: float = 0.0) -> Regions:
    """The regions that save time; ``blocked``: tensors that are to have no codes. ``spared``: what
    more integers may cost, of the time."""
    return _Finder(graph, frozenset(blocked), spared).run()


def decide(graph: ir.Graph, regions: Regions) -> None:
    """Note in each convolution whether it is on codes, so that ops that are written around it since
    change nothing about it."""
    for node in graph:
        if node.op_type == "Conv":
            node.meta[DECIDED] = node in regions.convolutions


class _Finder:
    def __init__(self, graph: ir.Graph, blocked: frozenset[str], spared: float = 0.0) -> None:
        self.nodes, self.blocked, self.spared = list(graph), blocked, spared
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.inputs = [v for v in graph.inputs if not v.is_initializer()]
        self.floats: dict[str, str] = {}
        self.able = self.known = [n for n in self.nodes if self._may(n)]

    def run(self) -> Regions:
        """The regions of what was decided, or of what pays."""
        every_one = {n for n in self.nodes if n.op_type == "Conv" and self._takes(n)}
        wanted = self._decided(every_one)
        if wanted is None:
            wanted = self._chosen(every_one)
        self.floats.update((name_of(n), COSTS_MORE) for n in every_one - wanted)
        drawn = self.drawn(wanted)
        codes = drawn.made | drawn.entering
        every = [*self.inputs, *(v for node in self.nodes for v in node.outputs)]
        numbers = [
            v for n in self.nodes if n in drawn.ops for v in n.inputs
            if v is not None and n.op_type in ("Add", "Mul") and is_constant(v)
        ]  # fmt: skip
        return Regions(
            frozenset(wanted),
            drawn.ops,
            tuple(v for v in every if v in codes),
            drawn.entering,
            tuple(dict.fromkeys(numbers)),
            self.floats,
        )

    def _decided(self, every_one: set[ir.Node]) -> set[ir.Node] | None:
        """What was decided before (``decide``), less what does not pay without the blocked; None
        where nothing was. Activation functions that were to be on codes are written so by then."""
        if not any(DECIDED in n.meta for n in every_one):
            return None
        self.able = [n for n in self.able if n.op_type in KERNELS]
        wanted = {n for n in every_one if n.meta.get(DECIDED)}
        return self._pruned(wanted) if self.blocked else wanted

    def _chosen(self, every_one: set[ir.Node]) -> set[ir.Node]:
        """All convolutions, less what costs more than it saves, with HardSwish on codes or in
        floats between them."""
        found: list[tuple[float, set[ir.Node], list[ir.Node]]] = []
        without = [n for n in self.able if n.op_type in KERNELS]
        for able in [self.able, without] if len(without) < len(self.able) else [self.able]:
            self.able = able
            fastest = self._pruned(every_one)
            found.append((self.cost(fastest), fastest, self.able))
        _, fastest, self.able = min(found, key=lambda one: one[0])
        return self._filled(fastest, every_one - fastest)

    # --- candidates -----------------------------------------------------------------------

    def _takes(self, conv: ir.Node) -> bool:
        """True for a convolution with an integer kernel that is not to stay float."""
        weight, output = constant(conv.inputs[1]), conv.outputs[0]
        why = ""
        if weight is None or weight.ndim != 4 or weight.dtype != np.float32:
            why = NO_KERNEL
        elif is_one_pixel(output):
            why = ONE_PIXEL
        elif costs.integer_time(conv) == np.inf:
            why = SLOW_GROUPS
        elif any(self._is_blocked(v) for v in (*conv.inputs[:2], output, result_of(conv))):
            return False
        if why:
            self.floats[name_of(conv)] = why
        return not why

    def _is_blocked(self, value: ir.Value | None) -> bool:
        return value is not None and value.name in self.blocked

    def _may(self, node: ir.Node) -> bool:
        """True for another op with an integer kernel."""
        if node.op_type not in ON_CODES or node.domain != "":
            return False
        output = result_of(node)
        if len(node.outputs) != 1 or output.shape is None or len(output.shape) != 4:
            return False
        if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
            return False
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) not in (1, -3):
            return False
        if node.op_type == "HardSwish" and not is_made_by_convolution(node.inputs[0]):
            return False
        if node.op_type in ("Add", "Mul"):
            fixed = [v for v in node.inputs if is_constant(v)]
            if any(not per_channel(v) for v in fixed):
                return False
        return not any(self._is_blocked(v) for v in (*node.inputs, node.outputs[0], output))

    # --- regions --------------------------------------------------------------------------

    def drawn(self, convolutions: set[ir.Node]) -> _Drawn:
        """The ops between these convolutions that stay on codes: all they read is codes, and
        something takes their codes."""
        active = set(self.able)
        while True:
            before = len(active)
            made: set[ir.Value] = set()
            for node in self.nodes:
                if node in convolutions or (node in active and self._fed(node, made)):
                    made.add(result_of(node))
                else:
                    active.discard(node)
            for node in reversed(self.nodes):
                if node in active and not self._read(node, convolutions, active):
                    active.discard(node)
            if len(active) == before:
                break
        entering = {
            v for n in (*convolutions, *active) for v in self._data(n) if v not in made
        }  # fmt: skip
        return _Drawn(frozenset(active), frozenset(made), frozenset(entering))

    def _data(self, node: ir.Node) -> list[ir.Value]:
        """What of a node's inputs is to have codes."""
        found = data_inputs(node)
        return found if node.op_type in ("Add", "Mul", "Concat") else found[:1]

    def _fed(self, node: ir.Node, made: set[ir.Value]) -> bool:
        """Inputs are codes; of two, one may be small."""
        data = self._data(node)
        there = [v in made for v in data]
        if node.op_type not in ("Add", "Mul") or len(data) < 2:
            return bool(data) and all(there)
        most = costs.elements(node.outputs[0])
        small = [costs.elements(v) * GATE <= most for v in data]
        return any(there) and all(a or b for a, b in zip(there, small, strict=True))

    def _read(self, node: ir.Node, convolutions: set[ir.Node], active: set[ir.Node]) -> bool:
        """Something takes the codes."""
        return any(
            reader in convolutions or reader in active for reader, _ in consumers(result_of(node))
        )

    # --- what pays ------------------------------------------------------------------------

    def cost(self, convolutions: set[ir.Node]) -> float:
        """Nanoseconds of all that depends on the choice."""
        drawn = self.drawn(convolutions)
        total = 0.0
        for node in self.nodes:
            if node.op_type == "Conv":
                took = costs.integer_time if node in convolutions else costs.float_time
                total += took(node)
            elif node in self.known and node not in drawn.ops:
                behind = node.inputs[0] in drawn.made
                fused = node.op_type == "HardSwish" and not behind
                each = 0.05 if fused else costs.ARITHMETIC.get(node.op_type, costs.OTHER)
                total += each * costs.elements(node.outputs[0])
            elif node in drawn.ops and not scales_hard_swish(node):
                each = costs.CODES.get(node.op_type, costs.OTHER)
                total += each * costs.elements(node.outputs[0])
        takers = convolutions | drawn.ops
        for value in drawn.entering:
            each = costs.CONVERT if self._is_smooth(value.producer(), drawn) else costs.ENTER
            total += costs.NODE + each * costs.elements(value)
        for value in drawn.made:
            floats = [n for n, _ in consumers(value) if n not in takers]
            if value.is_graph_output() or floats:
                inside = not value.is_graph_output() and all(
                    self._is_smooth(n, drawn) for n in floats
                )
                each = costs.CONVERT if inside else costs.LEAVE
                total += costs.NODE + each * costs.elements(value)
        return total

    def _is_smooth(self, node: ir.Node | None, drawn: _Drawn) -> bool:
        """True for an activation function of floats from codes to codes, or a factor per channel
        in front of it or behind."""
        if node is not None and is_factor(node):
            node = next_to(node)
        if node is None or node.op_type not in SMOOTH or node in drawn.ops:
            return False
        first, last = node.inputs[0], node.outputs[0]
        before, behind = None if first is None else first.producer(), reader_of(last)
        if before is not None and is_factor(before):
            first = before.inputs[0]
        if behind is not None and is_factor(behind):
            last = behind.outputs[0]
        return first in drawn.made and last in drawn.entering

    def _pruned(self, wanted: set[ir.Node]) -> set[ir.Node]:
        """Without the first convolutions (of few channels and many pixels), then single ones, then
        whole pieces, that cost more than they save."""
        for choices in (self._beginnings, self._single, self._connected, self._single):
            cost = self.cost(wanted)
            for piece in choices(wanted):
                fewer = self.cost(wanted - piece)
                if fewer < cost:
                    wanted, cost = wanted - piece, fewer
        return wanted

    def _filled(self, fastest: set[ir.Node], left: set[ir.Node]) -> set[ir.Node]:
        """With what costs nothing now that others are left out, and then for the time that is
        spared, the cheapest for a multiplication first; but for convolutions of few channels, as at
        the image: they have few multiplications, and all that follows has the noise of their
        codes."""
        cost = self.cost(fastest)
        left = {n for n in left if costs.channels_read(n) > costs.FEW}
        price = {n: (self.cost({*fastest, n}) - cost) / costs.multiplications(n) for n in left}
        wanted, limit = fastest, min(cost * (1 + self.spared), self.cost(set()))
        for node in sorted(left, key=lambda n: (price[n], self.order[n])):
            if self.cost({*wanted, node}) <= limit:
                wanted = {*wanted, node}
        return wanted

    def _beginnings(self, wanted: set[ir.Node]) -> list[set[ir.Node]]:
        """The first convolutions up to where leaving them out saves most; fewer where that saves
        hardly less."""
        ordered = [n for n in self.nodes if n in wanted]
        cuts = [set(ordered[:end]) for end in range(len(ordered) + 1)]
        left = [self.cost(wanted - cut) for cut in cuts]
        most = min(left) * (1 + TIE)
        return [next(cut for cut, cost in zip(cuts, left, strict=True) if cost <= most)]

    def _single(self, wanted: set[ir.Node]) -> list[set[ir.Node]]:
        return [{n} for n in self.nodes if n in wanted]

    def _connected(self, wanted: set[ir.Node]) -> list[set[ir.Node]]:
        """Convolutions that codes join, in graph order."""
        drawn = self.drawn(wanted)
        members = wanted | drawn.ops
        piece: dict[ir.Node, set[ir.Node]] = {}
        for node in self.nodes:
            if node not in members:
                continue
            mine = {node}
            for value in self._data(node):
                maker = maker_of(value)
                if maker in piece and value in drawn.made:
                    mine |= piece[maker]
            for one in mine:
                piece[one] = mine
        distinct = {id(found): found for found in piece.values()}
        return [found & wanted for found in distinct.values() if found & wanted]
