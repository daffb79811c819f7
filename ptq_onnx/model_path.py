"""The path of a model that a user names, with a hint where it is not there."""

from __future__ import annotations

from pathlib import Path

from ptq_onnx.errors import ModelError


def find_model(path: str | Path) -> Path:
    """``path``, if it exists. Raises ModelError, which tells how to export a timm model."""
    path = Path(path)
    if path.exists():
        return path
    from ptq_onnx.timm_export import looks_like_timm

    stem = path.name.removesuffix(".onnx")
    hint = (
        f" To make it from timm's model of that name: ptq-onnx export {stem}"
        if looks_like_timm(stem)
        else ""
    )
    raise ModelError(f"Model {path} does not exist.{hint}")
