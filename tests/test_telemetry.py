"""No command makes an internet socket or leaves a trace of onnxruntime's telemetry.

The kernel kills a process at its first internet socket (``no_internet.py``); onnxruntime's
telemetry sends after some seconds, but opens its database at once, which a short run shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import no_internet
import pytest

from ptq_onnx.telemetry import OFF, switch_off

ROOT = Path(__file__).resolve().parents[1]
MODEL = next((ROOT / "models").glob("*.onnx"))
DIGITS = ROOT / "img/digits"
RUN = "import sys; from ptq_onnx.cli.app import main; sys.argv[0] = 'ptq-onnx'; main()"
SHORT = ("--no-report", "--images", "16", "--threads", "1")

pytestmark = pytest.mark.skipif(not no_internet.forbidden(), reason="seccomp is Linux's")


def start(home: Path, code: str, *words: object, **changes: str) -> subprocess.Popen[str]:
    """Python code without internet, in a home of its own, where no variable hides telemetry."""
    hidden = {*OFF, "CI", "GITHUB_ACTIONS", "TF_BUILD", "XDG_CACHE_HOME", "ORT_RUNNING_UNIT_TESTS"}
    home.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment,
        cwd=home,
        preexec_fn=no_internet.forbid_internet,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(home: Path, code: str, *words: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    with start(home, code, *words, **changes) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def traces(home: Path) -> list[str]:
    """What telemetry has written there."""
    return sorted(p.name for p in home.rglob("*") if "onnxruntime" in p.name)


@pytest.fixture(scope="module", autouse=True)
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """onnxruntime by itself, while other tests run: its first upload comes some seconds after the
    first session. Its home and the process."""
    home = tmp_path_factory.mktemp("plain") / "home"
    code = "import onnxruntime as o, sys, time; s = o.InferenceSession(sys.argv[1]); time.sleep(60)"
    with start(home, code, MODEL) as process:
        yield home, process
        process.kill()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, short: Path) -> Path:
    home = tmp_path_factory.mktemp("quantized") / "home"
    done = run(home, RUN, "quantize", short, "--calib", DIGITS / "calib", *SHORT)
    assert done.returncode == 0, done.stderr
    assert traces(home) == []
    return home / "output/quantized.onnx"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_a_socket_kills(tmp_path: Path, family: str) -> None:
    done = run(tmp_path / "home", f"import socket; socket.socket(socket.{family}); print('made')")
    assert (done.returncode, done.stdout) == (no_internet.KILLED, "")


def test_other_sockets_are_no_matter(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "import socket; socket.socketpair(); print('made')")
    assert (done.returncode, done.stdout) == (0, "made\n")


def test_a_wish_to_have_it_on_is_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run(home, RUN, "inspect", MODEL, ORT_DISABLE_TELEMETRY="0")
    assert done.returncode in (0, no_internet.KILLED)
    assert "onnxruntime.db" in traces(home)


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", MODEL),
        ("check", "QUANTIZED", "--target", "onnxruntime"),
        ("evaluate", "QUANTIZED", "--reference", "FLOAT", "--val", DIGITS / "calib"),
        ("benchmark", "FLOAT", "QUANTIZED", "--batch", "1", "--seconds", "0.2", "--threads", "1"),
        (
            *("benchmark", "FLOAT", "QUANTIZED", "--runtime", "openvino"),
            *("--batch", "1", "--seconds", "0.2", "--threads", "1"),
        ),
    ],
    ids=lambda words: "-".join(str(w) for w in words if str(w).isalpha()),
)
def test_commands_stay_at_home(
    tmp_path: Path, short: Path, quantized: Path, words: tuple[object, ...]
) -> None:
    if "openvino" in words:
        pytest.importorskip("openvino")
    home = tmp_path / "home"
    paths = {"QUANTIZED": quantized, "FLOAT": short}
    done = run(home, RUN, *(paths.get(str(word), word) for word in words))
    assert done.returncode == 0, done.stderr
    assert traces(home) == []


def test_a_program_that_loads_onnxruntime_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    loaded = types.SimpleNamespace(disable_telemetry_events=lambda: calls.append("off"))
    monkeypatch.setitem(sys.modules, "onnxruntime", loaded)
    environment: dict[str, str] = {}
    switch_off(environment)
    assert (environment, calls) == (dict(OFF), ["off"])
    switch_off({"ORT_DISABLE_TELEMETRY": "0"})
    assert calls == ["off"]


def test_telemetry_would_be_seen(plain: tuple[Path, subprocess.Popen[str]]) -> None:
    home, process = plain
    process.communicate()
    assert process.returncode == no_internet.KILLED
    assert "onnxruntime.db" in traces(home)
