"""Pages agree with the code: options, names, figures; what is generated can be generated."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from documentation.pages import DOCS, PAGES, ROOT, WRITTEN, named
from ptq_onnx.config.names import METHOD_NAMES, QUANTIZER_NAMES, TARGETS
from ptq_onnx.config.quantize_config import QuantizeConfig

COMMANDS = (DOCS / "commands.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands_page() -> str:
    import generated

    return generated.with_parts(COMMANDS)


def command_names() -> list[str]:
    import command_tables

    return list(command_tables.all_commands())


@pytest.mark.parametrize("command", command_names())
def test_the_page_names_every_option(command: str, commands_page: str) -> None:
    import command_tables

    assert f"\n## {command}\n" in commands_page
    section = commands_page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    for param in command_tables.all_commands()[command].params:
        for name in (*param.opts, *param.secondary_opts):
            if name.startswith("--"):
                assert re.search(rf"`(?:-\w, |--[a-z0-9-]+, )*{name}\b", section), (command, name)
        assert param.metavar is None or param.metavar.replace("|", "\\|") in section


def test_a_row_has_its_default_and_its_text_apart(commands_page: str) -> None:
    row = "| `--images N` | 128 | Calibration images to use. |"
    assert row in commands_page
    assert "| `--val DIR` | required | Images to measure on: a folder, .npy or .npz. |" in (
        commands_page
    )
    assert "[default" not in commands_page


def test_the_page_names_every_field(commands_page: str) -> None:
    rows = commands_page.rpartition("| field |")[2]
    for field in fields(QuantizeConfig):
        assert f"| `{field.name}` |" in rows


def test_the_roles_of_a_model_are_on_the_page() -> None:
    """Those that ``--keep-float`` takes on a Vision Transformer."""
    from ptq_onnx import roles

    text = COMMANDS.partition("### Roles")[2].partition("### ")[0]
    listed = set(re.findall(r"`([a-z0-9_]+)`", text))
    assert set(roles(ROOT / "models" / "digits_vit.onnx")) - listed <= {"input", "qk_scale"}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_parts_are_known(path: Path) -> None:
    """Every mark makes something; figures that a page quotes are there."""
    import generated

    text = path.read_text(encoding="utf-8")
    marks = generated.MARK.findall(text)
    assert len(marks) == text.count("<!-- generated:")
    for name, words in marks:
        if name != "models":  # imports every exporter; the build does it
            assert generated.with_parts(f"<!-- generated: {name}{' ' * bool(words)}{words} -->")


def test_a_figure_that_is_not_there_is_an_error() -> None:
    import figures

    with pytest.raises(ValueError, match="no row with 'nix'"):
        figures.rows("accuracy", "nix")
    with pytest.raises(KeyError):
        figures.rows("nix")
    assert len(figures.rows("accuracy", "vanilla").splitlines()) == 3


def test_quantizers_targets_and_methods_have_their_place() -> None:
    for name in QUANTIZER_NAMES:
        assert (DOCS / "quantizers" / f"{name}.md").is_file()
    for name in TARGETS:
        text = (DOCS / "targets" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- generated: target {name} -->" in text
        assert f"<!-- generated: rules {name} -->" in text
    calibration = (DOCS / "calibration.md").read_text(encoding="utf-8")
    for name in METHOD_NAMES:
        assert f"| `{name}` |" in calibration


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    linked = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    written = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert set(linked) == written | {"notebooks/quickstart.md"}


def test_the_readme_is_short_and_has_the_figures_of_measurements() -> None:
    import figures

    assert len(README.encode()) <= 6144
    lines = README.splitlines()
    assert lines[2].startswith("    make example")
    assert lines[3].startswith("    make test")
    assert figures.rows("peers") in README


def test_measurements_name_scripts_and_dates() -> None:
    text = (DOCS / "measurements.md").read_text(encoding="utf-8")
    for script in re.findall(r"python (benchmarks/[\w/]+\.py)", text):
        assert (ROOT / script).is_file()
    assert len(re.findall(r"2026-11-\d\d", text)) >= 10


def test_python_of_the_pages_compiles() -> None:
    for path in PAGES:
        for snippet in re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
            compile(snippet, str(path), "exec")


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_files_that_a_page_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:ptq_onnx|tests|benchmarks|models|img|docs)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
