"""Whether this CPU multiplies int8 in one instruction."""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
DOT_PRODUCTS = frozenset(
    ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
)
"""Linux's names of the instruction sets with int8 dot products, of x86 and of ARM."""


def flags(text: str | None = None) -> frozenset[str]:
    """The CPU's features as Linux names them, from the text of /proc/cpuinfo; empty elsewhere."""
    if text is None:
        try:
            text = CPUINFO.read_text()
        except OSError:
            return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def multiplies_int8(features: frozenset[str]) -> bool | None:
    """True with VNNI, AMX or ARM's dot products; None where the features are not known."""
    return bool(features & DOT_PRODUCTS) if features else None
