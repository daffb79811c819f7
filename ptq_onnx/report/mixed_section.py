"""The part of the page on widths that were mixed: bits by role and block, and other targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ptq_onnx.report.scatter import Point, scatter

Entry = Mapping[str, Any]
PARTS = ("weights", "activations")


def mixed_section(found: Entry | None) -> dict[str, Any] | None:
    """Rows of roles with the bits of each block, and a plot of the expected SQNR over mean bits;
    None where nothing was mixed."""
    if not found:
        return None
    roles: dict[str, dict[int | None, int]] = {}
    for module in found["modules"]:
        roles.setdefault(module["role"], {})[module["block"]] = module["bits"]
    blocks = sorted({b for own in roles.values() for b in own if b is not None})
    rows = [
        {"role": role, "alone": own.get(None), "bits": [own.get(b) for b in blocks]}
        for role, own in roles.items()
    ]
    points = [
        Point(
            point["bits"], point[key], kind, f"{kind}: {point['bits']:g} bits, {point[key]:.1f} dB"
        )
        for point in found["points"]
        for part in PARTS
        for key, kind in (
            (f"{part}_db", f"{part}, mixed"),
            (f"uniform_{part}_db", f"{part}, alike"),
        )
        if point[key] is not None
    ]
    plot = scatter(points, "mean bits", "expected SQNR, dB") if len(points) > 1 else ""
    return {**found, "blocks": blocks, "rows": rows, "plot": Markup(plot)}
