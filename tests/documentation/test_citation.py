"""CITATION.cff follows the schema 1.2.0 in what it uses, and names this version."""

from __future__ import annotations

import tomllib

import yaml

import ptq_onnx
from documentation.pages import ROOT

REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = REQUIRED | {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license",
    "license-url", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "type", "url", "version",
}  # fmt: skip


def test_citation() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found.keys() >= REQUIRED
    assert set(found) <= ALLOWED
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    assert found["version"] == ptq_onnx.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["license"] == project["license"]
    people = [*found["authors"], *(a for r in found["references"] for a in r["authors"])]
    for one in people:
        assert one.keys() in ({"name"}, {"given-names", "family-names"})
    for reference in found["references"]:
        assert reference.keys() >= {"type", "title", "authors"}
