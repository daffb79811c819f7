"""The templates of the pages."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from ptq_onnx.files.file_names import for_page
from ptq_onnx.report.page_text import cell, counts, decibel_text, number, size


@cache
def template(name: str) -> Template:
    """A template, read once in a process; what it prints is text, never markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=for_page,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, size=size, cell=cell, counts=counts, decibels=decibel_text
    )
    return environment.get_template(name)
