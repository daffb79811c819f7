"""The stages of a quantization as the user reads them, and about how long each takes.

The unit of weight is an image through the float model; measured on ViT-Ti and on the embedded
model. Exact it need not be: it moves one bar.
"""

from __future__ import annotations

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import AUTO
from ptq_onnx.progress import Planned

READING = "Reading the model"
LOADING = "Loading PyTorch and PPQ"
MAKING = "Making images from the model"
CHECKING = "Checking the preprocessing"
CHANNELS = "Measuring channel ranges"
SPLITTING = "Finding massive hidden channels"
TOKENS = "Looking for massive tokens"
LEARNING = "Learning how to turn the stream"
TURNING = "Turning the residual stream"
MIXING = "Mixing widths"
POSITIONS = "Finding where errors count"
EQUALISING = "Equalising channels"
RUNNING_FLOAT = "Running the float model"
EXPECTING = "Auto: module by module"
ENOUGH, TAKING_BACK = "Auto: how many decisions", "Auto: which can be undone"
CALIBRATING = "Calibrating ranges"
HISTOGRAMS = "Calibrating histograms"
SCALES = "Searching scales"
ROUNDING = "Rounding weights"
COSTS = "Finding what errors cost"
SHIFTS = "Measuring shifts"
RECONSTRUCTING = "Training blocks"
WRITING = "Writing the quantized model"
EVERY_OP = "Measuring the error of every op"
VARIATION = "Measuring ranges and rounding"
ATTENTION = "Measuring attention"
MODULES = "Measuring module by module"
DRAWING = "Drawing attention"
MEASURING = "Measuring the quantized file"
REPORTING = "Writing the report"

SHARED = frozenset(
    (CHANNELS, RUNNING_FLOAT, CALIBRATING, HISTOGRAMS, EXPECTING, ENOUGH, TAKING_BACK, MODULES)
) | {MEASURING}
"""Those that ``--workers`` share."""

LOADING_COST = 40.0
WRITING_COST = 20.0


def planned(config: QuantizeConfig, tested: int, made: int = 0) -> list[Planned]:
    """The stages behind reading the model. ``tested``: images of ``--val``, 0 without; ``made``:
    images that are made from the model."""
    images, apart = config.images, config.analysed
    plan = [
        Planned(LOADING, LOADING_COST),
        Planned(MAKING, 100 * made),
        Planned(CHECKING, 64 if config.check_preprocess else 0),
    ]
    if AUTO in config.per_channel:
        plan.append(Planned(CHANNELS, images))
    if config.rotates:
        plan.append(Planned(TOKENS, 32))
        plan.append(Planned(LEARNING, 5 * 128 if config.learns_turns else 0))
        plan.append(Planned(TURNING, 2 * images))
    if config.splits_hidden:
        plan.append(Planned(SPLITTING, 2 * images))
    if config.mixes_widths:
        plan.append(Planned(MIXING, 150 * 16))
    weighs = Planned(POSITIONS, 5 * 16 if config.rounds_weights else 0)
    if config.equalizes:
        whole = config.quantizer == "lowbit" and not config.few_bits
        plan.append(Planned(CHANNELS, images if whole else 0))
        plan += [weighs, Planned(EQUALISING, 2 * images)]
    if config.auto:
        measured = tested or apart
        plan += [
            Planned(RUNNING_FLOAT, measured),
            Planned(CALIBRATING, 2 * images),
            Planned(HISTOGRAMS, images),
            Planned(EXPECTING, 100 * apart),
            Planned(ENOUGH, 10 * measured),
            Planned(TAKING_BACK, 40 * measured, open=True),
        ]
    plan += [
        Planned(CALIBRATING, 2 * images),
        Planned(HISTOGRAMS, images),
        Planned(SCALES, 8 * images),
        weighs,
        Planned(COSTS, 5 * images if config.rounds_by_output else 0),
        Planned(ROUNDING, 8 * images if config.rounds_weights and not config.reconstruct else 0),
        Planned(SHIFTS, 4 * 32 if config.regions and config.bias_correction else 0),
        Planned(RECONSTRUCTING, 100 * images if config.reconstruct else 0),
        Planned(WRITING, WRITING_COST),
    ]
    if config.report:
        plan += [
            Planned(EVERY_OP, 8 * apart),
            Planned(VARIATION, 160),
            Planned(ATTENTION, 16),
            Planned(MODULES, 300 * min(apart, 8) + 32 * apart if config.sensitivity else 0),
            Planned(DRAWING, 120 if config.pictures else 0),
        ]
    plan += [Planned(MEASURING, 2 * (tested or apart)), Planned(REPORTING, 10)]
    return [p for p in plan if p.weight]
