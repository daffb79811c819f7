"""What the package says of itself: extras, and the page that an index shows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHERE = "https://example.org/ptq_onnx"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptq_onnx_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_pictures_and_links_get_whole_addresses(setup: ModuleType) -> None:
    page = setup.page(README, WHERE)
    assert len(links(page)) == len(links(README))
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        assert picture.startswith(f"{WHERE}/raw/main/img/")
        assert (ROOT / picture.removeprefix(f"{WHERE}/raw/main/")).is_file()
    assert all(link.startswith(("https://", "#")) for link in links(page))
    assert set(setup.urls(WHERE)) == {"Source", "Documentation", "Changelog", "Issues"}


def test_without_an_address_no_picture_is_missing(setup: ModuleType) -> None:
    page = setup.page(README, None)
    assert "![" not in page
    assert all(link.startswith(("https://", "#")) for link in links(page))
    assert "CONTRIBUTING.md says how" in page
    assert setup.urls(None) == {}


def test_pages_name_files_that_are_there() -> None:
    pictures = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in links(page.read_text(encoding="utf-8")):
            path, _, _ = link.partition("#")
            if path and not path.startswith("https://"):
                # The notebook's page is made when the pages are built
                path = re.sub(r"notebooks/quickstart\.md$", "notebooks/quickstart.ipynb", path)
                assert (page.parent / path).exists(), (page, link)
                pictures += path.endswith(".png")
    assert pictures >= 5


def test_onnxruntime_is_asked_for_by_extras_alone() -> None:
    """Its packages overwrite each other; pip knows no either-or."""
    assert not [name for name in PROJECT["dependencies"] if name.startswith("onnxruntime")]
    extras = PROJECT["optional-dependencies"]
    assert [name.partition(">")[0] for name in extras["cpu"]] == ["onnxruntime"]
    assert {name.partition(">")[0] for name in extras["gpu"]} == {"onnxruntime", "onnxruntime-gpu"}
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in re.findall(r"^(?!#)([A-Za-z0-9_.-]+)", pins, re.M):
        assert f"{name}==" in pins


def test_readme_lines_for_installing_are_those_that_were_tried() -> None:
    quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for page in (README, quickstart):
        assert "pip install --constraint requirements.txt --editable '.[cpu]'" in page
    pin = re.search(r"^onnxruntime==([0-9.]+);", (ROOT / "requirements.txt").read_text(), re.M)
    assert pin is not None
    line = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime=={pin[1]}"
    assert line in README
    assert line in quickstart


def test_one_onnxruntime_is_installed() -> None:
    """Two overwrite each other's files, and what asks for one may bring it beside the other."""
    names = {"onnxruntime", "onnxruntime-gpu"}
    found = {str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions()} & names
    assert len(found) == 1
    asked = (ROOT / "requirements-qnn.txt").read_text(encoding="utf-8")
    assert "--no-deps --requirement requirements-qnn.txt" in (ROOT / "Makefile").read_text()
    assert [line for line in asked.splitlines() if not line.startswith("#")] == [
        "onnxruntime-qnn==2.7.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
    ]
