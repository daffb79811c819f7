"""One function a finding: it fills the folder and returns the words of the command and its code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fuzz.edits import sparse
from fuzz.seeds import CHOICES, branched, no_transformer, vit

QUANTIZE = (
    *("quantize", "model.onnx", "--calib", "noise", "--images", "4", "--threads", "1"),
    *("--quantizer", "vanilla"),
)
SHORT = (*QUANTIZE, "--no-report")
Case = tuple[tuple[str, ...], int]


def constant_if(folder: Path) -> Case:
    """An If of a constant over two Identities was a value with two owners."""
    return _saved(branched(), folder, SHORT, 0)


def scale_of_zero(folder: Path) -> Case:
    """A scale of QKᵀ that is zero went into the weight of q as one over it."""
    model = vit()
    multiplied = {name for n in model.graph.node if n.op_type == "Mul" for name in n.input}
    scales = [t for t in model.graph.initializer if t.name in multiplied and not t.dims]
    assert scales
    for scale in scales:
        scale.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), scale.name))
    words = tuple("deploy" if word == "vanilla" else word for word in SHORT)
    return _saved(model, folder, words, 0)


def name_that_is_no_text(folder: Path) -> Case:
    """protobuf gives names that are not UTF-8 as bytes, and onnx_ir could not write them."""
    content = vit().SerializeToString()
    name = vit().graph.node[3].name.encode()
    assert name
    (folder / "model.onnx").write_bytes(content.replace(name, name[:-1] + b"\xb1"))
    return ("inspect", "model.onnx"), 2


def dims_of_other_data(folder: Path) -> Case:
    """Weights whose dims and data disagree ended in NumPy's reshape."""
    model = vit()
    _weight(model, (8,)).dims[:] = [1]
    return _saved(model, folder, SHORT, 2)


def negative_dim_of_a_weight(folder: Path) -> Case:
    """NumPy takes -1 for 'what is left', onnx does not."""
    model = vit()
    _weight(model, (8,)).dims[:] = [-1]
    return _saved(model, folder, SHORT, 2)


def empty_weight(folder: Path) -> Case:
    model = vit()
    tensor = _weight(model, (8, 24))
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 0), np.float32), tensor.name))
    return _saved(model, folder, SHORT, 2)


def no_image_in_a_batch(folder: Path) -> Case:
    """A batch of 0 images is one of any size."""
    model = vit()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    return _saved(model, folder, SHORT, 0)


def no_row_in_an_image(folder: Path) -> Case:
    model = vit()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -5
    return _saved(model, folder, SHORT, 2)


def a_million_images_in_a_batch(folder: Path) -> Case:
    """Took minutes, then all memory."""
    return _saved(vit(batch=1 << 20), folder, SHORT, 2)


def attribute_of_no_function(folder: Path) -> Case:
    model = vit()
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    node.attribute[0].ref_attr_name = "alpha"
    return _saved(model, folder, SHORT, 2)


def sparse_weights(folder: Path) -> Case:
    """onnx_ir drops them: the weight became an input that nobody feeds."""
    import random

    model = vit()
    sparse(model, random.Random(0))
    return _saved(model, folder, SHORT, 0)


def runs_for_no_image(folder: Path) -> Case:
    """A Reshape that fails at run time: ONNX Runtime's own exception, and its log on stderr."""
    model = vit()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and numpy_helper.to_array(tensor).size == 4:
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, 5, 2, 4]), tensor.name))
            break
    del model.graph.value_info[:]
    return _saved(model, folder, SHORT, 2)


def split_of_no_axis(folder: Path) -> Case:
    """What ONNX Runtime refuses too was called a fault of the package."""
    model = vit()
    split = next(n for n in model.graph.node if n.op_type == "Split")
    split.input[0] = _weight(model, (8,)).name
    return _saved(model, folder, SHORT, 2)


def attention_as_output(folder: Path) -> Case:
    """q, k or v as an output of the graph could not be unpacked."""
    model = vit()
    node = next(
        n for n in model.graph.node if n.op_type == "Transpose" and len(n.attribute[0].ints) == 4
    )
    shape = ["batch", 2, 6, 4]
    model.graph.output.append(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape)
    )
    words = ("quantize", "model.onnx", "--calib", "noise", "--images", "4", "--threads", "1")
    return _saved(model, folder, (*words, "--no-report"), 0)


def weight_as_output(folder: Path) -> Case:
    model = vit()
    name = _weight(model, (8, 4)).name
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 4]))
    return _saved(model, folder, SHORT, 2)


def weights_of_a_branch_elsewhere(folder: Path) -> Case:
    """External data was looked for in the graph and its functions, not in branches."""
    model = branched()
    choice = next(n for n in model.graph.node if n.op_type == "If")
    tensor = choice.attribute[0].g.initializer.add()
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), "stolen"))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../../etc/hostname")
    return _saved(model, folder, SHORT, 2)


def long_image_names(folder: Path) -> Case:
    """Attention pictures have the image's name and more; a name of 251 bytes is one too many."""
    return _with_images(folder, "a" * 251 + ".png", "é" * 100 + ".png")


def names_that_are_no_text(folder: Path) -> Case:
    return _with_images(folder, os.fsdecode(b"\xff\xfe.png"), "\x1b[31m\n.png", "<b>&.png")


def a_long_output(folder: Path) -> Case:
    words, _ = _saved(vit(), folder, SHORT, 2)
    return (*words, "--output", "o" * 250), 2


def weights_near_the_end_of_floats(folder: Path) -> Case:
    """What equalisation expects of 1e30 squared is no number; NaN stood in the report."""
    model = vit(CHOICES[4])
    name = [n for n in model.graph.node if n.op_type == "LayerNormalization"][-1].input[2]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.full(8, 1e29, np.float32), name))
    _saved(model, folder, (), 0)
    words = ("quantize", "model.onnx", "--calib", "noise", "--images", "4", "--threads", "1")
    return (*words, "--target", "tensorrt", "--no-report"), 0


def no_class(folder: Path) -> Case:
    return _saved(no_transformer(), folder, SHORT, 0)


def scales_of_a_tensor_with_an_axis(folder: Path) -> Case:
    """One scale and an axis: PPQ's PermissionError went through as one of the system's."""
    from fuzz.texts import made

    model, text = made("vanilla")
    report = json.loads(text)
    next(t for t in report["tensors"] if t["granularity"] == "tensor")["axis"] = 1
    (folder / "model.onnx").write_bytes(model)
    (folder / "report.json").write_text(json.dumps(report))
    return (*SHORT, "--scales", "report.json"), 2


def factors_behind_an_integer_output(folder: Path) -> Case:
    """The residual stream as an output of its own: its factors are multiplied in float, behind the
    codes, where the interpreter took every product for one of integers."""
    model = vit()
    stream = [node for node in model.graph.node if node.op_type == "Add"][-2]
    info = helper.make_tensor_value_info(stream.output[0], TensorProto.FLOAT, ["batch", 6, 8])
    model.graph.output.append(info)
    words = tuple(word for word in QUANTIZE if word not in ("--quantizer", "vanilla"))
    return _saved(model, folder, (*words, "--target", "integer", "--no-pictures"), 0)


def a_norm_with_a_scale_for_each_token(folder: Path) -> Case:
    """The integer target took every scale for one of channels."""
    model = vit()
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    tensor = next(t for t in model.graph.initializer if t.name == norm.input[1])
    gamma = np.broadcast_to(numpy_helper.to_array(tensor), (6, 8)).copy()
    model.graph.initializer.append(numpy_helper.from_array(gamma, "gamma of tokens"))
    norm.input[1] = "gamma of tokens"
    words = tuple(word for word in SHORT if word not in ("--quantizer", "vanilla"))
    return _saved(model, folder, (*words, "--target", "integer"), 2)


def a_norm_with_a_scale_of_more_axes(folder: Path) -> Case:
    model = vit()
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(t for t in model.graph.initializer if t.name == norm.input[1]).dims[:] = [1, 1, 8]
    words = tuple(word for word in SHORT if word not in ("--quantizer", "vanilla"))
    return _saved(model, folder, (*words, "--target", "integer"), 0)


def _saved(model: onnx.ModelProto, folder: Path, words: tuple[str, ...], code: int) -> Case:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return words, code


def _weight(model: onnx.ModelProto, dims: tuple[int, ...]) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if tuple(t.dims) == dims)


def _with_images(folder: Path, *names: str) -> Case:
    (folder / "in").mkdir()
    for name in names:
        Image.new("RGB", (12, 8), "red").save(folder / "in" / name)
    _saved(vit(), folder, (), 0)
    words = ("quantize", "model.onnx", "--calib", "in", "--threads", "1", "--quantizer", "vanilla")
    return (*words, "--analysis-images", "2"), 0


CASES: tuple[Callable[[Path], Case], ...] = (
    constant_if,
    scale_of_zero,
    name_that_is_no_text,
    dims_of_other_data,
    negative_dim_of_a_weight,
    empty_weight,
    no_image_in_a_batch,
    no_row_in_an_image,
    a_million_images_in_a_batch,
    attribute_of_no_function,
    sparse_weights,
    runs_for_no_image,
    split_of_no_axis,
    attention_as_output,
    weight_as_output,
    weights_of_a_branch_elsewhere,
    long_image_names,
    names_that_are_no_text,
    a_long_output,
    weights_near_the_end_of_floats,
    no_class,
    scales_of_a_tensor_with_an_axis,
    factors_behind_an_integer_output,
    a_norm_with_a_scale_for_each_token,
    a_norm_with_a_scale_of_more_axes,
)
