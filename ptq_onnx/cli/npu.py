"""Options by which evaluate and compare run files on Qualcomm's NPU, or on its emulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptq_onnx.errors import ConfigError

if TYPE_CHECKING:
    import onnxruntime as ort

RUNTIMES = ("onnxruntime", "qnn")
WORDS = (
    "Computed by Qualcomm's compiler and, on x86-64, its emulator: the numbers are those of the"
    " device, as far as the vendor's emulator is; the time that it took says nothing of the"
    " device's."
)


@dataclass(frozen=True)
class Npu:
    """``soc``, ``htp_arch``: see ``targets/qnn/session.py``; ``context``: where the compiled graph
    goes."""

    soc: str
    htp_arch: str
    context: str | None

    def open(self, path: str | Path, threads: int) -> ort.InferenceSession:
        """A file on the NPU. Raises ConfigError without the wheel, ModelError where refused."""
        from ptq_onnx.targets.qnn.session import Device, npu_session

        device = Device(self.soc, self.htp_arch)
        return npu_session(path, device, threads=threads, context=self.context)


def npu_of(
    runtime: str, soc: str | None, htp_arch: str | None, context: str | None = None
) -> Npu | None:
    """None for ONNX Runtime. Raises ConfigError."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"There is no runtime '{runtime}'; choose one of {', '.join(RUNTIMES)}.")
    given = {"--soc": soc, "--htp-arch": htp_arch, "--context": context}
    used = [name for name, value in given.items() if value is not None]
    if runtime != "qnn":
        if used:
            raise ConfigError(f"{used[0]} belongs to --runtime qnn.")
        return None
    if context is not None and Path(context).exists():
        raise ConfigError(f"--context {context} exists already; name another file.")
    if context is not None and not Path(context).absolute().parent.is_dir():
        raise ConfigError(f"--context {context}: its folder does not exist.")
    return Npu(soc or "", htp_arch or "", context)
