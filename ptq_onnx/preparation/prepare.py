"""From a file to a fused graph with blocks and sites: what every command starts with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from ptq_onnx.blocks.roles import Blocks, find_blocks
from ptq_onnx.blocks.sites import find_sites, image_input
from ptq_onnx.errors import ModelError, PtqError, one_line
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.onnxruntime_ops import refuse_tied
from ptq_onnx.numerics.spec import Site
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.free_batch import FixedBatch, fixed_batch, freed
from ptq_onnx.preparation.input_size import Axes, fix_size
from ptq_onnx.preparation.signature import channels_last, take_images
from ptq_onnx.preparation.validation import is_image
from ptq_onnx.runtime.sessions import Session


@dataclass(frozen=True)
class Prepared:
    """A cleaned and fused model, and what is known of it."""

    path: Path
    model: ir.Model
    cleaned: graphs.CleanReport
    fusions: dict[str, int]
    blocks: Blocks
    sites: dict[str, Site]
    fixed: FixedBatch | None = None
    """The file's batch size, where it is fixed and the model here takes any."""


def prepare(
    path: str | Path,
    opset: int = 21,
    size: tuple[int, int] | None = None,
    *,
    free: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Prepared:
    """Load, clean and fuse a model, and find its blocks.

    ``size``: height and width to which dynamic axes are fixed, where the graph holds for one size
    only; None: what the graph tells. ``free``: without the batch size that the model may be fixed
    to, where its graph allows that. ``shapes``: sizes without the batch of inputs that are no
    images, which dynamic ones are fixed to. Raises ModelError, ConfigError.
    """
    path = Path(path)
    model = graphs.load(path)
    refuse_tied(model, path)
    with own_faults(path, "prepared"):
        fix_shapes(model, shapes or {})
        notes = settle(model, path, size)
        report = graphs.clean(model, opset)
        report = replace(report, notes=(*notes, *report.notes))
        fixed = fixed_batch(model) if free else None
        if fixed is not None:
            any_batch = freed(model, fixed, report.opset)
            model, fixed = (model, None) if any_batch is None else (any_batch, fixed)
        counts = fuse(model)
        blocks = find_blocks(model)
        sites = find_sites(model, blocks)
        return Prepared(path, model, report, counts, blocks, sites, fixed)


@contextmanager
def own_faults(path: Path, done: str) -> Iterator[None]:
    """Turn an unforeseen error into a ModelError of one line that says so; where ONNX Runtime
    refuses the file too, that is what is wrong."""
    try:
        yield
    except PtqError:
        raise
    except Exception as error:  # a graph that nobody here has seen; its text may be a whole graph
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's word on a file; others, as PermissionError of PPQ, are no such
        refuse_what_does_not_run(path)
        raise ModelError(
            f"Model {path} cannot be {done}; a bug here, which its file would help to fix"
            f" ({type(error).__name__}: {one_line(error)})."
        ) from error


def refuse_what_does_not_run(path: Path) -> None:
    """Raise ModelError where ONNX Runtime refuses the file too: then that is what is wrong."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        Session(str(path), options, providers=["CPUExecutionProvider"])
    except ModelError as error:
        raise ModelError(f"Model {path}: {error}") from error


def fix_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give inputs these sizes behind the batch, which all then call the same where it is open."""
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    first = next((v.shape[0] for v in free if v.shape is not None), None)
    for value in free:
        if str(value.name) in shapes and value.shape is not None:
            batch = value.shape[0] if isinstance(value.shape[0], int) else first
            value.shape = ir.Shape([batch, *shapes[str(value.name)]])


def settle(model: ir.Model, path: Path, size: tuple[int, int] | None = None) -> list[str]:
    """Decide branches and sizes, and bring the image to our form, in place; returns notes."""
    notes = graphs.flatten(model)
    image = image_input(model)
    if not is_image(image):
        return notes
    last = channels_last(image.shape or ())
    axes = Axes(image, *((3, 1, 2) if last else (1, 2, 3)))
    notes += fix_size(model, path, size, axes)
    notes += take_images(model, image)
    return notes


def read_input(path: str | Path, size: tuple[int, int] | None = None) -> ir.Model:
    """A model of which only the input is of interest, in our form. Raises ModelError."""
    model = graphs.load(path)
    settle(model, Path(path), size)
    return model
