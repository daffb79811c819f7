"""Any timm model as an ONNX file that knows its own preprocessing.

timm is optional and slow to import: it is imported when a model is exported, never before.
"""

import difflib
import importlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch

from ptq_onnx.errors import ConfigError, one_line
from ptq_onnx.files.held_folder import held_folder
from ptq_onnx.files.publishing import parents_of
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess

_log = logging.getLogger(__name__)

_INTERPOLATIONS = {"bicubic", "bilinear", "nearest", "lanczos"}


def export_timm(
    name: str,
    output: Path,
    *,
    pretrained: bool = True,
    opset: int = 18,
    image_size: int | None = None,
) -> Path:
    """Write timm's model ``name`` to ``output``: ``input`` [batch, C, H, W] → ``logits``, float32.

    The preprocessing timm evaluates it with goes into the file's metadata. ``image_size`` in pixels
    replaces the model's own, where it allows that. ``pretrained=False`` gives random weights and
    needs no network. The file appears whole or not at all. Raises ConfigError.
    """
    timm = _import_timm()
    model = _create(timm, name, pretrained, image_size)
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    preprocess = _preprocess(name, data, image_size)
    with parents_of(output), held_folder(output) as folder:
        path = folder / output.name
        _export(model, name, path, preprocess, opset)
        proto = onnx.load(path)
        onnx.helper.set_model_props(proto, {METADATA_KEY: preprocess.to_json()})
        onnx.save(proto, path)
        os.replace(path, output)
    return output


def _import_timm() -> Any:
    try:
        importlib.import_module("timm.data")
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name not in ("timm", "torchvision"):
            raise
        raise ConfigError(
            f"Exporting timm models needs the packages timm and torchvision ('{error.name}' is"
            f" missing). {_advice()}"
        ) from None
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"timm is installed but cannot be imported ({reason[:160]}): torchvision must be built"
            f" for torch {torch.__version__}. {_advice()}"
        ) from error


def _advice() -> str:
    """The torchvision that goes with the torch that is here, which stays."""
    numbers = torch.__version__.partition("+")[0].split(".")
    wanted = "torchvision"
    if numbers[0] == "2" and numbers[1].isdigit():  # torch 2.0 came with torchvision 0.15
        wanted += f"==0.{int(numbers[1]) + 15}.*"
    if torch.version.cuda is None:
        return (
            f"Install {wanted} in its CPU build, from where torch's CPU build came (PyTorch's own"
            " instructions say where), then pip install --no-deps timm."
        )
    return f"pip install '{wanted}' timm"


def _create(timm: Any, name: str, pretrained: bool, image_size: int | None) -> Any:
    stem = name.removeprefix("timm/").removeprefix("hf-hub:timm/")
    if not timm.is_model(stem):
        known: list[str] = timm.list_models() + timm.list_models(pretrained=True)
        close = difflib.get_close_matches(stem, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise ConfigError(f"timm has no model '{name}': {hint}")
    if pretrained and not timm.is_model_pretrained(stem):
        raise ConfigError(f"timm has no weights for '{name}': use --no-pretrained.")
    options: dict[str, Any] = {"pretrained": pretrained, "exportable": True}
    if image_size is not None:
        options["img_size"] = image_size
    try:
        return timm.create_model(stem, **options).eval().float()
    except Exception as error:  # hub, cache, weights and shapes: each its own class of error
        reason = one_line(error)
        if pretrained and _is_download(error):
            raise ConfigError(
                f"The weights of '{name}' cannot be downloaded ({reason[:160]}): check the network "
                "or use --no-pretrained for random weights."
            ) from error
        size = "" if image_size is None else f" at image size {image_size}"
        raise ConfigError(f"timm cannot build '{name}'{size}: {reason[:200]}") from error


def _is_download(error: BaseException) -> bool:
    """Whether an error, or one that led to it, comes from the network or the hub."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        module = type(link).__module__.split(".")[0]
        if isinstance(link, OSError) or module in ("huggingface_hub", "httpx", "requests"):
            return True
        link = link.__cause__ or link.__context__
    return False


def _preprocess(name: str, data: dict[str, Any], image_size: int | None) -> Preprocess:
    """timm's data configuration as ours."""
    channels, height, width = data["input_size"]
    if image_size is not None:
        height = width = image_size
    if data.get("crop_mode", "center") != "center":
        _log.warning("'%s': timm crops with '%s', here the centre.", name, data["crop_mode"])
    interpolation = data["interpolation"]
    return Preprocess(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        size=(height, width),
        crop_pct=min(1.0, float(data["crop_pct"])),
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
        channels=channels,
    )


def _export(model: Any, name: str, path: Path, preprocess: Preprocess, opset: int) -> None:
    """Write ``model`` to ``path`` through torch.export, which gives by far the smaller graph.

    What it cannot capture goes through TorchScript.
    """
    for module in model.modules():  # attention as plain matrix products, whatever the exporter
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = (torch.zeros(2, *preprocess.shape),)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(
                    model,
                    images,
                    str(path),
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    external_data=False,
                    verbose=False,
                    **names,
                )
            except Exception as error:
                _log.info("'%s': torch.export fails (%s), using TorchScript.", name, error)
                torch.onnx.export(
                    model,
                    images,
                    str(path),
                    dynamo=False,
                    opset_version=opset,
                    dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
                    **names,
                )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"torch cannot export '{name}' at opset {opset}: {reason[:200]}"
        ) from error
