"""Every exporter and opset: from a torch module to a file, the way people write theirs.

``EXPORTERS`` maps a name to a function (module, shape of one image, path). Beyond torch's two
exporters, each with the opsets it is used with, there are the variants found in the wild: a fixed
batch, any image size, half weights, norms and GELUs spelled by other converters, and graphs that
onnxruntime's transformers optimizer has been over.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import nn

from zoo.spellings import respell

Shape = tuple[int, int, int]
Exporter = Callable[[nn.Module, Shape, Path], None]


def _plain_attention(module: nn.Module, plain: bool) -> None:
    """timm's switch: attention as products and softmax, or torch's fused function."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = not plain


def _export(
    module: nn.Module, shape: Shape, path: Path, opset: int, dynamo: bool, **options: object
) -> None:
    example = torch.zeros(2, *shape, dtype=next(module.parameters()).dtype)
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (example,), str(path), dynamo=dynamo, opset_version=opset,
                input_names=["input"], output_names=["logits"], **options,
            )  # fmt: skip
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def torchscript(opset: int, *, plain: bool = False, axes: tuple[int, ...] = (0,)) -> Exporter:
    """torch.onnx.export(dynamo=False); ``axes``: the dynamic ones of the image."""

    def export(module: nn.Module, shape: Shape, path: Path) -> None:
        _plain_attention(module, plain or opset < 14)
        named = {axis: ("batch", "channels", "height", "width")[axis] for axis in axes}
        dynamic = {"input": named, **({"logits": {0: "batch"}} if 0 in axes else {})}
        _export(module, shape, path, opset, False, dynamic_axes=dynamic, do_constant_folding=True)

    return export


def dynamo(opset: int, *, plain: bool = False, axes: tuple[int, ...] = (0,)) -> Exporter:
    """torch.onnx.export(dynamo=True)."""

    def export(module: nn.Module, shape: Shape, path: Path) -> None:
        _plain_attention(module, plain)
        names = ("batch", "channels", "height", "width")
        dims = {axis: torch.export.Dim(names[axis]) for axis in axes}
        _export(
            module, shape, path, opset, True, external_data=False, verbose=False,
            dynamic_shapes=(dims,) if dims else None,
        )  # fmt: skip

    return export


def half(inner: Exporter) -> Exporter:
    """Weights and arithmetic in float16."""

    def export(module: nn.Module, shape: Shape, path: Path) -> None:
        inner(module.half(), shape, path)

    return export


def optimized(model_type: str, heads: int = 2, width: int = 32) -> Exporter:
    """onnxruntime's transformers optimizer over TorchScript's file."""

    def export(module: nn.Module, shape: Shape, path: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        torchscript(17, plain=True)(module, shape, path)
        logging.disable(logging.WARNING)
        try:
            found = optimize_model(
                str(path), model_type=model_type, num_heads=heads, hidden_size=width, opt_level=0
            )
        finally:
            logging.disable(logging.NOTSET)
        found.save_model_to_file(str(path))

    return export


def session_optimized(module: nn.Module, shape: Shape, path: Path) -> None:
    """What a session of ONNX Runtime saves of TorchScript's file at level 'extended'."""
    torchscript(14, plain=True)(module, shape, path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.with_suffix(".optimized").replace(path)


def spelled(flavour: str) -> Exporter:
    """LayerNorm and GELU written out as another converter writes them."""

    def export(module: nn.Module, shape: Shape, path: Path) -> None:
        dynamo(18, plain=True)(module, shape, path)
        onnx.save(respell(onnx.load(path), flavour), path)

    return export


EXPORTERS: dict[str, Exporter] = {
    "ts11": torchscript(11),
    "ts13": torchscript(13),
    "ts14": torchscript(14),
    "ts17": torchscript(17, plain=True),
    "ts18": torchscript(18),
    "ts20": torchscript(20),
    "dy18": dynamo(18),
    "dy20": dynamo(20, plain=True),
    "dy23": dynamo(23),
    "ts17-static": torchscript(17, axes=()),
    "dy18-static": dynamo(18, axes=()),
    "ts17-size": torchscript(17, plain=True, axes=(0, 2, 3)),
    "ts17-half": half(torchscript(17, plain=True)),
    "ort-vit": optimized("vit"),
    "ort-clip": optimized("clip"),
    "ort-swin": optimized("swin"),
    "ort-session": session_optimized,
    "tf2onnx": spelled("tf2onnx"),
    "paddle2onnx": spelled("paddle2onnx"),
    "keras": spelled("keras"),
}


UNFUSED: dict[tuple[str, str], Exporter] = {
    ("eva02", "ts14"): torchscript(14, plain=True),
    ("eva02", "ts20"): torchscript(20, plain=True),
}
"""With timm's ``fused_attn`` off: TorchScript cannot trace the ``is_causal`` of EVA."""


def export(architecture: str, exporter: str, path: Path, full: bool = False) -> Path:
    """Write one cell's file and return its path."""
    from zoo.architectures import make

    module, shape = make(architecture, full)
    chosen = UNFUSED.get((architecture, exporter)) or EXPORTERS[exporter]
    chosen(module, shape, path)
    onnx.load(path, load_external_data=False)
    return path
