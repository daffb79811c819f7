"""The content of files as one word."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of(*files: str | Path) -> str:
    """SHA-256 of one file, or of those of several, in their order. Raises OSError."""
    found = []
    for path in files:
        with open(path, "rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256"))
    if len(found) == 1:
        return found[0].hexdigest()
    return hashlib.sha256(b"".join(one.digest() for one in found)).hexdigest()
