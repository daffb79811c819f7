"""The wheel works where there is no checkout: built, installed by itself, run in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import ptq_onnx

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ptq_onnx", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"


def call(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A command without the checkout on its path."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in hidden},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    done = call(source, sys.executable, "-c", BUILD)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel in it; of all else it sees what is installed here.

    Lines of a ``.pth`` file add folders without reading the ``.pth`` files in them, so that an
    editable install of the checkout is not seen.
    """
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place, symlinks=os.name != "nt")
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    found = call(
        place, scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    )
    packages = Path(found.stdout.strip())
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python")
    done = call(place, *pip, "install", *options, wheel)
    assert done.returncode == 0, done.stderr
    return scripts / "python"


def test_it_holds_the_package_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "ptq_onnx", f"ptq_onnx-{ptq_onnx.__version__}.dist-info",
    }  # fmt: skip
    for path in (ROOT / "ptq_onnx").rglob("*"):
        if path.suffix in (".py", ".html", ".json", ".typed"):
            assert path.relative_to(ROOT).as_posix() in names


def test_it_runs_in_another_folder(python: Path, tmp_path: Path) -> None:
    home = call(tmp_path, python, "-c", "import ptq_onnx; print(ptq_onnx.__file__)").stdout
    assert Path(home.strip()).is_relative_to(python.parents[1])
    command = python.parent / "ptq-onnx"
    model = tmp_path / "digits.onnx"
    shutil.copy(ROOT / "models" / "digits_vit.onnx", model)
    for name, count in (("calib", 24), ("val", 48)):
        (tmp_path / name).mkdir()
        for picture in sorted((ROOT / "img" / "digits" / name).iterdir())[:count]:
            shutil.copy(picture, tmp_path / name)
    shutil.copy(ROOT / "img" / "digits" / "val.txt", tmp_path)

    # The images of the embedded model are no part of it
    done = call(tmp_path, command, "quantize", "digits.onnx")
    assert done.returncode == 2
    assert "come with the source, not with the installed package" in done.stderr

    done = call(
        tmp_path, command, "quantize", "digits.onnx", "--calib", "calib", "--val", "val",
        "--labels", "val.txt", "--images", 16, "--analysis-images", 8, "--no-pictures",
        "-o", "small.onnx",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "top-1 of 48 images" in done.stdout
    assert "38 of 38 linears" in done.stdout
    assert (tmp_path / "small.onnx").stat().st_size < model.stat().st_size / 2
    assert (tmp_path / "small" / "report.html").is_file()
