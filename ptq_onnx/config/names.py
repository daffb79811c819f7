"""The names that options take, and what they mean where none is given."""

from __future__ import annotations

from ptq_onnx.config.targets import TARGETS as BY_NAME

QUANTIZER_NAMES = ("vanilla", "channelwise", "fqvit", "ptq4vit", "deploy", "lowbit")
METHOD_NAMES = ("minmax", "ema", "percentile", "omse", "mse", "kl", "robust", "pearson", "ranking")
METRIC_NAMES = ("classification", "features", "segmentation", "detection", "depth", "text")
MIXED_BY_NAMES = ("output", "layer", "nuclear")
PRECISION_NAMES = ("int8", "fp8")
ROUNDING_NAMES = ("nearest", "gptq", "adaround")
DEVICE_NAMES = ("auto", "cpu", "cuda")
ACTIVATION_NAMES = ("static", "dynamic", "dynamic-token")
GELU_NAMES = ("table", "polynomial")
ARITHMETIC_NAMES = ("float", "integer")
TARGETS = tuple(BY_NAME)
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
"""Those that files can be timed in; each has a folder in ``targets`` with a module ``timing``."""
INTEGER = "integer"
VNNI, OLDER = CPUS = ("vnni", "older")
"""x86 CPUs that a file is for: older ones have no VNNI (before Ice Lake and Zen 4)."""
WEIGHTS = (8, 4)
OPSETS = range(20, 24)
MAX_DROP = 0.5
MIN_SQNR = 20.0
"""Bounds of ``auto`` where none is given: points of top-1 with labels, dB without."""
MINUTES = 15.0
"""That training blocks may take."""
MULTIPLIER_BITS = 31
"""Of fixed-point multipliers, where none are asked for."""
SHARES_FROM = 7
"""Bits of attention from which fqvit holds uniform shares of a row's largest value."""
