"""What is loaded from elsewhere is seen, and what is only a link is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from documentation.pages import DOCS  # noqa: F401  (makes the hooks importable)


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<script src="//cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        '<link rel="preconnect" href="https://fonts.example.org" crossorigin>',
        '<link rel="shortcut icon" href="http://example.org/i.ico">',
        '<img src="HTTPS://example.org/x.png">',
        '<img srcset="https://example.org/x.png 2x">',
        '<iframe src="https://example.org"></iframe>',
        '<svg><use href="https://example.org/x.svg#a"/></svg>',
        "<p style=\"background: url('https://example.org/x.png')\">",
        "<style>@import 'https://example.org/x.css';</style>",
        "<script>load('https://example.org/x.js')</script>",
    ],
)
def test_pages_that_load(text: str) -> None:
    import offline

    assert len(offline.loaded_by_page(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        '<a href="https://example.org">there</a>',
        '<link rel="canonical" href="https://example.org/">',
        '<img src="img/x.png"><script src="../x.js"></script>',
        '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>',
        "<pre>url(https://example.org)</pre>",
        "<script>var x = '../..'; // see https://example.org</script>",
    ],
)
def test_pages_that_do_not(text: str) -> None:
    import offline

    assert offline.loaded_by_page(text) == []


def test_all_files_of_a_site(tmp_path: Path) -> None:
    import offline

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.css").write_text("@font-face { src: url(https://example.org/f.woff2) }")
    (tmp_path / "y.js").write_text("n = 'http://www.w3.org/2000/svg'; f(\"//example.org/y.js\")")
    (tmp_path / "z.html").write_text("<a href='https://example.org'>x</a>")
    assert offline.loaded(tmp_path) == [
        "a/x.css: https://example.org/f.woff2", "y.js: //example.org/y.js",
    ]  # fmt: skip
