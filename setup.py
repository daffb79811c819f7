"""What pyproject.toml cannot say: README.md as an index of packages shows it.

An index knows no files of the source, so that pictures and links need whole addresses. Build with
PTQ_ONNX_REPOSITORY set to where the source is public (https://…, without a slash at the end), and
they get them, and the package its URLs; without it, pictures are left out and links are text.
"""

import os
import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).resolve().parent / "README.md"
VARIABLE = "PTQ_ONNX_REPOSITORY"
BRANCH = "main"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")
"""``[text](file)`` and ``![text](picture)`` that name a file of the source."""


def page(text: str, repository: str | None) -> str:
    """The text, with the addresses of files in ``repository``, or without the links."""

    def whole(found: re.Match[str]) -> str:
        mark, words, path = found.groups()
        if repository is None:
            return "" if mark else words
        kind = "raw" if mark else "blob"
        return f"{mark}[{words}]({repository}/{kind}/{BRANCH}/{path})"

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(whole, text))


def urls(repository: str | None) -> dict[str, str]:
    """What the index links to, where that is known."""
    if repository is None:
        return {}
    return {
        "Source": repository,
        "Documentation": f"{repository}/blob/{BRANCH}/README.md",
        "Changelog": f"{repository}/blob/{BRANCH}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


if __name__ == "__main__":
    address = os.environ.get(VARIABLE) or None
    setup(
        long_description=page(README.read_text(encoding="utf-8"), address),
        long_description_content_type="text/markdown",
        project_urls=urls(address),
    )
