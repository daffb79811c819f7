"""``--calib psaq``: the calibration images made from the prepared float model, once for a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import onnx_ir as ir

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import NORMS, ahead_to, is_constant, is_linear, name_of, source
from ptq_onnx.calibration.class_output import logits_output
from ptq_onnx.config import stages
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.source import ImageSource
from ptq_onnx.images.synthetic import PSAQ, SYNTHETIC, MadeSource
from ptq_onnx.pipeline.reading import Inputs
from ptq_onnx.pipeline.request import Request
from ptq_onnx.preparation.prepare import Prepared, own_faults
from ptq_onnx.progress import Stages

if TYPE_CHECKING:
    from ptq_onnx.engine.model_images import Attended, Reads
    from ptq_onnx.engine.torch_form import TorchForm

NO_CLASSES = (
    f"--calib {PSAQ}: the model has no output of logits [batch, classes], so that its images show"
    " no classes."
)
NO_ATTENTION = (
    f"--calib {PSAQ}: the model has no attention, so that its images differ from drawn ones by"
    " classes alone."
)
ON_MADE = (
    "Closeness measured on images that were made from the model says little of photographs: give"
    " --val."
)


def are_unmade(images: ImageSource) -> TypeGuard[MadeSource]:
    """Whether images are to be made from the model, and are not yet."""
    return isinstance(images, MadeSource) and images.made is None


def with_made_images(request: Request, inputs: Inputs, begin: Stages) -> Inputs:
    """The inputs with their calibration images, and notes on them, where they are to be made; as
    they are otherwise. Raises ConfigError where the model has no gradient in torch."""
    source, prepared = inputs.images, inputs.prepared
    if not are_unmade(source):
        return inputs
    from ptq_onnx.engine.model_images import STEPS, changed
    from ptq_onnx.engine.torch_form import TorchForm

    image = image_input(prepared.model)
    batch = None if image.shape is None else image.shape[0]
    with own_faults(prepared.path, "quantized"):
        form = TorchForm(prepared.model.graph, {})
        _refuse_what_torch_cannot(prepared, form, image)
        reads = reads_of(prepared)
        if reads.logits is None and not reads.attended:
            raise _refused(prepared, "it has neither an attention nor an output of logits")
        try:
            made = changed(
                form,
                reads,
                source.drawn_pixels(),
                source.preprocess,
                seed=source.seed,
                fixed=batch if isinstance(batch, int) else None,
                advance=begin(stages.MAKING, STEPS * len(source)),
            )
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # an op's rare form
            raise _refused(prepared, str(error).partition("\n")[0].rstrip(".")) from error
    left_out = [NO_CLASSES] * (reads.logits is None) + [NO_ATTENTION] * (not reads.attended)
    apart = [ON_MADE] * (request.val is None)
    return replace(inputs, images=source.filled(made), notes=(*inputs.notes, *left_out, *apart))


def _refuse_what_torch_cannot(prepared: Prepared, form: TorchForm, image: ir.Value) -> None:
    reason = form.missing()
    if reason is None and image.dtype not in (None, ir.DataType.FLOAT):
        reason = "its input has no floats of 32 bits"
    if reason is None and form.inputs != [str(image.name)]:
        reason = "it has several inputs"
    if reason is not None:
        raise _refused(prepared, reason)


def _refused(prepared: Prepared, reason: str) -> ConfigError:
    return ConfigError(
        f"--calib {PSAQ}: model {prepared.path} cannot be followed back to its image ({reason});"
        f" use --calib {SYNTHETIC}, or images."
    )


def reads_of(prepared: Prepared) -> Reads:
    """What the images are judged by."""
    from ptq_onnx.engine.model_images import Attended, Reads

    graph, blocks = prepared.model.graph, prepared.blocks
    nodes = [node for node in graph if name_of(node) in blocks.roles]
    by_role = {
        role: [n for n in nodes if blocks.roles[name_of(n)].name == role]
        for role in ("proj", "patch_embed")
    }
    attended = tuple(_given_to_stream(node, prepared) for node in by_role["proj"])
    patches = None
    if by_role["patch_embed"]:
        last = by_role["patch_embed"][-1]
        patches = Attended(str(last.outputs[0].name), _channels(last))
    return Reads(_logits(prepared.model), attended, patches)


def _given_to_stream(proj: ir.Node, prepared: Prepared) -> Attended:
    """What a projection's result is where it is added to the stream, past layout ops, its norm and
    LayerScale; the result itself where there is no such addition."""
    from ptq_onnx.engine.model_images import Attended

    roles = prepared.blocks.roles
    adds = lambda n, _: roles[name_of(n)].name == "residual1"  # noqa: E731
    way = ahead_to(proj.outputs[0], adds, lambda n: n.op_type in (*NORMS, "Mul"), reach=3)
    last = [proj, *way][-2] if way else proj
    added = [v for n in way[-1:] for v in n.inputs if v is not None and source(v) is last]
    if not added:
        return Attended(str(proj.outputs[0].name), _channels(proj))
    site = prepared.sites.get(str(way[-1].outputs[0].name))
    axis = _channels(proj) if site is None or len(site.channel_axes) != 1 else site.channel_axes[0]
    return Attended(str(added[0].name), axis)


def _channels(node: ir.Node) -> int:
    """The axis of channels in what a linear or a convolution gives."""
    return -1 if is_linear(node) else 1


def _logits(model: ir.Model) -> str | None:
    """The output of logits; of probabilities what their softmax reads."""
    name = logits_output(model)
    if name is None:
        return None
    node = next(v.producer() for v in model.graph.outputs if str(v.name) == name)
    if node is not None and node.op_type in ("Softmax", "LogSoftmax"):
        read = node.inputs[0]
        return name if read is None or is_constant(read) else str(read.name)
    return name
