"""The mkdocs hook: parts of pages that come from the code, pictures, and the notebook's page.

A line ``<!-- generated: NAME WORD… -->`` in a page is replaced by what ``PARTS[NAME]`` makes of the
words, each time the pages are built. Nothing generated is stored, so that nothing can be stale.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_tables
import figures
import notebook_page
import offline
import package_tables

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
PARTS: dict[str, Callable[..., str]] = {
    "commands": command_tables.commands,
    "options": command_tables.options,
    "fields": command_tables.fields_table,
    "methods": package_tables.methods,
    "models": package_tables.models,
    "public-names": package_tables.public_names,
    "quantizers": package_tables.quantizers,
    "rooms": package_tables.rooms,
    "rules": package_tables.rules,
    "target": package_tables.target,
    "fusions": package_tables.fusions,
    "figures": figures.rows,
}
MARK = re.compile(r"^<!-- generated: ([a-z-]+)(?: (.+))? -->$", re.M)
PICTURE = re.compile(r"\]\((\.\./)((?:\.\./)*img/[^)]+)\)")
SPHINX_ROLE = re.compile(r":(?:func|class|meth|mod):<code>~?([^<]+)</code>")


def with_parts(text: str) -> str:
    """A page with its generated parts in place of their marks. Raises KeyError."""
    return MARK.sub(lambda mark: PARTS[mark[1]](*shlex.split(mark[2] or "")), text)


def on_files(files: Any, config: Any) -> Any:
    """The project's pictures, and a page for each notebook."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "img").glob("*.png")):
        files.append(File.generated(config, f"img/{path.name}", abs_src_path=str(path)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=notebook_page.page(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Generated parts; pictures of ``img/``, which lie beside the pages once they are built."""
    return PICTURE.sub(r"](\2)", with_parts(markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings have roles (``:func:`x```) that Markdown does not know."""
    return SPHINX_ROLE.sub(r"<code>\1</code>", html)


def on_post_build(config: Any) -> None:
    """Pages that would load anything from the network are no result. Raises PluginError."""
    from mkdocs.exceptions import PluginError

    found = offline.loaded(Path(config["site_dir"]))
    if found:
        raise PluginError("loaded from the network: " + "; ".join(found))
