"""What the processor can do that decides what a file is worth on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

X86 = ("x86_64", "amd64", "i386", "i686")
WITH_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Flags of processors that add products of bytes up in 32 bits at once."""
DESCRIPTION = Path("/proc/cpuinfo")


@cache
def sums_saturate(machine: str | None = None, description: Path = DESCRIPTION) -> bool:
    """True where int8 kernels add up in 16 bits, which saturate: an x86 processor without VNNI.
    False where the system does not tell."""
    if (machine or platform.machine()).lower() not in X86:
        return False
    try:
        lines = description.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return bool(flags) and not WITH_DOT_PRODUCTS & set(flags.split())
