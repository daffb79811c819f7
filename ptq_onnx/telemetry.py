"""Nothing here talks to the network: the telemetry of what we are built on is switched off.

onnxruntime's packages report each session (file name, graph name, producer, hashes) to their
maker, on Linux since 1.29, and keep a database in the user's cache. They read
``ORT_DISABLE_TELEMETRY`` once, when they are loaded, so it is set before that; an onnxruntime
that the program loaded before this package is told by its own API. Processes that this one starts
inherit the variables. Who has set one of them keeps what it says, ``0`` to leave it on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # timm's downloads, in `ptq-onnx export`
}
"""Environment variables by which the dependencies are told, with what they are set to."""


def switch_off(environment: MutableMapping[str, str] = os.environ) -> None:
    """Switch it off for this process and its children, but for what the user has set."""
    for name, value in OFF.items():
        environment.setdefault(name, value)
    onnxruntime = sys.modules.get("onnxruntime")
    if onnxruntime is not None and environment["ORT_DISABLE_TELEMETRY"] != "0":
        onnxruntime.disable_telemetry_events()
