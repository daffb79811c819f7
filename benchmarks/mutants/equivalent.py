"""Mutants that change nothing that could be seen, each with the reason: read by a person, not run.

Of a module (or of all) a part of a line as it is, and as the mutant has it; spaces do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ONE_OUTPUT = "the node has one output"
HALVINGS = "halvings beyond the 53 bits of float64"

EQUIVALENT: tuple[tuple[str, str, str, str], ...] = (
    ("", "reshape(-1", "reshape(-2", "NumPy leaves open any size below zero"),
    ("", "reshape(-1", "reshape(~1", "NumPy leaves open any size below zero"),
    ("", "[-1 if i ==", "[~1 if i ==", "NumPy leaves open any size below zero"),
    ("", "[-1 if i ==", "[-2 if i ==", "NumPy leaves open any size below zero"),
    ("", "shape[axis] = -1", "shape[axis] = ~1", "NumPy leaves open any size below zero"),
    ("", "shape[axis] = -1", "shape[axis] = -2", "NumPy leaves open any size below zero"),
    ("", "threads: int = 0,", "threads: int = 1,", "the number of threads changes no result"),
    ("", "workers: int = 1,", "workers: int = 2,", "the number of workers changes no result"),
    ("", "inputs) > 2", "inputs) != 2", "an op with a weight has two inputs or three"),
    ("calibration/histogram.py", "clip(place - first, 0,", "clip(place - first, -1,",
     "what lies outside is taken from the outer bins"),
    ("calibration/mean_centred.py", "index == 1 and", "index <= 1 and",
     "the first input of such a product is made by a softmax, which is no layout op"),
    ("calibration/pearson.py", "maximum(power, 0)", "maximum(power, -1)",
     "a sum of squares is not below zero"),
    ("calibration/percentile.py", "maximum(total, 1)", "maximum(total, 0)",
     "a histogram is of one value at least"),
    ("calibration/product_samples.py", "initial=0)", "initial=-1)",
     "a maximum of magnitudes of one value at least is not below zero"),
    ("equalization/channel_axis.py", 'get_int("axis", 0)', 'get_int("axis", -1)',
     "a Concat has an axis (ONNX)"),
    ("equalization/channel_steps.py", "if n.inputs[0] is not None}", "if n.inputs[1] is not None}",
     "a linear has both"),
    ("equalization/foldings.py", "value = node.outputs[0]", "value = node.outputs[-1]", ONE_OUTPUT),
    ("equalization/foldings.py", "before = node.inputs[0]", "before = node.inputs[-1]",
     "a Concat, which is looked for, leaves no rows of one tensor, which is asked below"),
    ("equalization/equalize.py", "if str(product.outputs[0]", "if str(product.outputs[-1]",
     ONE_OUTPUT),
    ("equalization/equalize.py", "if len(uses) != 1 or uses", "if len(uses) > 1 or uses",
     "keys are read by a product, or they would be none"),
    ("equalization/experts.py", "whole = results[0]", "whole = results[-1]",
     "there is one, or the Concat takes its place"),
    ("equalization/factor_search.py", "range(60)", "range(61)", HALVINGS),
    ("equalization/factor_search.py", "range(60)", "range(59)", HALVINGS),
    ("equalization/patch_forms.py", '("Concat", "Shape") or', '("Concat", "Shape") and',
     "what a Concat or a part of a Split holds is not the whole, which is looked at below"),
    ("equalization/patch_forms.py", "isinstance(d, int) else 0 for d in sides[1:]",
     "isinstance(d, int) else 1 for d in sides[1:]", "all sides are numbers there"),
    ("equalization/patch_forms.py", "channels, -1)", "channels, -2)",
     "NumPy leaves open any size below zero"),
    ("equalization/pixels.py", "uses[0].inputs", "uses[-1].inputs", "there is one"),
    ("equalization/runtime_forms.py", "len(output.shape) != 3 or", "len(output.shape) < 3 or",
     "with four axes no part has its tokens where they would be looked for"),
    ("equalization/runtime_forms.py", "part = found[:, 0] %", "part = found[:, -1] %",
     "of all tokens the columns are the same, or they are refused below"),
    ("equalization/runtime_forms.py", "found.shape[1] != tokens", "found.shape[1] > tokens",
     "arrays of other shapes are not equal, which is asked below"),
    ("equalization/streams.py", "if value is None or axis is None or size",
     "if value is None and axis is None or size", "the size is None where one of them is"),
    ("equalization/streams.py", "node.inputs[data[0]], node", "node.inputs[data[-1]], node",
     "there is one"),
    ("equalization/rotation.py", "index, made.outputs[0]", "index, made.outputs[-1]", ONE_OUTPUT),
    ("equalization/writer.py", "**attributes)[0]", "**attributes)[-1]", ONE_OUTPUT),
    ("numerics/blockwise.py", "keepdims=True) > 0, shares", "keepdims=True) != 0, shares",
     "no share is below zero"),
    ("numerics/blockwise.py", "shares, 1.0)", "shares, 2.0)",
     "any one number for all rows of a block gives the same scales"),
    ("numerics/blockwise.py", "np.asarray(scale[:, 0]", "np.asarray(scale[:, -1]",
     "the axis has one entry"),
    ("numerics/codes/twin.py", "return (last + coarse", "return (last ^ coarse",
     "the two have no bit in common"),
    ("numerics/ptf.py", "if limit else STRENGTHS[:1]", "if limit else STRENGTHS[:2]",
     "without a factor all strengths give the same one"),
    ("qdq/kernel_forms.py", "move.outputs[0].name = u", "move.outputs[-1].name = u", ONE_OUTPUT),
    ("qdq/lowering.py", "weight is not None and weight.shape", "weight is not None or weight.shape",
     "columns are found where the weight is a constant, which has a shape"),
    ("qdq/lowering.py", "read = node.inputs[0] if", "read = node.inputs[-1] if", "there is one"),
    ("qdq/lowering.py", "if not is_layout(use[0]) or", "if not is_layout(use[0]) and",
     "an op that takes the scaled tensor itself is no plain reader, and other ways are none"),
    ("qdq/small_scales.py", "astype(np.float64), 1.0)", "astype(np.float64), 2.0)",
     "the factor of a scale of zero is 1 either way"),
    ("qdq/small_scales.py", "shape = (-1, *", "shape = (-2, *",
     "NumPy leaves open any size below zero"),
    ("qdq/unit_constants.py", "if weight is None or data", "if weight is None and data",
     "without a weight on codes there is no scale, and a unit's data are on codes"),
    ("qdq/unit_constants.py", '"axis": 0} if np.ndim', '"axis": -1} if np.ndim',
     "codes with a scale for each are a bias, which has one axis"),
    ("qdq/factors.py", "factor.ndim == 1", "factor.ndim <= 1", "a factor has an axis of channels"),
    ("qdq/sums.py", "axes.size == 0", "axes.size <= 0", "no size is below zero"),
    ("qdq/small_scales.py", "factor.max() == 1", "factor.max() <= 1", "factors are 1 at least"),
    *(
        ("qdq/" + name, f"codes.{end}(initial=0)", f"codes.{end}(initial={other})",
         "codes from -8 to 7 are looked for, and the others are none")
        for name in ("four_bits.py", "unit_constants.py")
        for end in ("min", "max")
        for other in (-1, 1)
    ),
    ("qdq/unit_constants.py", "least.max(initial=0)", "least.max(initial=-1)",
     "a maximum of magnitudes is not below zero"),
    *(
        ("qdq/unit_constants.py", 'get_int("axis", 0)', f'get_int("axis", {other})',
         "several scales of a weight come with their axis")
        for other in (-1, 1)
    ),
    ("qdq/unit_numbers.py", "node.inputs[1:3]", "node.inputs[1:4]",
     "QuantizeLinear and DequantizeLinear have three inputs"),
    ("qdq/unit_numbers.py", "data[:1]", "data[:2]",
     "all but a Concat that keep the numbers read one tensor of floats"),
    ("qdq/unit_constants.py", "not made or held is None or", "not made and held is None or",
     "a unit has codes behind it, and what makes its weight is a DequantizeLinear"),
    ("qdq/weights.py", "if zero_point is None or", "if zero_point is None and",
     "every DequantizeLinear that lowering writes has a constant zero point"),
    ("targets/integer/builder.py", "output = node.outputs[0]", "output = node.outputs[-1]",
     ONE_OUTPUT),
    ("targets/integer/interpreter.py", '"keepdims", 1)', '"keepdims", 2)',
     "any number but zero is true"),
    ("qdq/half.py", "v.dtype == FLOAT and", "v.dtype <= FLOAT and",
     "FLOAT is the first of the types, and an input of a model has one"),
    ("targets/integer/products.py", "weight.shape[axis], -1)", "weight.shape[axis], -2)",
     "NumPy leaves open any size below zero"),
    ("targets/integer/fixed_point.py", "max(most, 1.0)", "max(most, 2.0)",
     "what is below 2^61 needs no room"),
    ("targets/integer/nodes.py", "constant(node, 1, 1.0)", "constant(node, 1, 0.0)",
     "a LayerNormalization has a scale (ONNX)"),
    ("targets/integer/nodes.py", "[bound * count]", "[bound / count]",
     "the sum of less than 2^22 tokens needs no smaller shift"),
)  # fmt: skip


def reason(path: Path, diff: Sequence[str]) -> str | None:
    """Why a mutant of a module changes nothing; None where that is not known."""
    old, new = (["".join(x[1:].split()) for x in diff if x[0] == sign] for sign in "-+")
    if len(old) != 1:
        return None
    for name, *parts, why in EQUIVALENT:
        before, behind = ("".join(part.split()) for part in parts)
        ours = path.as_posix().endswith(f"ptq_onnx/{name}" if name else ".py")
        if ours and before in old[0] and new == [old[0].replace(before, behind, 1)]:
            return why
    return None
