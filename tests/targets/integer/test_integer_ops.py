"""The simulator's integer arithmetic: which nodes have it, and what it gives to the others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from prepared_models import DIGITS, images, prepared, quantized
from small_graph import SmallGraph

from ptq_onnx.blocks.walking import is_layout, name_of
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.targets.integer.simulated_steps import integer_overrides

UINT8 = Rule(8, signed=False, symmetric=False)


def spec(scale: float, zero: int, rule: Rule = UINT8, factor: object = None) -> TensorSpec:
    array = None if factor is None else np.asarray(factor, np.float32)
    return TensorSpec("t", rule, np.array(scale, np.float32), np.array(zero), factor=array)


def small() -> tuple[ir.Model, dict[str, str]]:
    g = SmallGraph(("batch", 4, 8))
    norm = g("LayerNormalization", "x", np.ones(8), np.zeros(8), axis=-1)
    softmax = g("Softmax", norm, axis=-1)
    out = g("Relu", softmax)
    return g.model(out), {"norm": norm, "softmax": softmax}


def test_nodes_between_quantized_tensors_have_it_and_the_others_are_told() -> None:
    model, names = small()
    log2 = Rule(4, False, False, code=Log2())
    specs = {
        "x": spec(0.1, 128),
        names["norm"]: spec(0.05, 128),
        names["softmax"]: spec(1, 0, log2),
    }
    found, left = integer_overrides(model, specs)
    assert [name_of(node) for node in model.graph] == [*found, *left]
    assert len(found) == 2
    del specs[names["softmax"]]
    found, left = integer_overrides(model, specs)
    assert len(found) == 1
    assert len(left) == 2


def test_free_factors_on_a_layer_norm_keep_it_in_float() -> None:
    model, names = small()
    ratio = spec(0.1, 128, Rule(8, False, False, PerChannel()), np.linspace(0.1, 1, 8))
    found, left = integer_overrides(model, {"x": ratio, names["norm"]: spec(0.05, 128)})
    assert not found
    assert len(left) == 3


def test_layer_norm_of_values_is_near_the_float_one() -> None:
    model, names = small()
    found, _ = integer_overrides(model, {"x": spec(0.02, 128), names["norm"]: spec(0.03, 128)})
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(-128, 128, (5, 4, 8))).float() * 0.02
    expected = torch.nn.functional.layer_norm(x, (8,)).clamp(-128 * 0.03, 127 * 0.03)
    (override,) = found.values()
    assert (override([x]) - expected).abs().max() <= 0.5 * 0.03 * 1.01


def test_every_node_of_the_embedded_model_computes_in_integers() -> None:
    model, quantizer = prepared(DIGITS).model, quantized(target="integer")
    found, left = integer_overrides(model, quantizer.specs)
    assert left == []
    assert list(found) == [name_of(node) for node in model.graph if not is_layout(node)]


def test_a_float_op_reads_the_accumulator_before_it() -> None:
    """A residual in float takes the 32-bit sums of proj; the result is near."""
    model = prepared(DIGITS).model
    quantizer = quantized(keep_float=("residual1@2",), arithmetic="integer")
    found, left = integer_overrides(model, quantizer.specs)
    roles = prepared(DIGITS).blocks.roles
    assert [roles[name].label for name in left] == [
        f"blocks.2.{role}" for role in ("residual1", "norm2", "residual2")
    ]
    batch = images()[:2]
    logits = Simulator(model, quantizer, overrides=found).run(batch)["logits"]
    expected = Simulator(model, None).run(batch)["logits"]
    noise = ((logits - expected) ** 2).sum() / (expected**2).sum()
    assert 0 < noise < 0.02
