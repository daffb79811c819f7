"""A small attention block in QDQ format, right for one target, and edits that break it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

TOKENS, WIDTH = 8, 64
SYMMETRIC = np.int8(0)
ACTIVATION = {"tensorrt": SYMMETRIC, "onnxruntime": np.uint8(120), "openvino": np.uint8(120)}
ATTENTION = {"tensorrt": SYMMETRIC, "onnxruntime": np.uint8(120), "openvino": SYMMETRIC}
SOFTMAX = {
    "tensorrt": (SYMMETRIC, 1 / 127),
    "onnxruntime": (np.uint8(0), 1 / 255),
    "openvino": (np.uint8(0), 1 / 255),
}


class Block:
    """``conforming`` builds the whole; each edit changes one thing of it."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.opset = opset
        self.functions: list[onnx.FunctionProto] = []

    # --- building ---------------------------------------------------------------------------

    def const(self, name: str, array: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def add(self, op: str, name: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node ``name`` with the output ``name``; returns it."""
        node = helper.make_node(op, inputs, [name], name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def pair(self, name: str, data: str, zero_point: Any, scale: float = 0.05) -> str:
        """``name_q`` and ``name_dq`` on a tensor."""
        scales = self.const(f"{name}_scale", np.float32(scale))
        points = self.const(f"{name}_zero_point", np.asarray(zero_point))
        codes = self.add("QuantizeLinear", f"{name}_q", data, scales, points)
        return self.add("DequantizeLinear", f"{name}_dq", codes, scales, points)

    def weight(
        self, name: str, shape: tuple[int, ...] = (WIDTH, WIDTH), axis: int = 1, dtype: Any = "int8"
    ) -> str:
        """``name_w_dq`` of stored codes with a scale per channel."""
        count = shape[axis]
        codes = np.random.default_rng(0).integers(-7, 7, shape).astype(dtype)
        scales = self.const(f"{name}_w_scale", np.linspace(0.01, 0.02, count, dtype=np.float32))
        points = self.const(f"{name}_w_zero_point", np.zeros(count, dtype))
        stored = self.const(f"{name}_w", codes)
        return self.add("DequantizeLinear", f"{name}_w_dq", stored, scales, points, axis=axis)

    def linear(self, name: str, data: str) -> str:
        """MatMul ``name`` and Add ``name_bias``."""
        product = self.add("MatMul", name, data, self.weight(name))
        return self.add("Add", f"{name}_bias", product, self.const(f"{name}_b", _ones(WIDTH)))

    # --- editing ----------------------------------------------------------------------------

    def node(self, name: str) -> onnx.NodeProto:
        return next(n for n in self.nodes if n.name == name)

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def before(self, name: str, op: str, new: str, *inputs: str, **attributes: Any) -> str:
        """As ``add``, but in front of the node ``name``."""
        output = self.add(op, new, *inputs, **attributes)
        added = self.nodes.pop()
        self.nodes.insert(self.nodes.index(self.node(name)), added)
        return output

    def set(self, name: str, index: int, value: str) -> None:
        """Let the node ``name`` read ``value``."""
        self.node(name).input[index] = value

    def proto(self, output: str = "y") -> onnx.ModelProto:
        shape = ["N", TOKENS, WIDTH]
        graph = helper.make_graph(
            self.nodes,
            "block",
            [helper.make_tensor_value_info("x", 1, shape)],
            [helper.make_tensor_value_info(output, 1, shape)],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        for domain in {n.domain for n in self.nodes} - {""}:
            opsets.append(helper.make_opsetid(domain, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def conforming(target: str) -> Block:
    """LayerNorm, attention, residual add, GELU and a linear behind it."""
    block, zero, inner = Block(), ACTIVATION[target], ATTENTION[target]
    ones, zeros = block.const("gamma", _ones(WIDTH)), block.const("beta", 0 * _ones(WIDTH))
    norm = block.add("LayerNormalization", "norm", "x", ones, zeros)
    shared = block.pair("norm", norm, zero)
    q, k, v = (block.linear(name, shared) for name in ("q", "k", "v"))
    q_codes = block.pair("q", q, inner)
    k_codes = block.pair("k", block.add("Transpose", "kt", k, perm=[0, 2, 1]), inner)
    scores = block.add("MatMul", "qk", q_codes, k_codes)
    attention = block.pair("p", block.add("Softmax", "softmax", scores, axis=-1), *SOFTMAX[target])
    mixed = block.add("MatMul", "av", attention, block.pair("v", v, inner))
    proj = block.linear("proj", block.pair("o", mixed, zero))
    residual = block.add("Add", "residual", "x", proj)
    gelu = block.add("Gelu", "gelu", residual)
    fc2 = block.linear("fc2", block.pair("gelu", gelu, zero))
    block.add("Add", "y", residual, fc2)
    return block


def _ones(count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32)


# --- what breaks a rule: each takes a block and changes it -------------------------------------


def later_opset(block: Block) -> None:
    block.opset = 29


def foreign_op(block: Block) -> None:
    block.node("gelu").domain = "com.example"


def integer_matmul(block: Block) -> None:
    """fc2 by MatMulInteger."""
    block.const("int_scale", np.float32(0.1))
    block.const("int_zero", np.int8(0))
    stored = block.const("int_w", np.ones((WIDTH, WIDTH), np.int8))
    product = block.before("y", "MatMulInteger", "integer", "gelu_q", stored)
    block.set("y", 1, block.before("y", "Cast", "cast", product, to=1))
    for name in ("fc2", "fc2_bias", "fc2_w_dq", "gelu_dq"):
        block.nodes.remove(block.node(name))


def unsigned_codes(block: Block) -> None:
    block.const("norm_zero_point", np.uint8(0))


def wide_codes(block: Block) -> None:
    block.const("norm_zero_point", np.uint16(0))


def coded_bias(block: Block) -> None:
    block.const("fc2_b", np.ones(WIDTH, np.int32))
    block.const("bias_scale", np.float32(0.001))
    bias = block.before("fc2_bias", "DequantizeLinear", "bias_dq", "fc2_b", "bias_scale")
    block.set("fc2_bias", 1, bias)


def early_fp8(block: Block) -> None:
    """fc2 in FP8, in an opset that has none."""
    mixed_types(block)
    kind = ml_dtypes.float8_e4m3fn
    block.const("gelu_zero_point", block.array("gelu_zero_point").astype(kind))
    block.opset = 18
    block.node("gelu").op_type = "Relu"  # Gelu came with opset 20


def all_fp8(block: Block) -> None:
    for name, tensor in list(block.constants.items()):
        if tensor.data_type == onnx.TensorProto.INT8:
            block.const(name, block.array(name).astype(ml_dtypes.float8_e4m3fn))
    block.const("p_scale", np.float32(1 / 448))


def shifted(block: Block) -> None:
    block.const("norm_zero_point", np.int8(3))


def other_zero_point_type(block: Block) -> None:
    block.const("point_of_dq", np.int8(0))
    kind = numpy_helper.to_array(block.constants["norm_zero_point"]).dtype
    if kind == np.int8:
        block.const("point_of_dq", np.uint8(0))
    block.const("norm_zero_point", np.zeros((), kind))
    block.set("norm_dq", 2, "point_of_dq")


def computed_scale(block: Block) -> None:
    largest = block.before("norm_q", "ReduceMax", "largest", "x", keepdims=0)
    block.set("norm_q", 1, largest)
    block.set("norm_dq", 1, largest)


def zero_scale(block: Block) -> None:
    block.const("norm_scale", np.float32(0))


def infinite_scale(block: Block) -> None:
    scales = block.array("fc2_w_scale").copy()
    scales[3] = np.inf
    block.const("fc2_w_scale", scales)


def two_scales(block: Block) -> None:
    block.set("norm_dq", 1, block.const("other_scale", np.float32(0.07)))


def scale_per_channel(block: Block) -> None:
    block.const("o_scale", np.linspace(0.04, 0.05, WIDTH, dtype=np.float32))
    point = block.array("o_zero_point")
    block.const("o_zero_point", np.full(WIDTH, point, point.dtype))
    for name in ("o_q", "o_dq"):
        block.node(name).attribute.append(helper.make_attribute("axis", 2))


def scale_per_channel_of_add(block: Block) -> None:
    """The residual branch quantized per channel."""
    point = block.array("norm_zero_point")
    stem = block.const("branch_scale", np.linspace(0.04, 0.05, WIDTH, dtype=np.float32))
    points = block.const("branch_zero", np.full(WIDTH, point, point.dtype))
    codes = block.before("residual", "QuantizeLinear", "branch_q", "x", stem, points, axis=2)
    value = block.before("residual", "DequantizeLinear", "branch_dq", codes, stem, points, axis=2)
    block.set("residual", 0, value)


def inner_weight_axis(block: Block) -> None:
    block.node("fc2_w_dq").attribute[0].i = 0


def shifted_weight(block: Block) -> None:
    block.const("fc2_w_zero_point", np.full(WIDTH, 2, np.int8))


def unsigned_weight(block: Block) -> None:
    block.const("fc2_w", block.array("fc2_w").astype(np.int16).astype(np.uint8))
    block.const("fc2_w_zero_point", np.zeros(WIDTH, np.uint8))


def float_activation(block: Block) -> None:
    block.set("fc2", 0, "gelu")
    for name in ("gelu_dq", "gelu_q"):
        block.nodes.remove(block.node(name))


def float_weight(block: Block) -> None:
    block.set("fc2", 1, block.const("fc2_float", np.ones((WIDTH, WIDTH), np.float32)))
    block.nodes.remove(block.node("fc2_w_dq"))


def float_weight_beside(block: Block) -> None:
    """Of q, which reads the values of codes that k and v compute with."""
    block.set("q", 1, block.const("q_float", np.ones((WIDTH, WIDTH), np.float32)))
    block.nodes.remove(block.node("q_w_dq"))


def float_value(block: Block) -> None:
    """The value of attention, in float."""
    block.set("av", 1, "v_bias")
    for name in ("v_dq", "v_q"):
        block.nodes.remove(block.node(name))


def float_linear(block: Block) -> None:
    float_activation(block)
    float_weight(block)


def small_blocks(block: Block) -> None:
    """An int4 weight in blocks of 16."""
    narrow_weight(block, size=16)


def large_blocks(block: Block) -> None:
    """An int4 weight in blocks of 64."""
    narrow_weight(block, size=64)


def blocks_along_outputs(block: Block) -> None:
    narrow_weight(block, size=16, axis=1)


def narrow_weight(block: Block, size: int, axis: int = 0) -> None:
    """fc2 weight-only, int4 in blocks."""
    float_activation(block)
    shape = [WIDTH, WIDTH]
    shape[axis] //= size
    block.const("fc2_w", block.array("fc2_w").astype(ml_dtypes.int4))
    block.const("fc2_w_scale", np.full(shape, 0.01, np.float32))
    node = block.node("fc2_w_dq")
    del node.input[2]
    node.attribute[0].i = axis
    node.attribute.append(helper.make_attribute("block_size", size))


def mixed_types(block: Block) -> None:
    kind = ml_dtypes.float8_e4m3fn
    for name in ("fc2_w", "fc2_w_zero_point"):
        block.const(name, block.array(name).astype(kind))


def second_pair(block: Block) -> None:
    scale, point = "norm_scale", "norm_zero_point"
    codes = block.before("k", "QuantizeLinear", "again_q", "norm", scale, point)
    block.set("k", 0, block.before("k", "DequantizeLinear", "again_dq", codes, scale, point))


def late_attention_scale(block: Block) -> None:
    factor = block.const("factor", np.float32(0.125))
    block.set("softmax", 0, block.before("softmax", "Mul", "scaled", "qk", factor))


def calibrated_softmax(block: Block) -> None:
    block.const("p_scale", np.float32(0.9 / 127))


def wide_softmax(block: Block) -> None:
    block.const("p_scale", np.float32(1 / 100))


def calibrated_fp8_softmax(block: Block) -> None:
    all_fp8(block)
    block.const("p_scale", np.float32(0.9 / 448))


def mean_restored(block: Block) -> None:
    """An Add between the second product and its Q."""
    mean = block.const("mean", _ones(WIDTH))
    block.set("o_q", 0, block.before("o_q", "Add", "restored", "av", mean))


def heads(block: Block, count: int) -> None:
    """Several heads, [N, heads, tokens, width]."""
    split = block.const("split", np.array([0, TOKENS, count, WIDTH // count]))
    for name in ("q", "v"):
        apart = block.before(f"{name}_q", "Reshape", f"{name}_apart", f"{name}_bias", split)
        turned = block.before(f"{name}_q", "Transpose", f"{name}_t", apart, perm=[0, 2, 1, 3])
        block.set(f"{name}_q", 0, turned)
    block.set("kt", 0, block.before("kt", "Reshape", "k_apart", "k_bias", split))
    block.node("kt").attribute[0].ints[:] = [0, 2, 3, 1]
    turned = block.before("o_q", "Transpose", "o_t", "av", perm=[0, 2, 1, 3])
    joined = block.const("joined", np.array([0, TOKENS, WIDTH]))
    block.set("o_q", 0, block.before("o_q", "Reshape", "o_joined", turned, joined))


def narrow_heads(block: Block) -> None:
    heads(block, 8)


def moved_output(block: Block) -> None:
    """Two heads of 32: layout ops alone before the Q of the output."""
    heads(block, 2)


def repeated_tokens(block: Block, count: int) -> None:
    """Each key and value so many times."""
    times = block.const("times", np.array([1, count, 1]))
    block.set("kt", 0, block.before("kt", "Tile", "k_long", "k_bias", times))
    block.set("v_q", 0, block.before("v_q", "Tile", "v_long", "v_bias", times))


def many_tokens(block: Block) -> None:
    repeated_tokens(block, 65)


def most_tokens(block: Block) -> None:
    repeated_tokens(block, 64)


def late_int8_transpose(block: Block) -> None:
    """K turned behind its codes."""
    turn = block.node("kt")
    block.nodes.remove(turn)
    block.set("k_q", 0, "k_bias")
    block.nodes.insert(block.nodes.index(block.node("qk")), turn)
    turn.input[0] = "k_dq"
    block.set("qk", 1, "kt")


def late_transpose(block: Block) -> None:
    all_fp8(block)
    late_int8_transpose(block)


def pair_between_floats(block: Block) -> None:
    point = block.array("norm_zero_point")
    value = block.pair("stray", "qk", point)
    added = [block.nodes.pop(), block.nodes.pop()]
    at = block.nodes.index(block.node("softmax"))
    block.nodes[at:at] = added[::-1]
    block.set("softmax", 0, value)


def pair_before_gelu(block: Block) -> None:
    value = block.pair("stray", "residual", block.array("norm_zero_point"))
    added = [block.nodes.pop(), block.nodes.pop()]
    at = block.nodes.index(block.node("gelu"))
    block.nodes[at:at] = added[::-1]
    block.set("gelu", 0, value)


def signed_activation(block: Block) -> None:
    block.const("o_zero_point", np.int8(0))


def moved_signed_factor(block: Block) -> None:
    """k in int8, its Q in front of the Transpose."""
    block.const("k_zero_point", np.int8(int(block.array("k_zero_point")) - 128))
    turn, quantize = block.node("kt"), block.node("k_q")
    block.set("k_q", 0, turn.input[0])
    block.set("kt", 0, "k_q")
    block.set("k_dq", 0, "kt")
    block.nodes.remove(turn)
    block.nodes.insert(block.nodes.index(quantize) + 1, turn)


def residual_pair(block: Block) -> None:
    """The residual branch in codes, which an option may ask for."""
    value = block.pair("branch", "x", block.array("norm_zero_point"))
    added = [block.nodes.pop(), block.nodes.pop()]
    at = block.nodes.index(block.node("residual"))
    block.nodes[at:at] = added[::-1]
    block.set("residual", 0, value)


def wide_residual(block: Block) -> None:
    """The residual branch in 16-bit codes, which no product reads."""
    residual_pair(block)
    block.const("branch_zero_point", np.uint16(40000))


def branch_pair(block: Block) -> None:
    """The product's output in codes at the residual add, not the skip input."""
    value = block.pair("branch", "proj_bias", block.array("norm_zero_point"))
    added = [block.nodes.pop(), block.nodes.pop()]
    at = block.nodes.index(block.node("residual"))
    block.nodes[at:at] = added[::-1]
    block.set("residual", 1, value)


def half_scale(block: Block) -> None:
    """One scale in float16 between float32 tensors."""
    block.const("norm_scale", np.float32(0.0625))
    block.const("norm_half", np.float16(0.0625))
    block.set("norm_q", 1, "norm_half")


def wrapping_fp8(block: Block) -> None:
    all_fp8(block)
    block.node("norm_q").attribute.append(helper.make_attribute("saturate", 0))


def one_weight_scale(block: Block) -> None:
    block.const("fc2_w_scale", np.float32(0.01))
    block.const("fc2_w_zero_point", np.int8(0))


def transposed_weight(block: Block) -> None:
    """The weight as [N, K] and a Transpose behind its codes."""
    block.node("fc2_w_dq").attribute[0].i = 0
    block.set("fc2", 1, block.before("fc2", "Transpose", "turned", "fc2_w_dq", perm=[1, 0]))


def masked(block: Block) -> None:
    mask = block.const("mask", np.zeros((TOKENS, TOKENS), np.float32))
    block.set("softmax", 0, block.before("softmax", "Add", "masked", "qk", mask))


def quantized_in_graph(block: Block) -> None:
    """A float weight behind Q and DQ, as training with fake quantization leaves it."""
    block.const("fc2_w", block.array("fc2_w").astype(np.float32) * np.float32(0.01))
    inputs = "fc2_w", "fc2_w_scale", "fc2_w_zero_point"
    block.set("fc2_w_dq", 0, block.before("fc2_w_dq", "QuantizeLinear", "fc2_w_q", *inputs, axis=1))


def bare_conv(block: Block) -> None:
    """A convolution without Q on its output in front of the last add."""
    point = block.array("norm_zero_point")
    data = block.pair("image", "residual", point)
    weight = block.weight("conv", (TOKENS, TOKENS, 1), 0)
    block.add("Conv", "conv", data, weight)
    moved, block.nodes = block.nodes[-4:], block.nodes[:-4]
    at = block.nodes.index(block.node("y"))
    block.nodes[at:at] = moved
    block.set("y", 0, "conv")


def conv_with_output(block: Block) -> None:
    """A convolution whose output is quantized behind a Reshape, and read by floats."""
    bare_conv(block)
    shape = block.const("shape", np.array([0, 0, -1]))
    moved = block.before("y", "Reshape", "moved", "conv", shape)
    point = block.array("norm_zero_point")
    block.pair("conv_out", moved, point)
    pair, block.nodes = block.nodes[-2:], block.nodes[:-2]
    at = block.nodes.index(block.node("y"))
    block.nodes[at:at] = pair
    block.set("y", 0, block.before("y", "Relu", "relu", "conv_out_dq"))


def float_gemm_bias(block: Block) -> None:
    """fc2 as a Gemm of all tokens, transB, with a float bias."""
    rows = block.const("rows", np.array([-1, WIDTH]))
    flat = block.before("fc2", "Reshape", "flat", "gelu_dq", rows)
    block.node("fc2_w_dq").attribute[0].i = 0
    gemm = block.before("fc2", "Gemm", "gemm", flat, "fc2_w_dq", "fc2_b", transB=1)
    shape = block.const("shape", np.array([-1, TOKENS, WIDTH]))
    block.set("y", 1, block.before("fc2", "Reshape", "tokens", gemm, shape))
    for name in ("fc2", "fc2_bias"):
        block.nodes.remove(block.node(name))


def flat_linear(block: Block) -> None:
    """fc2 on a matrix: the optimizer makes a Gemm with a float bias of it."""
    rows = block.const("rows", np.array([-1, WIDTH]))
    block.set("fc2", 0, block.before("fc2", "Reshape", "flat", "gelu_dq", rows))
    shape = block.const("shape", np.array([-1, TOKENS, WIDTH]))
    block.set("y", 1, block.before("y", "Reshape", "tokens", "fc2_bias", shape))


def erf_gelu(block: Block) -> None:
    """x·(½·(1 + erf(x/√2)))"""
    root = block.const("root", np.float32(2**0.5))
    one, half = block.const("one", np.float32(1)), block.const("half", np.float32(0.5))
    x = "residual"
    erf = block.before("gelu", "Erf", "erf", block.before("gelu", "Div", "divided", x, root))
    sum_ = block.before("gelu", "Add", "sum", erf, one)
    node = block.node("gelu")
    block.before("gelu", "Mul", "halved", sum_, half)
    node.op_type, node.input[:] = "Mul", [x, "halved"]


def open_layer_norm(block: Block) -> None:
    """LayerNorm in pieces that the optimizer does not know: the variance as E[x²] − E[x]²."""
    axes = block.const("axes", np.array([-1]))
    epsilon = block.const("epsilon", np.float32(1e-5))
    mean = block.before("norm", "ReduceMean", "mean", "x", axes)
    squares = block.before("norm", "Mul", "squares", "x", "x")
    second = block.before("norm", "ReduceMean", "second", squares, axes)
    variance = block.before(
        "norm", "Sub", "variance", second, block.before("norm", "Mul", "mean2", mean, mean)
    )
    safe = block.before("norm", "Add", "safe", variance, epsilon)
    root = block.before("norm", "Sqrt", "root", safe)
    centred = block.before("norm", "Sub", "centred", "x", mean)
    node = block.node("norm")
    node.op_type, node.input[:] = "Div", [centred, root]


def wrong_shape(block: Block) -> None:
    """A weight that does not fit: only a runtime sees it."""
    block.const("beta", np.ones(WIDTH + 1, np.float32))
    block.set("fc2_bias", 1, "beta_of_fc2")
    block.const("beta_of_fc2", np.ones(WIDTH + 1, np.float32))


def positive_value(block: Block) -> None:
    """The value of attention as uint8."""
    block.const("v_zero_point", np.uint8(0))


def middle_value(block: Block) -> None:
    """The value of attention as uint8, symmetric."""
    block.const("v_zero_point", np.uint8(128))


def shifted_query(block: Block) -> None:
    block.const("q_zero_point", np.int8(4))


def log2_map(block: Block, *levels: float, codes: int = onnx.TensorProto.UINT8) -> None:
    """The attention map in log2 codes, read back from a table: powers of two, or ``levels``."""
    found = levels or (*(2.0**-c for c in range(15)), 0.0)
    block.const("p_levels", np.array(found, np.float32))
    block.const("p_last", np.float32(len(found) - 1))
    block.const("p_first", np.float32(0))
    negated = block.before("av", "Neg", "p_level", block.before("av", "Log", "p_log", "softmax"))
    clipped = block.before("av", "Clip", "p_clip", negated, "p_first", "p_last")
    coded = block.before("av", "Cast", "p_codes", clipped, to=codes)
    index = block.before("av", "Cast", "p_index", coded, to=onnx.TensorProto.INT32)
    block.set("av", 0, block.before("av", "Gather", "p_values", "p_levels", index))
    for name in ("p_dq", "p_q"):
        block.nodes.remove(block.node(name))


def other_table(block: Block) -> None:
    """One level is no power of two."""
    log2_map(block, 1.0, 0.5, 0.3, 0.125, 0.0)


def wide_table_index(block: Block) -> None:
    """The table is read by what was never a code of 8 bits."""
    log2_map(block, codes=onnx.TensorProto.INT32)


def one_level(block: Block) -> None:
    """A table that only switches on and off."""
    log2_map(block, 1.0, 0.0)


def log2_map_of_floats(block: Block) -> None:
    """Log2 codes beside a value in float: the product is float on purpose."""
    log2_map(block)
    float_value(block)
