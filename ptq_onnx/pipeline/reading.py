"""The first stage: the model and the images opened, and what was asked for checked against them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.blocks.selectors import check_selectors
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.opening import METADATA_KEY, Images, Preprocess
from ptq_onnx.images.packed_source import NO_PICTURE
from ptq_onnx.images.source import NOISE, ImageSource
from ptq_onnx.pipeline import embedded
from ptq_onnx.pipeline.calibration_images import calibration_images
from ptq_onnx.pipeline.preprocessing import preprocess_notes, resolve_preprocess
from ptq_onnx.pipeline.request import Request
from ptq_onnx.pipeline.request_checks import (
    check_attention_blocks,
    check_blocks,
    check_metric,
    labels_of,
    refuse_packed,
)
from ptq_onnx.pipeline.several_inputs import item_shapes, note_on, open_source, taken_by
from ptq_onnx.preparation.input_size import try_size
from ptq_onnx.preparation.kept import Preparing
from ptq_onnx.preparation.prepare import Prepared
from ptq_onnx.preparation.signature import signature

NOT_CALIBRATED = (
    "Ranges are found at run time, and no images were given: equalisation and bias correction,"
    " which need some (--calib), are off."
)
ON_NOISE = " What is measured here is on Gaussian noise, and says little: give --val."


@dataclass(frozen=True)
class Inputs:
    """What all later stages work on: the model as it was prepared, and the images.

    ``tested`` and ``truth``: the images of ``--val`` and their classes int64 [N], where given.
    """

    prepared: Prepared
    preprocess: Preprocess
    images: ImageSource
    tested: ImageSource | None
    truth: NDArray[np.int64] | None
    notes: tuple[str, ...]


def read_inputs(request: Request) -> Inputs:
    """Prepare the model and open the images. Raises PtqError for what does not fit together."""
    request.check_place()
    calib = _calibrated_on(request)
    prepared = _checked_model(request)
    notes = list(prepared.cleaned.notes)
    preprocess = _preprocess(request, prepared, notes)
    own = signature(prepared.model)
    how: dict[str, Any] = {
        "transform": request.given.transform,
        "name": image_input(prepared.model).name if own is None else own.name,
    }
    path = prepared.path
    told = notes if request.calibrated else []
    images = calibration_images(path, calib, preprocess, request.config, told, how)
    if not request.calibrated:
        notes.append(NOT_CALIBRATED + (ON_NOISE if request.val is None else ""))
    refuse_packed(request.config, images)
    notes += note_on(request.config, images)
    if request.labels is not None and request.val is None:
        raise ConfigError("--labels without --val: name the folder of the labelled images too.")
    tested = None
    if request.val is not None:
        tested = open_source(path, request.val, preprocess, request.config.input, **how)
    truth = None if tested is None else labels_of(tested, request.labels, prepared, notes)
    check_metric(request, path, images if tested is None else tested)
    if request.config.max_drop is not None and truth is None and request.config.metric is None:
        raise ConfigError(
            "--max-drop: top-1 needs labelled images, --val DIR and --labels FILE; without,"
            " bound the logits with --min-sqnr, or name a --metric."
        )
    return Inputs(prepared, preprocess, images, tested, truth, tuple(notes))


def prepared_anew(request: Request) -> Prepared:
    """The model prepared from its file, of any batch size where its graph allows that, or as
    another run has kept it."""
    return preparing(request).read(request.shared.prepared)


def preparing(request: Request) -> Preparing:
    """What decides the prepared model. Raises PtqError."""
    config = request.config
    given = request.calib if request.calib is not None else request.val
    shapes = item_shapes(request.model, given, config.input)
    return Preparing(Path(request.model), config.opset, config.size, shapes)


def without_images(request: Request) -> Request:
    """What remains of a request for ranges found at run time that names no images to calibrate
    with: no equalisation, no corrected biases. Raises ConfigError for options that need them."""
    config = request.config
    if not config.at_run_time or request.images_given or embedded.is_embedded(request.model):
        return request
    for option, used in (
        ("--rotate", bool(config.rotate)),
        (f"--rounding {config.rounding}", config.rounding != "nearest"),
        ("--auto", config.auto),
    ):
        if used:
            raise ConfigError(f"{option} needs calibration images: name them with --calib.")
    config = replace(config, equalize=False, bias_correction=False, check_preprocess=False)
    return replace(request, config=config, calibrated=False)


def _calibrated_on(request: Request) -> Images | None:
    """The images given; without any those of ``--val``, where numbers are reused, or those of the
    embedded model. Raises ConfigError for any other model."""
    if request.calib is not None:
        return request.calib
    if request.val is not None and (request.scales is not None or not request.calibrated):
        return request.val
    if not request.calibrated:
        return NOISE
    if request.config.input and taken_by(request.model).image is None:
        return None
    return embedded.images_for(request.model)


def _checked_model(request: Request) -> Prepared:
    """The prepared model, which has what the options name."""
    prepared, config = prepared_anew(request), request.config
    check_selectors(config, prepared.blocks, prepared.sites)
    check_blocks(prepared, config)
    check_attention_blocks(prepared, config)
    if config.auto and request.scales is not None:
        raise ConfigError(
            f"--scales {request.scales}: --auto decides what is quantized, so that the scales of"
            " another run do not fit; leave one out."
        )
    return prepared


def _preprocess(request: Request, prepared: Prepared, notes: list[str]) -> Preprocess:
    """The preprocessing, which the model runs with and which its metadata hold from here on."""
    model, given = prepared.model, request.given
    found = resolve_preprocess(model, request.config, given, prepared.path)
    notes += preprocess_notes(prepared, request.config, given)
    if found is NO_PICTURE:
        return found
    if taken_by(prepared.path).plain:
        try_size(model, prepared.path, image_input(model), found.shape)
    if given.transform is None:
        model.metadata_props[METADATA_KEY] = found.to_json()
    else:
        model.metadata_props.pop(METADATA_KEY, None)
    return found
