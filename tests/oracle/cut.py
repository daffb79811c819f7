"""Cuts a quantized file at its codes: each part is given codes of ours and computes its own.

In the file the codes of a tensor T are called ``T_quantized``; where A·V is to be divided by row
sums, multiplied by rows or given back its mean first, ``T_renormalized_quantized`` and so on; where
its last axes are swapped behind the codes, ``T_rows_quantized``. All
readers of such codes get an input of the graph in their
place, and the codes become an output. One run then compares every part, with the same inputs for
both sides: errors cannot add up, and one code that is off by a last bit upsets nothing else.
8-bit floats are cut behind their DequantizeLinear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .formats import Coded, Format, e4m3
from .reference import open_session

Array = NDArray[Any]
ROWS = "_rows_quantized"
RESTORED = "(_rows|_renormalized|_row_rescaled|_mean_restored|_vector_rescaled|_biased)*"
FED = "{}/fed"
HIGHER = {"uint8": 128, "uint16": 32768}
"""Signed codes that are stored without a sign are stored this much higher, and unsigned ones with
one this much lower."""
LOWER = {"int8": -128}


class CutFile:
    """A file for ONNX Runtime, all optimizations on, between its codes."""

    def __init__(self, path: Path, formats: Mapping[str, Format]) -> None:
        self.formats = {n: f for n, f in formats.items() if not f.parameter}
        model = onnx.load(path)
        graph = model.graph
        made = {o for node in graph.node for o in node.output}
        self.codes = {name: _codes_of(name, made) for name in self.formats}
        self.outputs = [o.name for o in graph.output]
        for name, found in self.formats.items():
            stored = self.codes[name]
            if found.code == "e4m3":
                stored = _dequantized(graph, stored)
                self.codes[name] = stored
            self._cut(graph, stored, found)
        floats = any(f.code == "e4m3" for f in self.formats.values())
        self.session = open_session(model, optimize=True, floats=floats)

    @staticmethod
    def _cut(graph: onnx.GraphProto, stored: str, found: Format) -> None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(found.stored))
        if found.code == "e4m3":
            kind = TensorProto.FLOAT
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == stored:
                    node.input[index] = FED.format(stored)
        graph.input.append(helper.make_tensor_value_info(FED.format(stored), kind, None))
        if stored not in {o.name for o in graph.output}:
            graph.output.append(helper.make_tensor_value_info(stored, kind, None))

    def run(self, x: Array, coded: Mapping[str, Coded]) -> tuple[dict[str, Array], list[Array]]:
        """The codes that each part computes from ours, by tensor, and the graph's outputs."""
        feeds: dict[str, Array] = {}
        for name, found in self.formats.items():
            codes = coded[name].codes
            feeds[FED.format(self.codes[name])] = self._stored(codes, found)
        for item in self.session.get_inputs():
            feeds.setdefault(item.name, x)
        wanted = {i.name for i in self.session.get_inputs()}
        given = {n: v for n, v in feeds.items() if n in wanted}
        names = [*self.codes.values(), *self.outputs]
        results = dict(zip(names, self.session.run(names, given), strict=True))
        found_codes = {
            name: self._read(results[stored], self.formats[name])
            for name, stored in self.codes.items()
        }
        return found_codes, [results[name] for name in self.outputs]

    def _stored(self, codes: Array, found: Format) -> Array:
        if found.code == "e4m3":
            return (codes * found.scale).astype(np.float32)
        return self._turned((codes + _shift(found)).astype(found.stored), found)

    def _read(self, stored: Array, found: Format) -> Array:
        if found.code == "e4m3":
            return e4m3(stored / found.scale)
        return self._turned(stored, found).astype(np.float64) - _shift(found)

    def _turned(self, codes: Array, found: Format) -> Array:
        """Codes of T as those of its rows, and back."""
        turned = self.codes[found.name].endswith(ROWS)
        return np.swapaxes(codes, -1, -2) if turned else codes


def _shift(found: Format) -> int:
    return (HIGHER if found.signed else LOWER).get(found.stored, 0)


def _codes_of(name: str, made: set[str]) -> str:
    form = re.compile(re.escape(name) + RESTORED + "_quantized")
    found = [m for m in made if form.fullmatch(m)]
    assert found, f"the file has no codes of '{name}', which the report says it has"
    return found[0]


def _dequantized(graph: onnx.GraphProto, codes: str) -> str:
    (found,) = [n.output[0] for n in graph.node if codes in n.input]
    return str(found)
