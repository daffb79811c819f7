"""Which values of the options make sense, alone and together. Each raises ConfigError, one line."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ptq_onnx.config.bits import BYTE, WIDEST, Bits
from ptq_onnx.config.fields import Fields
from ptq_onnx.config.metric_options import check_metric
from ptq_onnx.config.names import INTEGER, MINUTES, MULTIPLIER_BITS, OLDER, WEIGHTS
from ptq_onnx.config.option_types import no_such
from ptq_onnx.config.selector import AUTO, MoreBits, Selector
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.preprocess import PREPROCESS_NAMES


def check_values(config: Fields) -> None:
    """What depends on more than the option itself, the target's own values in place."""
    if config.weights not in WEIGHTS or isinstance(config.weights, bool):
        raise ConfigError(f"--weights {config.weights!r}: must be 8, or 4 for weights alone.")
    if config.preprocess is not None and not os.path.exists(config.preprocess):
        files = "a folder with a preprocessor_config.json, or such a file"
        if config.preprocess not in PREPROCESS_NAMES:
            raise no_such("preprocess", config.preprocess, (*PREPROCESS_NAMES, files))
    Bits.parse(config.bits)
    if config.opset not in config.runtime.opsets:
        first, last = config.runtime.opsets[0], config.runtime.opsets[-1]
        raise ConfigError(
            f"--opset {config.opset}: the target {config.target} takes {first} to {last}."
        )


def check_together(config: Fields) -> None:
    """Options that exclude, or belong to, one another."""
    refused = config.runtime.refusal(config.quantizer)
    if refused is not None:
        raise ConfigError(f"--target {config.target}, quantizer {config.quantizer}: {refused}.")
    if config.target == INTEGER:
        _check_integer(config)
    if config.precision == "fp8":
        _check_fp8(config)
    _check_target(config)
    _check_widths(config)
    _check_npu(config)
    if config.quantizer == "lowbit":
        _check_lowbit(config)
    _check_mixed(config)
    if config.at_run_time:
        _check_run_time(config)
    if config.weight_only:
        _check_weight_only(config)
    _check_owners(config)
    _check_selectors(config)
    check_metric(config.metric, config.metric_option)
    _check_auto(config)


def _check_target(config: Fields) -> None:
    """What only some targets can use."""
    target = config.runtime
    for option, used, taken, why in (
        ("--centre-values", config.centre_values, target.centred_values,
         "its attention maps have finer steps than TensorRT's 1/127, so that nothing is gained"),
        ("--quantize-residual", config.quantize_residual, target.quantized_residuals,
         "deploy leaves residual adds in float there, because the runtime does not fuse them"),
        ("--float16", config.float16, target.half_floats,
         "only files for TensorRT have a float part in 16 bits"),
    ):  # fmt: skip
        if used and not taken:
            raise ConfigError(
                f"{option} with --target {config.target}: {why}; use --target tensorrt."
            )
    if config.cpu == OLDER and not target.sixteen_bit_sums:
        raise ConfigError(
            f"--cpu older with --target {config.target}: it is for the kernels of ONNX Runtime;"
            " use --target onnxruntime."
        )


def _check_widths(config: Fields) -> None:
    """Activations of no more bits than the target holds."""
    widths, most = config.widths, config.runtime.widest
    asked = [
        (f"--bits {config.bits}", max(widths.activations, widths.attention)),
        *((f"--more-bits {t}", MoreBits.parse(t).bits) for t in config.more_bits if t != AUTO),
    ]
    for option, bits in asked:
        if bits > most:
            raise ConfigError(
                f"{option}: files for {config.target} hold activations of at most {most} bits;"
                " --target onnxruntime takes 16."
            )


def _check_npu(config: Fields) -> None:
    """Options of files that hold one batch size, all of it codes."""
    target = config.runtime
    for option, used, taken, owners in (
        ("--batch-size", config.batch_size != 1, target.fixed_batch, "--target qnn"),
        ("--mixed", bool(config.mixed), target.all_codes or config.quantizer == "lowbit",
         "--target qnn, and for --quantizer lowbit"),
    ):  # fmt: skip
        if used and not taken:
            raise ConfigError(f"{option} with --target {config.target}: it is for {owners}.")
    if (
        config.mixed
        and target.all_codes
        and (config.widths.activations > BYTE or config.widths.attention > BYTE)
    ):
        raise ConfigError(f"--mixed with --bits {config.bits}: it widens 8 bits; use 8/8/8.")
    if target.all_codes and config.keep_float:
        raise ConfigError(
            f"--keep-float with --target {config.target}: its ops all take codes; give what 8 bits"
            " serve badly 16, as in --more-bits residual1=16."
        )
    if target.all_codes and config.auto and config.mixed:
        raise ConfigError("--auto with --mixed: either chooses what gets 16 bits; leave one out.")
    if target.all_codes and config.per_channel:
        raise ConfigError(
            f"--per-channel with --target {config.target}: its activations have one scale."
        )
    wide = config.mixes or max(config.widths.activations, config.widths.attention) > BYTE
    wide = wide or any(MoreBits.parse(text).bits > BYTE for text in config.more_bits)
    if target.fixed_batch and config.batch_size > 1 and wide:
        raise ConfigError(
            f"--batch-size {config.batch_size} with 16-bit codes: HTP's compiler 2.7.0 computes"
            " LayerNormalization of several images wrongly then (measured); take 1, or 8 bits"
            " everywhere with --no-mixed."
        )


def _check_lowbit(config: Fields) -> None:
    """What comes too late for ranges that are found while the model is rewritten."""
    if config.auto:
        raise ConfigError(
            "--auto with --quantizer lowbit: its ranges are found for their widths before anything"
            " is left out; name what is to have 8 bits with --more-bits."
        )
    if config.per_channel:
        raise ConfigError(
            "--per-channel with --quantizer lowbit: every channel has a range of its own already;"
            " leave it out."
        )


def _check_mixed(config: Fields) -> None:
    """Bits that are chosen for each module, and those that are named."""
    asked = {"--target-bits": config.target_bits, "--target-size": config.target_size}
    given = [option for option, value in asked.items() if value is not None]
    if config.quantizer != "lowbit":
        given += ["--mixed-by"] * (config.mixed_by != "output")
        if given:
            raise ConfigError(
                f"{given[0]} belongs to the quantizer lowbit, not {config.quantizer}."
            )
        narrow = [t for t in config.more_bits if t != AUTO and MoreBits.parse(t).bits < BYTE]
        if narrow:
            raise ConfigError(
                f"--more-bits {narrow[0]}: expected {BYTE} to {WIDEST} bits behind '=', as in"
                f" {MoreBits.parse(narrow[0]).selector}={WIDEST}; fewer are for --quantizer lowbit."
            )
        return
    if config.mixed_by != "output" and not config.mixes_widths:
        raise ConfigError(
            f"--mixed-by {config.mixed_by} says by what widths are mixed: add --mixed,"
            " --target-bits or --target-size."
        )
    if len(given) > 1:
        raise ConfigError("--target-bits and --target-size exclude each other: leave one out.")
    if given and config.mixed is False:
        raise ConfigError(f"--no-mixed with {given[0]}: widths are mixed for it; leave one out.")
    if config.mixes_widths and max(config.widths.activations, config.widths.attention) > BYTE:
        raise ConfigError(f"--bits {config.bits}: widths of 2 to {BYTE} bits are mixed, no others.")


def _check_run_time(config: Fields) -> None:
    """Ranges that are found at run time need no method, and codes of 8 bits."""
    wide = [t for t in config.more_bits if t != AUTO and MoreBits.parse(t).bits > BYTE]
    bits = config.widths.activations
    for option, used, advice in (
        (f"--target {config.target}", not config.runtime.run_time_ranges,
         "its files hold calibrated ranges; use --target onnxruntime"),
        (f"--quantizer {config.quantizer}", config.quantizer != "deploy",
         "use --quantizer deploy"),
        (f"--weights {config.weights}", config.weight_only, "it leaves activations in float"),
        (f"--method {config.method}", config.method is not None, "leave it out"),
        ("--per-channel", bool(config.per_channel), "leave it out"),
        (f"--bits {config.bits}", bits > BYTE or (config.activations == "dynamic" and bits < BYTE),
         "activations have 8 bits, with dynamic-token 2 to 8"),
        (f"--more-bits {wide[0] if wide else ''}", bool(wide), "activations have 8 bits at most"),
    ):  # fmt: skip
        if used:
            raise ConfigError(f"--activations {config.activations} with {option}: {advice}.")


def _check_owners(config: Fields) -> None:
    """Options that one quantizer alone has."""
    for option, used, owner in (
        ("--no-ptf", not config.ptf, "fqvit"),
        ("--ptf-k", config.ptf_k is not None, "fqvit"),
        ("--no-equalize", not config.equalize, "deploy"),
        ("--no-bias-correction", not config.bias_correction, "deploy"),
        (f"--rounding {config.rounding}", config.rounding != "nearest", "deploy"),
        ("--no-wide-ends", not config.wide_ends, "lowbit"),
        ("--reconstruct", config.reconstruct, "lowbit"),
        ("--lis" if config.lis else "--no-lis", config.lis is not None, "fqvit"),
        ("--arithmetic integer", config.arithmetic == INTEGER, "fqvit"),
        ("--multiplier-bits", config.multiplier_bits != MULTIPLIER_BITS, "fqvit"),
    ):
        if used and config.quantizer != owner:
            raise ConfigError(f"{option} belongs to the quantizer {owner}, not {config.quantizer}.")
    if config.convolutions and not config.regions:
        raise ConfigError(
            "--convolutions: deploy alone has them on codes of its choice, for the target"
            " onnxruntime, with calibrated activations of 8 bits; leave it out."
        )
    for option, used in (
        (f"--gelu {config.gelu}", config.gelu != "table"),
        (f"--multiplier-bits {config.multiplier_bits}", config.multiplier_bits != MULTIPLIER_BITS),
    ):
        if used and config.arithmetic != INTEGER:
            raise ConfigError(f"{option} belongs to integer arithmetic: add --target integer.")
    if config.rotates and config.precision == "fp8":
        raise ConfigError(
            "--rotate with --precision fp8: its steps grow with the values, so that massive"
            " channels cost it nothing; leave one out."
        )
    if config.minutes != MINUTES and not config.reconstruct:
        raise ConfigError(f"--minutes {config.minutes:g} bounds --reconstruct: add that.")
    if not config.ptf and config.ptf_k:
        raise ConfigError("--no-ptf and --ptf-k exclude each other: leave one out.")


def _check_selectors(config: Fields) -> None:
    for text in (*config.keep_float, *config.per_channel):
        if text != AUTO:
            Selector.parse(text)
    for text in config.more_bits:
        MoreBits.parse(text)
    for option, given in (("--keep-float", config.keep_float), ("--more-bits", config.more_bits)):
        if AUTO in given:
            raise ConfigError(f"{option} takes roles; 'auto' is known to --per-channel only.")


def _check_auto(config: Fields) -> None:
    """The bounds belong to ``auto``, one at a time."""
    for option, value in (("--max-drop", config.max_drop), ("--min-sqnr", config.min_sqnr)):
        if value is not None and not config.auto:
            raise ConfigError(f"{option} is the bound of --auto: add --auto, or leave it out.")
    if config.max_drop is not None and config.min_sqnr is not None:
        raise ConfigError("--max-drop and --min-sqnr exclude each other: leave one out.")


def _check_fp8(config: Fields) -> None:
    """8-bit floats are for TensorRT, have one width, and no integer grid to search on."""
    for found, wrong, why in (
        (f"--target {config.target}", not config.runtime.eight_bit_floats,
         "its runtime has no FP8 products; use --target tensorrt"),
        (f"--bits {config.bits}", str(config.widths) != "8/8/8", "FP8 has 8 bits; leave it out"),
        (f"--rounding {config.rounding}", config.rounding != "nearest",
         "it rounds to integers; use nearest"),
        (f"--method {config.method}", config.method not in (None, "minmax", "ema", "robust"),
         "it searches on an integer grid; use minmax, ema or robust"),
        ("--per-channel", bool(config.per_channel), "activations have one scale; leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"--precision fp8 with {found}: {why}.")


def _check_integer(config: Fields) -> None:
    """The target integer quantizes every tensor."""
    for option, used in (
        ("--keep-float", config.keep_float),
        ("--per-channel", config.per_channel),
        ("--auto", config.auto),
    ):
        if used:
            raise ConfigError(f"--target integer: {option} would leave tensors in float.")


def _check_weight_only(config: Fields) -> None:
    """Only the weights of linears have codes, in blocks that ONNX Runtime alone fuses."""
    target, quantizer = config.target, config.quantizer
    unused: Iterable[tuple[str, bool, str]] = (
        (f"--target {target}", target != "onnxruntime", "use --target onnxruntime"),
        (f"--quantizer {quantizer}", quantizer != "deploy", "use --quantizer deploy"),
        (f"--bits {config.bits}", config.bits != "8/8/8", "leave it out"),
        (f"--method {config.method}", config.method is not None, "leave it out"),
        ("--per-channel", bool(config.per_channel), "leave it out"),
        ("--more-bits", bool(config.more_bits), "leave it out"),
        ("--auto", config.auto, "leave it out"),
    )
    for option, used, advice in unused:
        if used:
            raise ConfigError(
                f"--weights {config.weights} leaves activations in float and its weights have"
                f" scales per block; it cannot be combined with {option}: {advice}."
            )
