"""The path of a model that a user names, with a hint where it is not there."""

from __future__ import annotations

from pathlib import Path

from ptq_onnx.errors import ModelError
from ptq_onnx.pipeline.timm_names import looks_like_timm


def find_model(path: str | Path, *, written: bool = False) -> Path:
    """``path``, if it exists; ``written``: a folder that quantize wrote stands for its model.

    Raises ModelError, which tells how to export a timm model, or which file a folder holds.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path, written)
    if path.exists():
        return path
    stem = path.name.removesuffix(".onnx")
    hint = (
        f" To make it from timm's model of that name: ptq-onnx export {stem}"
        if looks_like_timm(stem)
        else ""
    )
    raise ModelError(f"Model {path} does not exist.{hint}")


def _in_folder(folder: Path, written: bool) -> Path:
    """The model that quantize wrote to, or beside, a folder; else the folder, to be refused."""
    from ptq_onnx.files.output_paths import find_output
    from ptq_onnx.files.result_names import FLOAT, REPORT

    if written and (folder / REPORT).is_file():
        return find_output(folder).model
    found = (path for path in folder.glob("*.onnx") if path.is_file())
    inside = sorted(found, key=lambda path: (path.name != FLOAT, path))
    if not inside:
        return folder
    also = "" if len(inside) == 1 else f" or one of {len(inside) - 1} others"
    raise ModelError(f"Model {folder} is a folder; name the file: {inside[0]}{also}.")
