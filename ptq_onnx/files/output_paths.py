"""Where a quantized model and its reports lie: in one folder, or as a file with a folder beside it.

``--output vit8`` is the folder of everything, the model in it ``quantized.onnx``. ``--output
vit8.onnx`` is the model; the folder ``vit8`` beside it holds all the rest.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from ptq_onnx.errors import ConfigError
from ptq_onnx.files.publishing import ours, publish
from ptq_onnx.files.result_names import QUANTIZED, REPORT

SUFFIX = ".onnx"
OUTPUT = "output"
ANALYSIS = "analysis"
"""Where results go that nobody names a place for: those of ``quantize``, those of ``analyse``."""


@dataclass(frozen=True)
class Output:
    """The folder of the reports, and the file of the model."""

    folder: Path
    model: Path

    @property
    def apart(self) -> bool:
        """True where the model lies beside the folder."""
        return self.model.parent != self.folder

    @classmethod
    def at(cls, path: str | Path) -> Output:
        """What ``--output`` names, before anything is written there. Raises ConfigError."""
        path = Path(path)
        if path.suffix.lower() != SUFFIX or path.is_dir():
            cls._check_folder(path, path)
            return cls(path, path / QUANTIZED)
        folder = path.with_suffix("")
        if not folder.name or folder == path:
            raise ConfigError(f"--output {path}: give the file a name, as in vit8.onnx.")
        cls._check_folder(folder, path)
        if (folder / QUANTIZED).exists():
            raise ConfigError(
                f"--output {path}: its reports go to {folder}, which holds the {QUANTIZED} of"
                " another run; name another file, or remove that one."
            )
        return cls(folder, path)

    @classmethod
    def of_reports(cls, path: str | Path) -> Output:
        """For what writes no model: a folder. Raises ConfigError."""
        path = Path(path)
        if path.suffix.lower() == SUFFIX and not path.is_dir():
            raise ConfigError(f"--output {path}: no model is written here; name a folder.")
        cls._check_folder(path, path)
        return cls(path, path / QUANTIZED)

    @staticmethod
    def _check_folder(folder: Path, named: Path) -> None:
        if folder.exists() and not folder.is_dir():
            what = "is a file" if folder == named else f"needs the folder {folder}, which is a file"
            raise ConfigError(
                f"--output {named} {what}; name a folder, or a file that ends in {SUFFIX}."
            )

    def keep(self, **reads: object) -> None:
        """Refuse to write over what is read, given as option=path. Raises ConfigError."""
        for name, path in reads.items():
            if not isinstance(path, str | Path) or not os.path.exists(path):
                continue
            option = "the model" if name == "model" else f"--{name}"
            if self.model.exists() and os.path.samefile(self.model, path):
                raise ConfigError(f"--output {self.model} is {option} itself; name another file.")
            real, folder = Path(path).resolve(), self.folder.resolve()
            if not real.is_relative_to(folder) or real == folder:
                continue
            inside = real.relative_to(folder)
            if any(mine == inside or mine.is_relative_to(inside) for mine in ours(folder)):
                raise ConfigError(
                    f"{option} {path} would be overwritten: it is one of the results in"
                    f" {folder.name}; name another --output."
                )

    def publish(self, work: Path) -> tuple[Path, ...]:
        """Let the finished files of ``work`` take their place, the folder all at once."""
        moved = self._place_model(work) if self.apart else ()
        return (*moved, *publish(work, self.folder))

    def _place_model(self, work: Path) -> tuple[Path, ...]:
        """The model, and the weights that it keeps in a file of their own."""

        from ptq_onnx.files.external_data import relocate

        source, weights = work / QUANTIZED, work / f"{QUANTIZED}.data"
        if not source.is_file():
            return ()
        old = self._weights_of_model()
        files = [self.model]
        if weights.is_file():
            beside = self.model.with_name(f"{self.model.name}.data")
            if beside.exists():  # of the model that is there until the next step
                beside = beside.with_stem(f"{self.model.name}.{secrets.token_hex(4)}")
            relocate(source, beside.name)
            os.replace(weights, beside)
            files.append(beside)
        os.replace(source, self.model)
        for name in old - {file.name for file in files}:
            self.model.with_name(name).unlink(missing_ok=True)
        return tuple(files)

    def _weights_of_model(self) -> set[str]:
        """The files of weights that an earlier run has put beside the model."""
        from ptq_onnx.files.external_data import locations

        name = re.escape(self.model.name)
        mine = re.compile(rf"{name}(\.[0-9a-f]{{8}})?\.data")
        return {place for place in locations(self.model) if mine.fullmatch(place)}


@dataclass(frozen=True)
class Found:
    """A quantized model that a user names, and the folder of its reports, if it has one."""

    model: Path
    folder: Path | None

    def beside(self, name: str) -> Path | None:
        """A file of the reports, if it is there."""
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.is_file() else None


def find_output(path: str | Path) -> Found:
    """A folder or a file that ``quantize`` wrote, or any other file; a link stands for what it
    leads to, with what lies beside that. Raises ConfigError."""
    path = Path(path)
    if path.is_dir():
        beside = (p.with_name(f"{p.name}{SUFFIX}") for p in (path, path.resolve()))
        for model in (path / QUANTIZED, *beside):
            if model.is_file():
                return Found(model, path)
        raise ConfigError(
            f"Folder {path} holds no {QUANTIZED}: name a folder that 'ptq-onnx quantize' wrote,"
            " or an .onnx file."
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name output folders or quantized .onnx files.")
    for real in (path, path.resolve()):
        apart = real.with_suffix("")
        if (apart / REPORT).is_file() and not (apart / QUANTIZED).exists():
            return Found(path, apart)
        if (real.parent / REPORT).is_file():
            return Found(path, real.parent)
    return Found(path, None)
