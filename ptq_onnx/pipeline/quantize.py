"""The whole job: a float ONNX file and images in, a quantized file with its report out."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.selectors import check_selectors, known_roles
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.calibration.class_output import class_outputs, feature_outputs, logits_output
from ptq_onnx.calibration.preprocess_check import MOST, PreprocessCheck, check_preprocess
from ptq_onnx.config import stages
from ptq_onnx.config.names import INTEGER
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import AUTO
from ptq_onnx.errors import ConfigError, ModelError, PtqError
from ptq_onnx.evaluation.parity import IMAGES, Off, Parity, Reference
from ptq_onnx.files.file_names import short_stem
from ptq_onnx.files.output_paths import Output
from ptq_onnx.files.publishing import workshop
from ptq_onnx.images.opening import METADATA_KEY, FolderSource, Images, Preprocess, open_images
from ptq_onnx.images.source import NOISE, ImageSource, NoiseSource
from ptq_onnx.numerics.scales_file import read_scales
from ptq_onnx.pipeline import embedded
from ptq_onnx.pipeline.description import describe, shown, validation
from ptq_onnx.pipeline.preprocess_input import Given, from_files
from ptq_onnx.pipeline.result import Result
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.input_size import try_size
from ptq_onnx.preparation.model_input import typed_name
from ptq_onnx.preparation.model_sessions import open_plain
from ptq_onnx.preparation.prepare import Prepared, own_faults, prepare, read_input
from ptq_onnx.preparation.signature import as_pixels, pixels, signature
from ptq_onnx.progress import Advance, Progress, Stages
from ptq_onnx.report.reproduce import Invocation, named

if TYPE_CHECKING:
    from ptq_onnx.analysis.results import Analysis, Automatic
    from ptq_onnx.report.attention_page import Sheet

__all__ = ["Progress", "Result", "quantize", "read_scales", "resolve_preprocess"]

log = logging.getLogger(__name__)

FEW = 8
"""Calibration images below which a note says so."""
SEEN_IMAGES = 2
"""Images on which the ranges of an integer file's tensors are seen, beside those proved."""


class Batches:
    """Batches of an image source that can be run over again.

    For a model that only takes batches of ``fixed`` images each image is a batch of its own, of
    so many ``copies``: then nothing but images counts, and each as often as any other.
    """

    def __init__(self, source: ImageSource, size: int, fixed: int | None = None) -> None:
        self.source, self.copies = source, fixed or 1
        self.size = size if fixed is None else 1

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source.batches(self.size):
            yield batch if self.copies == 1 else np.repeat(batch, self.copies, axis=0)


def quantize(
    model: str | Path,
    *,
    config: QuantizeConfig | None = None,
    output: str | Path = "output",
    calib: Images | None = None,
    val: Images | None = None,
    labels: str | Path | None = None,
    scales: str | Path | None = None,
    progress: Progress | None = None,
    keep_models: bool = True,
    given: Given | None = None,
) -> Result:
    """Quantize ``model`` with calibration images and write everything to ``output``.

    ``calib``: what :func:`open_images` takes; ``noise``: standard Gaussian ones; None is for the
    embedded model, which has images of its own, and for ``scales``. ``val`` and ``labels``: images
    to measure accuracy on. ``scales``: the report.json of an earlier run, whose numbers are used
    instead of calibrating. ``output`` ``x.onnx`` is the quantized file, the folder ``x`` beside it
    gets the rest; any other name is a folder of everything, the model in it ``quantized.onnx``:
    ``fused.onnx``, ``formed.onnx`` where the model was changed before it was quantized,
    ``config.yaml``, ``report.json``, ``report.html`` and ``attention/``; it is written beside and
    renamed, so a failure leaves nothing. ``keep_models=False``: without the models. ``given``: a
    preprocessing that no option can name. Raises PtqError.
    """
    config = config or QuantizeConfig()
    begin = Stages(progress)
    begin(stages.READING, 1)
    place = Output.at(output) if keep_models else Output.of_reports(output)
    place.keep(model=model, calib=calib, val=val, labels=labels, scales=scales)
    output = place.folder
    if not keep_models and place.model.exists():
        raise ConfigError(
            f"--output {output} holds a quantized model, which the analysis would take the place"
            " of; name another folder."
        )
    asked = calib
    if calib is None:
        calib = val if scales is not None and val is not None else embedded.images_for(model)
    prepared = prepare(model, config.opset, config.size, free=True)
    check_selectors(config, prepared.blocks, prepared.sites)
    notes = list(prepared.cleaned.notes)
    _check_blocks(prepared, config)
    _check_attention_blocks(prepared, config)
    if config.auto and scales is not None:
        raise ConfigError(
            f"--scales {scales}: --auto decides what is quantized, so that the scales of another"
            " run do not fit; leave one out."
        )
    given = given or Given()
    preprocess = resolve_preprocess(prepared.model, config, given, prepared.path)
    notes += _preprocess_notes(prepared, config, given)
    try_size(prepared.model, prepared.path, image_input(prepared.model), preprocess.shape)
    if given.transform is None:
        prepared.model.metadata_props[METADATA_KEY] = preprocess.to_json()
    else:
        prepared.model.metadata_props.pop(METADATA_KEY, None)
    own = signature(prepared.model)
    name = image_input(prepared.model).name if own is None else own.name
    how: dict[str, Any] = {"transform": given.transform, "name": name}
    images = _calibration_images(calib, preprocess, config, notes, how)
    tested = None if val is None else open_images(val, preprocess, **how)
    if labels is not None and val is None:
        raise ConfigError("--labels without --val: name the folder of the labelled images too.")
    truth = None
    labelled = tested is not None and (labels is not None or has_class_folders(tested))
    if labelled and not class_outputs(prepared.model):
        labelled = _without_classes(prepared, labels, notes)
    if tested is not None and labelled:
        from ptq_onnx.images.labels import labels_for

        truth = labels_for(tested, labels)
    if config.max_drop is not None and truth is None:
        raise ConfigError(
            "--max-drop: top-1 needs labelled images, --val DIR and --labels FILE; without,"
            " bound the logits with --min-sqnr."
        )
    begin.plan(stages.planned(config, 0 if tested is None else len(tested), truth is not None))
    begin(stages.LOADING, 1)
    # PPQ and torch, before anything is written: seconds, in which they swallow an interrupt
    importlib.import_module("ptq_onnx.engine.simulator")

    with workshop(output) as work:
        run = _Run(prepared, config, preprocess, images, notes, work, begin, labels=labels)
        run.again = lambda: prepare(prepared.path, config.opset, config.size, free=True)
        run.validation = validation(tested, labels)
        run.invocation = Invocation(
            command="quantize" if keep_models else "analyse",
            model=named(typed_name(model)) or str(model),
            calib=named(asked),
            val=named(val),
            labels=named(labels),
            scales=named(scales),
            folder=named(output) or str(output),
            written=named(place.model) if keep_models else None,
        )
        try:
            with own_faults(prepared.path, "quantized"):
                report = run.run(tested, truth, scales)
        except PtqError as error:  # the folder that it may name is gone by then
            text = str(error).replace(str(work), str(output))
            if text == str(error):
                raise
            raise type(error)(text) from error
        if not keep_models:
            for name in ("quantized", "fused", "formed"):
                for path in work.glob(f"{name}.onnx*"):
                    path.unlink()
        files = place.publish(work)
        begin.done()
    return Result(report, output, files, run.analysis, place.model if keep_models else None)


def _without_classes(prepared: Prepared, labels: str | Path | None, notes: list[str]) -> bool:
    """False, with a note, for class folders that are of no use to the model. Raises ModelError for
    labels that were asked for."""
    made = ", ".join(f"{v['name']} {v['shape']}" for v in map(shown, prepared.model.graph.outputs))
    where = f"Model {prepared.path} has no output [batch, classes], only {made}"
    if labels is not None:
        raise ModelError(f"{where}: leave --labels out; SQNR is measured without.")
    notes.append(f"{where}: the class folders of --val are no labels here.")
    return False


def _check_blocks(prepared: Prepared, config: QuantizeConfig) -> None:
    if prepared.blocks.count == 0 and config.quantizer != "vanilla":
        needs, instead = config.quantizer, "--quantizer vanilla"
        if config.target != "onnxruntime":  # others take no vanilla
            needs, instead = f"--target {config.target}", f"--target onnxruntime {instead}"
        raise ModelError(
            f"Model {prepared.path} has no transformer block (softmax between two products);"
            f" {needs} needs one, {instead} works without."
        )


def _check_attention_blocks(prepared: Prepared, config: QuantizeConfig) -> None:
    beyond = [b for b in config.attention_blocks if b >= prepared.blocks.count]
    if beyond:
        raise ConfigError(
            f"--attention-blocks {beyond[0]}: the model has {prepared.blocks.count} blocks,"
            " counted from 0."
        )
    heads = [
        node.outputs[0].shape[1]
        for node in prepared.model.graph
        if prepared.blocks.roles[node.name or str(node.outputs[0].name)].name == "softmax"
        and node.outputs[0].shape is not None
        and len(node.outputs[0].shape) == 4
    ]
    most = max((h for h in heads if isinstance(h, int)), default=None)
    absent = [h for h in config.attention_heads if most is not None and h >= most]
    if absent:
        raise ConfigError(
            f"--attention-heads {absent[0]}: the model has {most} heads, counted from 0."
        )


def has_class_folders(source: ImageSource) -> bool:
    """Whether classes came with the images, or they lie in sub-folders, which then are theirs."""
    if source.labels is not None:
        return True
    folders = isinstance(source, FolderSource) and not source.listed
    return folders and all("/" in name for name in source.names)


def _preprocess_notes(prepared: Prepared, config: QuantizeConfig, given: Given) -> list[str]:
    """What of the preprocessing is not written in the options."""
    if given.transform is not None:
        return [
            "Pictures went through a preprocessing function of yours: the files do not tell it."
            " Give the same to evaluate and compare."
        ]
    stored = METADATA_KEY in prepared.model.metadata_props
    found = None if stored or given.values else from_files(config, prepared.path)
    if found is None or config.preprocess is not None:
        return []
    return [f"Preprocessing as in {found[1]}, which lies beside the model."]


def resolve_preprocess(
    model: str | Path | ir.Model,
    config: QuantizeConfig,
    given: Given | None = None,
    path: Path | None = None,
) -> Preprocess:
    """Preprocessing by the options, else by the model's metadata, else by a
    ``preprocessor_config.json`` beside its file ``path``, else by its first ops (a graph that
    normalises pixels itself gets pixels), else imagenet's.

    Size and channels come from the model's input where it states them, or from what fixes them
    in its graph. Raises ConfigError where option and model contradict each other.
    """
    if not isinstance(model, ir.Model):
        path = Path(model)
        model = read_input(model, config.size)
    shape = image_input(model).shape
    sides = [] if shape is None else [d if isinstance(d, int) else None for d in shape]
    if len(sides) != 4:
        raise ModelError("The model's input is no batch of images [batch, channels, H, W].")
    channels, height, width = sides[1:]
    stored = model.metadata_props.get(METADATA_KEY)
    found = from_files(config, path if stored is None else None)
    if given is not None and given.values is not None:
        base = given.values
    elif found is not None:
        base = found[0]
    elif config.preprocess is None and stored is not None:
        base = Preprocess.from_json(stored)
    else:
        base = _by_first_ops(model, config)
    size = config.size or (base.size if height is None or width is None else (height, width))
    if height is not None and width is not None and tuple(size) != (height, width):
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: the model takes {height}x{width} images only."
        )
    mean, std = config.mean or base.mean, config.std or base.std
    if channels == 1 and len(mean) == 3:
        mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
    if channels not in (None, 1, 3):
        raise ModelError(f"The model's input has {channels} channels; images have 1 or 3.")
    changes: dict[str, Any] = {"mean": mean, "std": std, "size": tuple(size)}
    if channels is not None:
        changes["channels"] = channels
    own = signature(model)
    if own is not None:
        changes["channels_last"] = own.channels_last
    if config.crop_pct is not None:
        changes["crop_pct"] = config.crop_pct
    if config.interpolation is not None:
        changes["interpolation"] = config.interpolation
    return as_pixels(model, config, replace(base, **changes))


def _by_first_ops(model: ir.Model, config: QuantizeConfig) -> Preprocess:
    """The preprocessing that options name, or that the graph leaves to be done."""
    if config.preprocess is not None:
        return Preprocess.named(config.preprocess)
    top = pixels(model)
    if top == 1:
        return replace(Preprocess.named("none"), mean=(0.0,) * 3, std=(1.0,) * 3)
    return Preprocess.named("imagenet" if top is None else "none")


def _calibration_images(
    calib: Images,
    preprocess: Preprocess,
    config: QuantizeConfig,
    notes: list[str],
    how: dict[str, Any],
) -> ImageSource:
    if isinstance(calib, str) and calib == NOISE:
        notes.append(
            "Calibrated with Gaussian noise: its ranges are not those of pictures. Good for"
            " comparing, not for use."
        )
        return NoiseSource(preprocess, config.images)
    found = open_images(calib, preprocess, limit=config.images, **how)
    if len(found) < FEW:
        images = "1 image" if len(found) == 1 else f"{len(found)} images"
        notes.append(
            f"Calibrated on {images} only, which hardly show a tensor's range, and closeness"
            " measured on the same ones says nothing: give 32 or more."
        )
    return found


@dataclass
class _Run:
    """One quantization, stage by stage; files go to ``work``."""

    prepared: Prepared
    config: QuantizeConfig
    preprocess: Preprocess
    images: ImageSource
    notes: list[str]
    work: Path
    progress: Stages
    analysis: Analysis | None = None
    original: Prepared | None = None
    """The model before equalisation, where there is any."""
    picture: Path | None = None
    """The image whose attention is drawn, as the model sees it."""
    validation: dict[str, Any] | None = None
    """Names of the folder measured on and of its labels."""
    invocation: Invocation | None = None
    """The paths that the run was given."""
    labels: str | Path | None = None
    apart: tuple[ImageSource, bool] | None = None
    """Images of the analysis, once they were chosen, and whether calibration did not see them."""
    again: Callable[[], Prepared] | None = None
    """Prepares the model anew: equalisation changes it in place."""
    parity: Parity | None = None
    """How far the rewritten model is off the original."""

    @property
    def fixed(self) -> int | None:
        """The model's batch size where it is fixed and written into its graph."""
        shape = image_input(self.prepared.model).shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else None

    def batches(self, source: ImageSource, size: int | None = None) -> Batches:
        """Batches of the size that config or model ask for."""
        return Batches(source, size or self.config.batch, self.fixed)

    def stage(self, name: str, total: int | None = None, runs: int = 1) -> Advance:
        """Begin a stage: of the calibration images, run so many times, where no total is given."""
        return self.progress(name, runs * len(self.images) if total is None else total)

    def run(
        self, tested: ImageSource | None, truth: Any, scales: str | Path | None
    ) -> dict[str, Any]:
        import torch

        from ptq_onnx.analysis.results import plain
        from ptq_onnx.qdq.half import to_float16
        from ptq_onnx.qdq.lowering import lower
        from ptq_onnx.quantizers.base import Plan
        from ptq_onnx.quantizers.by_name import make_quantizer

        checked = None if scales is not None else self._check_preprocess()
        config = self._resolve_auto()
        graphs.save(self._as_taken(self.prepared.model), self.work / "fused.onnx")
        self._tell_copies()
        prepared = self.prepared
        plan = Plan(prepared.model, prepared.blocks, prepared.sites, config, self.stage)
        plan = replace(plan, named=known_roles(prepared.blocks, prepared.sites))
        plan = self._rewritten(plan, scales)
        decided = None
        if config.auto:
            plan, decided = self._decide(plan, tested, labelled=truth is not None)
            config = plan.config
        quantizer = make_quantizer(plan)
        if scales is not None:
            quantizer.reuse(read_scales(scales), str(scales))
        channels, height, width = self.preprocess.shape
        example = torch.zeros(self.fixed or 1, channels, height, width)
        quantizer.run(example, self.batches(self.images))
        self.notes.extend(quantizer.notes)
        from ptq_onnx.equalization.experts import left_in_float

        stacks = [f"'{value.name}' {reason}" for value, _, reason in left_in_float(plan.model)]
        if stacks:
            more = f" (and {len(stacks) - 1} more)" if len(stacks) > 1 else ""
            self.notes.append(f"The constant {stacks[0]}{more}.")
        if self.images.skipped:
            self.notes.append(
                f"{len(self.images.skipped)} calibration images could not be read and were"
                f" skipped, the first: {self.images.skipped[0]}."
            )
        self.stage(stages.WRITING, 1)
        quantized = self.work / "quantized.onnx"
        if config.target == INTEGER:
            lowered = self._lower_integer(quantizer)
        else:
            lowered = lower(quantizer.model, quantizer.specs)
        if config.float16:
            lowered = to_float16(lowered)
            self.notes.append(
                "--float16: quantized.onnx computes its float part in 16 bits; the analysis"
                " computes in 32."
            )
        graphs.save(self._as_taken(lowered), quantized)
        (self.work / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        report = describe(
            self.prepared, quantizer, config, self.preprocess, self.images, self.work,
            reused=scales is not None,
        )  # fmt: skip
        report["equalization"] = {
            "forms": dict(plan.forms),
            "moves": [asdict(move) for move in plan.moves],
        }
        report["parity"] = None if self.parity is None else asdict(self.parity)
        report["formed"] = self._formed(plan, quantizer)
        report["validation"] = self.validation
        report["invocation"] = None if self.invocation is None else asdict(self.invocation)
        report["auto"] = None if decided is None else asdict(decided)
        report["preprocess_check"] = None if checked is None else asdict(checked)
        if config.target == INTEGER and config.report:
            report["integer"] = self._integer(quantizer, lowered)
        report["coverage"] = self._coverage(quantizer)
        if config.target == "onnxruntime" and config.report:
            from ptq_onnx.targets.checking.optimised import optimised_histogram

            report["optimised"] = optimised_histogram(quantized)
        analysed: dict[str, Any] = {"analysis": None, "accuracy": None, "fidelity": None}
        pictures: list[Sheet] = []
        if config.report:
            analysed, pictures = self._analyse(quantizer, tested)
        analysed.update(self._measure(tested, truth))
        report.update(analysed)
        report["notes"] = self.notes
        self.stage(stages.REPORTING, 1)
        written: dict[str, Any] = plain(report)
        self._write(written, pictures)
        return written

    def _pixel_range(self, plan: Any) -> dict[str, tuple[float, float]]:
        """The range of an image of pixels, which is known: no image shows more."""
        if not (self.preprocess.raw and self.images.pictures):
            return {}
        return {s.tensor: (0.0, 255.0) for s in plan.sites.values() if s.role == "input"}

    def _rewritten(self, plan: Any, scales: str | Path | None) -> Any:
        """The plan for the model equalised, or in the target's form, or as it is: the first that
        computes what the original does (see ``parity.py``)."""
        reference = self._reference()
        ways = [self._in_form]
        if self.config.equalizes:
            ways.insert(0, lambda plan: self._equalise(plan, scales))
        undone: list[str] = []
        off = reference.fused or Off(0.0, str(plan.model.graph.outputs[0].name))
        for way in ways:
            found = way(plan)
            measured = off if found.model is plan.model and not found.forms else None
            measured = measured or reference.off(found.model)
            if reference.accepts(measured) or measured is off:
                plan, off = found, measured
                break
            what = "bringing it into form" if way == self._in_form else "equalisation"
            undone.append(what)
            self.notes.append(
                f"Undone: {what}. The rewritten model was {measured} against the original on"
                f" {reference.count} calibration images; at most {reference.bound:.0e} is"
                " explained by rounding. Please report it with the model."
            )
            if way != self._in_form:
                plan = self._restored(plan)
        self.notes.extend(reference.notes)
        self.parity = Parity(
            images=reference.count,
            original=reference.fused is not None,
            bound=reference.bound,
            fused=None if reference.fused is None else reference.fused.value,
            rewritten=off.value,
            output=off.output,
            undone=tuple(undone),
        )
        return self._adopt(plan)

    def _reference(self) -> Reference:
        """The original on a few calibration images; batches as large as the file takes."""
        fixed = self.prepared.fixed
        size = fixed.size if fixed is not None else self.fixed or IMAGES
        batches: list[Any] = []
        count = 0
        for batch in self.images.batches(size):
            count += len(batch)
            missing = 0 if size == IMAGES else size - len(batch)
            filled = np.repeat(batch[-1:], missing, axis=0)
            batches.append(np.concatenate([batch, filled]) if missing else batch)
            if count + size > IMAGES:
                break
        threads = self.config.threads
        return Reference(self.prepared.path, self.prepared.model, batches, count, threads)

    def _restored(self, plan: Any) -> Any:
        """The plan for the model as it was before it was changed in place."""
        assert self.again is not None
        prepared = self.again()
        prepared.model.metadata_props.update(self.prepared.model.metadata_props)
        self.prepared, self.original = prepared, None
        return replace(
            plan, model=prepared.model, blocks=prepared.blocks, sites=prepared.sites, pixels=None
        )

    def _as_taken(self, model: ir.Model) -> ir.Model:
        """The model with the batch size that the file was given with."""
        fixed = self.prepared.fixed
        return model if fixed is None else fixed.restore(model)

    def _tell_copies(self) -> None:
        if (self.fixed or 1) > 1:
            self.notes.append(
                f"The graph holds its batch size of {self.fixed} in a way that cannot be taken out:"
                f" every image was run as {self.fixed} copies of it, which takes so many times as"
                " long. Export the model with a dynamic batch."
            )

    def _equalise(self, plan: Any, scales: str | Path | None) -> Any:
        """The plan for the equalised model.

        The model as it was is in its file by now, and kept beside it for pictures alone.
        """
        from ptq_onnx.equalization.equalize import equalise_in_place

        if scales is not None:
            raise ConfigError(
                f"--scales {scales}: equalisation needs the images, so that the scales of another"
                " run do not fit; calibrate anew, or use --no-equalize."
            )
        mean, std = self.preprocess.mean, self.preprocess.std
        pictures = self.images.pictures
        if self.config.report and self.config.pictures:  # drawn beside, by vanilla
            self.original = replace(self.prepared, model=self.prepared.model.clone())
        return equalise_in_place(
            replace(plan, pixels=(mean, std) if pictures else None), self.batches(self.images)
        )

    def _in_form(self, plan: Any) -> Any:
        """The plan for the model in the form that the target computes in integers."""
        from ptq_onnx.equalization.restructure import in_form

        return in_form(plan)

    def _formed(self, plan: Any, quantizer: Any) -> str:
        """The file of the float model whose tensors the report names: equalised, in the target's
        form, its weights rounded and biases corrected. Not written where nothing was changed."""
        changed = self.config.equalizes or any(plan.forms.values())
        if not changed and quantizer.model is plan.model:
            return "fused.onnx"
        graphs.save(self._as_taken(quantizer.model), self.work / "formed.onnx")
        return "formed.onnx"

    def _adopt(self, plan: Any) -> Any:
        """The plan, whose model from here on is the prepared one."""
        plan = replace(plan, fixed={**self._pixel_range(plan), **plan.fixed})
        self.prepared = replace(
            self.prepared, model=plan.model, blocks=plan.blocks, sites=plan.sites
        )
        return plan

    def _decide(
        self, plan: Any, tested: ImageSource | None, labelled: bool
    ) -> tuple[Any, Automatic]:
        """The plan with what ``--auto`` decides, on ``--val`` or on images held apart."""
        from ptq_onnx.analysis.sensitivity import load
        from ptq_onnx.auto.decide import Evidence, decide, notes_on
        from ptq_onnx.images.labels import labels_for

        few, apart = self._held_apart(tested)
        images = few if tested is None else tested
        evidence = Evidence(
            reference=self.work / "fused.onnx",
            images=images,
            labels_of=(lambda n: labels_for(images, self.labels, n)) if labelled else None,
            held_apart=apart or tested is not None,
            sample=load(few, self.fixed, self.config.batch),
            work=self.work,
        )
        plan, found = decide(plan, self.batches(self.images), evidence, self.progress)
        self.notes.extend(notes_on(found))
        return plan, found

    def _check_preprocess(self) -> PreprocessCheck | None:
        """Whether another normalisation suits the model better; None where that cannot be told.

        It takes pictures of the user's own, and a transformer with an output of logits: features
        have no classes to be sure of.
        """
        source, model = self.images, self.prepared.model
        logits = logits_output(model)
        if not (self.config.check_preprocess and logits and isinstance(source, FolderSource)):
            return None
        if source.root.resolve() == embedded.IMAGES or not source.pictures:
            return None
        if self.preprocess.raw:  # there is no normalisation to be wrong
            return None
        if self.prepared.blocks.count == 0:  # without LayerNorm, larger inputs alone make it surer
            return None
        from ptq_onnx.evaluation.network import Classifier

        self.stage(stages.CHECKING, 1)
        channels = self.preprocess.channels
        plain = replace(self.preprocess, mean=(0.0,) * channels, std=(1.0,) * channels)
        few = source.reopened(MOST, plain)  # however few calibration takes
        pictures = np.concatenate(list(few.batches(8)))
        try:
            opened = open_plain(model, self.config.threads)
            classifier = Classifier(opened, output=logits)
            found = check_preprocess(classifier, pictures, self.preprocess)
        except ModelError:  # no classifier after all
            return None
        if found.warning is not None:
            self.notes.append(found.warning)
            log.warning(found.warning)
        return found

    def _resolve_auto(self) -> QuantizeConfig:
        """Replace ``--per-channel auto`` by the blocks that calibration picks."""
        config = self.config
        if AUTO not in config.per_channel:
            return config
        from ptq_onnx.calibration.methods import collect
        from ptq_onnx.quantizers.channelwise import widest_blocks

        sites = [s for s in self.prepared.sites.values() if s.role in ("gelu", "fc2")]
        if not sites:
            raise ConfigError("--per-channel auto: the model has no fc2 to choose from.")
        stats = collect(
            self.prepared.model,
            sites,
            self.batches(self.images),
            threads=config.threads,
            progress=self.stage(stages.CHANNELS),
        )
        selector, text = widest_blocks(stats, self.prepared.sites, self.prepared.blocks)
        self.notes.append(text)
        others = tuple(t for t in config.per_channel if t != AUTO)
        return replace(config, per_channel=(*others, str(selector)))

    def _analyse(
        self, quantizer: Any, tested: ImageSource | None
    ) -> tuple[dict[str, Any], list[Sheet]]:
        """All analyses on images held apart from calibration, and attention pictures."""
        from ptq_onnx.analysis.analyse import Subject, analyse_quantized
        from ptq_onnx.engine.simulator import Simulator

        prepared, config = self.prepared, self.config
        source, apart = self._held_apart(tested)
        simulator = self.simulator(quantizer)
        # Quantizers may correct constants in a copy of the prepared model.
        model = quantizer.model
        self.analysis = analyse_quantized(
            Subject(model, quantizer, prepared.blocks, prepared.sites, simulator, prepared.model),
            source,
            held_apart=apart,
            full=config.sensitivity,
            fixed=self.fixed,
            batch=config.batch,
            threads=config.threads,
            stage=self.stage,
        )
        reference = Simulator(prepared.model, None, threads=config.threads)
        pictures: list[Sheet] = []
        if config.pictures and prepared.blocks.count:
            pictures = self._draw(quantizer, simulator, reference, source)
        return {"analysis": self.analysis.to_json()}, pictures

    def _coverage(self, quantizer: Any) -> dict[str, Any]:
        """What of the written file runs in integers; a warning stands before all other notes."""
        from ptq_onnx.analysis.coverage import float_reasons, measure_coverage, whole_coverage

        config, sites = self.config, self.prepared.sites
        if config.target == INTEGER:
            return whole_coverage(self.prepared.model).to_json()
        consumers = {tensor: site.consumers for tensor, site in sites.items()}
        reasons = float_reasons(quantizer.floats, consumers)
        found = measure_coverage(self.work / "quantized.onnx", config.target, reasons)
        if found.warning is not None:
            self.notes.insert(0, found.warning)
        return found.to_json()

    def _lower_integer(self, quantizer: Any) -> ir.Model:
        """The integer file, checked against its own rules. Raises ModelError."""
        from ptq_onnx.targets.integer.lowering import lower_integer
        from ptq_onnx.targets.integer.rules import violations

        config = self.config
        lowered = lower_integer(
            self.prepared.model, quantizer.specs, config.multiplier_bits, config.gelu
        )
        broken = violations(lowered)
        if broken:
            raise ModelError(f"Node '{broken[0].node}' ({broken[0].rule}): {broken[0].text}")
        return lowered

    def _integer(self, quantizer: Any, lowered: ir.Model) -> dict[str, Any]:
        """Widths, operations and traffic of an integer file, with ranges seen on images."""
        from ptq_onnx.analysis.integer_costs import integer_report

        first = next(iter(self.batches(self.images, SEEN_IMAGES)))
        return integer_report(self.prepared.model, quantizer.specs, lowered, [first])

    def simulator(self, quantizer: Any) -> Any:
        """The exact simulator, in integer arithmetic where asked for."""
        from ptq_onnx.engine.simulator import Simulator
        from ptq_onnx.targets.integer.simulated_steps import integer_overrides

        overrides: dict[str, Any] = {}
        left: list[str] = []
        if self.config.arithmetic == "integer":
            overrides, left = integer_overrides(
                self.prepared.model,
                quantizer.specs,
                self.config.multiplier_bits,
                self.config.gelu,
            )
            if self.config.target != INTEGER:
                self.notes.append(
                    "The analysis simulates integer arithmetic, that of --target integer;"
                    " quantized.onnx, as any file for onnxruntime, computes LayerNorm and softmax"
                    " in float between quantized codes, and so does the module-by-module part of"
                    " the analysis."
                )
        if left:
            self.notes.append(
                f"{len(left)} ops stay in float arithmetic, because a tensor around them does or"
                f" they have no integer form; the first: {left[0]}."
            )
        return Simulator(
            quantizer.model, quantizer, threads=self.config.threads, overrides=overrides
        )

    def _held_apart(self, tested: ImageSource | None) -> tuple[ImageSource, bool]:
        """Images that calibration did not see: the folder's others, else ``--val``'s."""
        if self.apart is None:
            self.apart = self._choose_apart(tested)
        return self.apart

    def _choose_apart(self, tested: ImageSource | None) -> tuple[ImageSource, bool]:
        limit = self.config.analysis_images
        others = self.images.others(limit)
        if others is not None:
            return others, True
        if tested is not None:
            return tested.reopened(limit), True
        self.notes.append(
            "All images were used for calibration, so the analysis runs on some of the same;"
            " give more images than --images, or --val, to hold some apart."
        )
        return self.images.reopened(limit), False

    def _draw(
        self, quantizer: Any, simulator: Any, reference: Any, source: ImageSource
    ) -> list[Sheet]:
        """Attention pictures of the last block: float, vanilla and the chosen quantizer."""
        import torch
        from PIL import Image

        from ptq_onnx.analysis.attention import attention_maps, code_runs
        from ptq_onnx.engine.simulator import Simulator
        from ptq_onnx.quantizers.base import Plan
        from ptq_onnx.quantizers.by_name import make_quantizer
        from ptq_onnx.report.attention_map import draw_attention
        from ptq_onnx.report.attention_page import sheet

        prepared, config = self.prepared, self.config
        advance = self.stage(stages.DRAWING, 3)
        simulators = {"float": reference}
        if config.quantizer != "vanilla":
            plain = QuantizeConfig(quantizer="vanilla", bits=config.bits, threads=config.threads)
            whole = self.original or prepared
            plan = Plan(whole.model, whole.blocks, whole.sites, plain)
            vanilla = make_quantizer(plan)
            few = self.images.reopened(min(32, config.images))
            channels, height, width = self.preprocess.shape
            example = torch.zeros(self.fixed or 1, channels, height, width)
            vanilla.run(example, self.batches(few))
            simulators["vanilla"] = Simulator(whole.model, vanilla, threads=config.threads)
        advance(1)
        simulators[config.quantizer] = simulator
        names, batch = next(source.named_batches(1))
        repeated = np.repeat(batch, self.fixed or 1, axis=0)
        chosen = config.attention_blocks or None
        picture = repeated, names[0], self.preprocess, chosen
        maps = attention_maps(prepared.model, prepared.blocks, simulators, *picture)
        if not maps:
            self.notes.append("No attention pictures: no attention over all patches of an image.")
            return []
        folder = self.work / "attention"
        folder.mkdir()
        self.picture = folder / f"picture_{short_stem(maps[0].image_name)}.png"
        Image.fromarray(maps[0].image).save(self.picture)
        advance(1)
        rounded = attention_maps(prepared.model, prepared.blocks, code_runs(reference), *picture)
        sheets = []
        for kind, found in [*(("", m) for m in maps), *(("codes_", m) for m in rounded)]:
            name = f"{kind}block_{found.block:02d}_{short_stem(found.image_name)}.png"
            path = folder / name
            draw_attention(found, path, config.attention_heads)
            what = ", maps of the float model in 8 and 4 bits" if kind else ""
            title = f"Block {found.block}, {found.image_name}{what}"
            sheets.append(sheet(found, title, config.attention_heads))
        return sheets

    def _measure(self, tested: ImageSource | None, truth: Any) -> dict[str, Any]:
        """The files in ONNX Runtime: on ``--val``, else on images held apart."""
        from ptq_onnx.pipeline.measurement import measured

        source, kind = tested, "val"
        if source is None:
            source, apart = self._held_apart(None)
            kind = "held apart" if apart else "calibration"
        found, notes = measured(
            self.work / "quantized.onnx",
            self.work / "fused.onnx",
            source,
            truth,
            kind,
            threads=self.config.threads,
            features=feature_outputs(self.prepared.model),
            stage=self.stage,
        )
        self.notes.extend(notes)
        return found

    def _write(self, report: dict[str, Any], pictures: list[Sheet]) -> None:
        text = json.dumps(report, indent=1, allow_nan=False, default=float)
        (self.work / "report.json").write_text(text, encoding="utf-8")
        if not self.config.report:
            return
        from ptq_onnx.analysis.results import OpError
        from ptq_onnx.report.page import render
        from ptq_onnx.report.plots import snr_over_blocks

        ops = [OpError(**op) for op in report["analysis"]["ops"]]
        narrow = snr_over_blocks(ops, narrow=True)
        page = render(
            report, snr_over_blocks(ops), [], self.picture, narrow=narrow, sheets=pictures
        )
        (self.work / "report.html").write_text(page, encoding="utf-8")
