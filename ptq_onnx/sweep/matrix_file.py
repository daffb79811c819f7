"""The YAML file of a sweep: strict, and every mistake one line."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ptq_onnx.config.bits import Bits
from ptq_onnx.config.names import QUANTIZER_NAMES, TARGETS
from ptq_onnx.config.option_file import read_yaml
from ptq_onnx.config.option_types import no_such, shown
from ptq_onnx.config.options import configured
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.file_names import short_stem
from ptq_onnx.images.synthetic import DRAWN
from ptq_onnx.sweep.matrix import AXES, EVEN, Entry, Sweep

PREPROCESSING = ("preprocess", "mean", "std", "size", "crop_pct", "interpolation")
"""Options that a model of the table may have of its own."""
KEYS = (
    *("models", "recipes", "targets", "bits", "calib", "seeds"),
    *("val", "labels", "options", "exclude", "retries", "gpus"),
)
OF_AXES = {"quantizer": "recipes", "target": "targets", "bits": "bits", "seed": "seeds"}
"""Options that have an axis, which is where they are named."""
OWN = "own"
"""The calibration set of the embedded model, which needs none to be named."""
MOST_RETRIES = 20
MOST_GPUS = 64
LONGEST_NAME = 60
"""Bytes of a name: a cell's folder has several of them."""


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file, whose paths are relative to its folder. Raises ConfigError."""
    path = Path(path)
    values, where = read_yaml(path), f"Sweep {path}"
    _known(values, KEYS, where)
    base = path.resolve().parent
    axes = {
        "model": _models(values.get("models"), base, f"{where}: models"),
        "recipe": _recipes(values.get("recipes", [""]), f"{where}: recipes"),
        "target": _targets(values.get("targets"), f"{where}: targets"),
        "bits": _bits(values.get("bits", "8/8/8"), f"{where}: bits"),
        "calib": _calib(values.get("calib"), base, f"{where}: calib"),
        "seed": _seeds(values.get("seeds"), f"{where}: seeds"),
    }
    for axis, entries in axes.items():
        _distinct(entries, f"{where}: {axis}")
    labels = _place(values.get("labels"), base, f"{where}: labels")
    val = _place(values.get("val"), base, f"{where}: val")
    if labels is not None and val is None:
        raise ConfigError(f"{where}: labels without val: name the folder of the labelled images.")
    return Sweep(
        axes=axes,
        val=val,
        labels=labels,
        options=_options(values.get("options", {}), f"{where}: options"),
        exclude=_excluded(values.get("exclude"), f"{where}: exclude"),
        retries=_retries(values.get("retries", 1), f"{where}: retries"),
        gpus=_gpus(values.get("gpus", 0), f"{where}: gpus"),
    )


def _models(value: Any, base: Path, where: str) -> tuple[Entry, ...]:
    """Files, globs, and mappings of a file or glob with its preprocessing; an entry of its own wins
    over a glob that finds the file too."""
    found: dict[str, Entry] = {}
    apart: dict[str, Entry] = {}
    for item in _listed(value, where):
        if isinstance(item, str):
            found |= {file: Entry(short_stem(file), {}, file) for file in _files(item, base, where)}
            continue
        _known(item, ("path", "name", "timm", *PREPROCESSING), where)
        files = _files(item.get("path"), base, where)
        name = item.get("name")
        if name is not None and len(files) > 1:
            raise ConfigError(f"{where}: name {shown(name)} is for {len(files)} files.")
        options = _preprocessing(item, where)
        for file in files:
            called = short_stem(file) if name is None else _name(name, where)
            apart[file] = Entry(called, options, file)
    return tuple((found | apart).values())


def _preprocessing(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The preprocessing that a table states, by itself or by the name of a timm model."""
    options = {key: _plain(item[key]) for key in PREPROCESSING if key in item}
    if "timm" in item:
        from ptq_onnx.sweep.timm_table import preprocessing_of

        options = preprocessing_of(_text(item["timm"], f"{where}: timm")) | options
    _check(options, where)
    return options


def _recipes(value: Any, where: str) -> tuple[Entry, ...]:
    """Names of quantizers, or mappings of options with a name."""
    entries = []
    for item in _listed(value, where):
        if isinstance(item, str):
            if item and item not in QUANTIZER_NAMES:
                raise no_such("quantizer", item, QUANTIZER_NAMES)
            entries.append(Entry(item or "default", {"quantizer": item} if item else {}))
            continue
        options = {k: _plain(v) for k, v in item.items() if k != "name"}
        name = _name(item.get("name", item.get("quantizer")), f"{where}: name")
        _check(options, f"{where}: {name}", own=("quantizer",))
        entries.append(Entry(name, options))
    return tuple(entries)


def _targets(value: Any, where: str) -> tuple[Entry, ...]:
    names = ["onnxruntime"] if value is None else _listed(value, where, _text)
    for name in names:
        if name not in TARGETS:
            raise no_such("target", name, TARGETS)
    return tuple(Entry(name, {"target": name}) for name in names)


def _bits(value: Any, where: str) -> tuple[Entry, ...]:
    texts = [str(_word(item, where)) for item in _listed(value, where)]
    try:
        parsed = [str(Bits.parse(text)) for text in texts]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return tuple(Entry(text, {"bits": text}) for text in parsed)


def _calib(value: Any, base: Path, where: str) -> tuple[Entry, ...]:
    """Folders, array files, or what is drawn; mappings give a set a name and a number of images."""
    if value is None:
        return (Entry(OWN),)
    entries = []
    for item in _listed(value, where):
        if isinstance(item, str):
            item = {"path": item}
        _known(item, ("path", "name", "images"), where)
        text = _text(item.get("path"), f"{where}: path")
        path = text if text in DRAWN else _place(text, base, where)
        options = {"images": item["images"]} if "images" in item else {}
        _check(options, where)
        name = _name(item["name"], where) if "name" in item else short_stem(text.rstrip("/"))
        entries.append(Entry(name, options, path))
    return tuple(entries)


def _seeds(value: Any, where: str) -> tuple[Entry, ...]:
    if value is None:
        return (Entry(EVEN),)
    entries = []
    for item in _listed(value, where):
        if item == EVEN:
            entries.append(Entry(EVEN))
            continue
        _check({"seed": item}, where, own=("seed",))
        entries.append(Entry(str(item), {"seed": item}))
    return tuple(entries)


def _options(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected options (name: value), got {shown(value)}.")
    options = {str(k): _plain(v) for k, v in value.items()}
    if options.get("threads") == 0:
        raise ConfigError(f"{where}: threads must be at least 1 here: so many are asked for.")
    _check(options, where)
    return options


def _check(options: Mapping[str, Any], where: str, own: Sequence[str] = ()) -> None:
    """Raises ConfigError for unknown options, those with an axis but ``own``, and bad values."""
    known = {f.name for f in fields(QuantizeConfig)}
    for key, value in options.items():
        if key in OF_AXES and key not in own:
            raise ConfigError(f"{where}: {key} is an axis: name it under '{OF_AXES[key]}:'.")
        if key == "workers":
            raise ConfigError(f"{where}: workers: cells run side by side; give --workers to sweep.")
        try:
            configured(None, {key: value})
        except ConfigError as error:
            # What is wrong alone may be right with others: only what an option can never be
            starts = f"--{key.replace('_', '-')} ", f"There is no {key} ", "There is no option "
            if key not in known or str(error).startswith(starts):
                raise ConfigError(f"{where}: {error}") from error


def _excluded(value: Any, where: str) -> tuple[Mapping[str, tuple[str, ...]], ...]:
    found = []
    for item in [] if value is None else _listed(value, where):
        _known(item, AXES, where)
        found.append(
            {
                axis: tuple(str(_word(word, f"{where}: {axis}")) for word in _items(words))
                for axis, words in item.items()
            }
        )
    return tuple(found)


def _gpus(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or value in range(1, MOST_GPUS + 1)):
        raise ConfigError(
            f"{where}: expected a part of a GPU, 0 to 1, or a whole number up to {MOST_GPUS}, got"
            f" {shown(value)}."
        )
    return float(value)


def _retries(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_RETRIES:
        raise ConfigError(f"{where}: must be from 0 to {MOST_RETRIES}, got {shown(value)}.")
    return value


def _files(value: Any, base: Path, where: str) -> list[str]:
    """The files that a path or a glob names, sorted. Raises ConfigError where there are none."""
    text = _text(value, f"{where}: path")
    path = str(base / Path(text).expanduser())
    files = sorted(glob.glob(path, recursive=True)) if glob.has_magic(text) else [path]
    files = [file for file in files if Path(file).is_file()]
    if not files:
        raise ConfigError(f"{where}: there is no file {text} in {base}.")
    return files


def _place(value: Any, base: Path, where: str) -> str | None:
    """An absolute path of what exists. Raises ConfigError."""
    if value is None:
        return None
    path = base / Path(_text(value, where)).expanduser()
    if not path.exists():
        raise ConfigError(f"{where}: {path} does not exist.")
    return str(path)


def _distinct(entries: Sequence[Entry], where: str) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ConfigError(
                f"{where}: two entries are called {shown(entry.name)}: give each a name of its own"
                " (name: …)."
            )
        seen.add(entry.name)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(value: Any, where: str, check: Callable[[Any, str], Any] | None = None) -> list[Any]:
    """One item or a list of them: text, numbers or mappings. Raises ConfigError."""
    items = _items(value)
    if value is None or not items:
        raise ConfigError(f"{where}: nothing is named.")
    for item in items:
        if not isinstance(item, str | int | float | dict) or isinstance(item, bool):
            raise ConfigError(f"{where}: expected names, got {shown(item)}.")
    return items if check is None else [check(item, where) for item in items]


def _known(value: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected {', '.join(keys)}, got {shown(value)}.")
    for key in value:
        if key not in keys:
            raise ConfigError(f"{where}: unknown {shown(key)}; known are {', '.join(keys)}.")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{where}: expected text, got {shown(value)}.")
    return value


def _word(value: Any, where: str) -> Any:
    """Text or a number, as a name."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value):
        return value
    return _text(value, where)


def _name(value: Any, where: str) -> str:
    """A name that a folder can have."""
    text = str(_word(value, where))
    odd = text.startswith(".") or not text.isprintable() or set(text) & set("/\\:")
    if odd or len(text.encode()) > LONGEST_NAME:
        raise ConfigError(f"{where}: {shown(text)} cannot name a folder; give it a plain name.")
    return text


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
