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
import torch
from torch import nn

Shape = tuple[int, int, int]
Exporter = Callable[[nn.Module, Shape, Path], None]


def _plain_attention(module: nn.Module, plain: bool) -> None:
    """timm's switch: attention as products and softmax, or torch's fused function."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = not plain


def _export(module: nn.Module, shape: Shape, path: Path, opset: int, dynamo: bool, **options: object) -> None:
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
}


def export(architecture: str, exporter: str, path: Path, full: bool = False) -> Path:
    """Write one cell's file and return its path."""
    from zoo.architectures import make

    module, shape = make(architecture, full)
    EXPORTERS[exporter](module, shape, path)
    onnx.load(path, load_external_data=False)
    return path
