"""The classes of images: from a file of ``name label`` lines, or from the folders they lie in."""

from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.files.text_file import read_text
from ptq_onnx.images.opening import FolderSource
from ptq_onnx.images.source import ImageSource

MOST_DIGITS = 9
"""Of a class index."""


def read_labels(path: str | Path) -> dict[str, int]:
    """Class by image name from lines ``name label``; blank lines and ``#`` comments are ignored.

    Raises ImageError with the line number.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ImageError(f"Labels file '{path}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ImageError(f"Labels file '{path}' cannot be read: {error}.") from None
    labels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        name = name.rstrip()
        if not (name and label.isascii() and label.isdigit() and len(label) <= MOST_DIGITS):
            raise ImageError(
                f"Labels file '{path}', line {number}: expected 'name label' with a class index "
                f"from 0, got {line.strip()[:60]!r}."
            )
        if labels.setdefault(name, int(label)) != int(label):
            raise ImageError(
                f"Labels file '{path}', line {number}: '{name}' is {label} here and "
                f"{labels[name]} further up."
            )
    if not labels:
        raise ImageError(f"Labels file '{path}' holds no 'name label' lines.")
    return labels


def labels_for(
    source: ImageSource, labels_file: str | Path | None = None, classes: int | None = None
) -> NDArray[np.int64]:
    """Class index of each of ``source.names``, int64 [N].

    From ``labels_file`` (a name there is a relative path, a file name, or an index into an array);
    without one, those that came with the images, else from the folders as torchvision's ImageFolder
    does: the sub-folders of the first level, sorted, are the classes 0, 1, …. Raises ImageError,
    also for a label beyond the model's ``classes``.
    """
    if labels_file is None and source.labels is not None:
        truth = source.labels
    else:
        truth = _from_folders(source) if labels_file is None else _from_file(source, labels_file)
    if classes is not None and (truth >= classes).any():
        name = source.names[int(truth.argmax())]
        raise ImageError(
            f"Label {truth.max()} of image '{name}' is out of range: the model has {classes}"
            f" classes, 0…{classes - 1}."
        )
    return truth


def _from_file(source: ImageSource, labels_file: str | Path) -> NDArray[np.int64]:
    labels, names = read_labels(labels_file), source.names
    found = [labels.get(name, labels.get(PurePosixPath(name).name)) for name in names]
    missing = [name for name, label in zip(names, found, strict=True) if label is None]
    if missing:
        raise ImageError(
            f"Labels file '{labels_file}': no line for '{missing[0]}' "
            f"({len(missing)} of {len(names)} images have none)."
        )
    return np.array(found, dtype=np.int64)


def _from_folders(source: ImageSource) -> NDArray[np.int64]:
    if not isinstance(source, FolderSource) or source.listed:
        raise ImageError(
            "Images in an array or a list have no folders to take classes from: give labels."
        )
    loose = [name for name in source.files if "/" not in name]
    if loose:
        raise ImageError(
            f"Folder '{source.root}': '{loose[0]}' lies in no class folder; give a labels file "
            "or one sub-folder per class."
        )
    classes = sorted({name.split("/")[0] for name in source.files})
    index = {name: number for number, name in enumerate(classes)}
    return np.array([index[name.split("/")[0]] for name in source.names], dtype=np.int64)
