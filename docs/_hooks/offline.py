"""What built pages load from elsewhere: nothing must be left."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

SOURCES = {"src", "srcset", "data", "poster", "background"}
INERT = {"canonical", "next", "prev", "alternate", "author", "license", "help", "search"}
"""Relations of a ``<link>`` that a browser does not fetch."""
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.I)
IN_STYLE = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)", re.I)
IN_SCRIPT = re.compile(r"""["'`]((?:https?:)?//[a-z0-9][a-z0-9.-]*\.[a-z]{2,}[^"'`]*)["'`]""", re.I)
"""An address as a value of a script; those in comments and licences are no values."""
NAMESPACES = "http://www.w3.org/"


class _Page(HTMLParser):
    """Collects what a page loads, scripts in it included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        addresses = [given[name] for name in SOURCES if name in given]
        if tag == "link" and not set(given.get("rel", "").split()) <= INERT:
            addresses.append(given.get("href", ""))
        if tag in ("use", "image"):
            addresses += [given.get("href", ""), given.get("xlink:href", "")]
        self.found += [a for a in addresses if ELSEWHERE.match(a)]
        self.found += IN_STYLE.findall(given.get("style", ""))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += loaded_by_style(data)
        elif self._inside == "script":
            self.found += loaded_by_script(data)


def loaded_by_page(text: str) -> list[str]:
    """Addresses that a browser fetches from elsewhere for an HTML page."""
    page = _Page()
    page.feed(text)
    return page.found


def loaded_by_style(text: str) -> list[str]:
    """The same for a style sheet."""
    return IN_STYLE.findall(text)


def loaded_by_script(text: str) -> list[str]:
    """Addresses that a script holds as values, but for names of XML namespaces."""
    return [a for a in IN_SCRIPT.findall(text) if not a.startswith(NAMESPACES)]


READERS = {".html": loaded_by_page, ".css": loaded_by_style, ".js": loaded_by_script}


def loaded(site: Path) -> list[str]:
    """``file: address`` of all that the pages below ``site`` load from elsewhere."""
    found = []
    for path in sorted(site.rglob("*")):
        reader = READERS.get(path.suffix)
        if reader is not None:
            addresses = reader(path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(site)}: {a}" for a in dict.fromkeys(addresses)]
    return found
