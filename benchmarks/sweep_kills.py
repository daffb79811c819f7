"""A sweep that is killed at random, and taken up again, until it is whole.

The embedded model by 4 quantizers, 3 bit widths and 2 seeds on two workers. A kill hits a worker,
Ray's scheduler, Ray's head or the sweep itself; afterwards nothing of it may run, and the last run
must give, byte by byte, what a run that nobody disturbed gives:
python benchmarks/sweep_kills.py
With --parts two of the quantizers, measured on 4,200 images, which are three parts for each file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "img" / "digits"
MATRIX = f"""
models: {ROOT / "models" / "digits_vit.onnx"}
recipes: [channelwise, fqvit, deploy, lowbit]
bits: [8/8/8, 6/6/6, 4/4/4]
seeds: [0, 1]
calib: {DIGITS / "calib"}
val: {DIGITS / "val"}
labels: {DIGITS / "val.txt"}
options: {{images: 32, report: false}}
retries: 3
"""
PARTS = f"""
models: {ROOT / "models" / "digits_vit.onnx"}
recipes: [channelwise, deploy]
bits: [8/8/8, 6/6/6]
seeds: [0, 1]
calib: {DIGITS / "calib"}
val: val.npy
options: {{images: 16, report: false}}
retries: 3
"""
VICTIMS = {"worker": "ray::", "scheduler": "raylet/raylet", "head": "gcs/gcs_server"}


def many_pictures(path: Path) -> None:
    """The validation images again and again, with noise, uint8 [4200, 32, 32, 3]."""
    files = sorted((DIGITS / "val").iterdir())
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    noise = np.random.default_rng(0).integers(-20, 21, (10, *pictures.shape))
    many = np.clip(pictures + noise, 0, 255).astype(np.uint8)
    np.save(path, many.reshape(-1, *pictures.shape[1:])[:4200])


def processes(mark: str) -> dict[int, str]:
    """Command lines of the processes that started with the mark in their environment."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"KILL_RUN={mark}".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_text()
        except OSError:
            pass
    return found


def start(base: Path, output: str, mark: str, workers: int) -> subprocess.Popen[bytes]:
    words = ["sweep", "s.yaml", "-o", output, "--workers", str(workers)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "ptq_onnx", *words],
        cwd=base,
        env={**os.environ, "KILL_RUN": mark, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )


def content(folder: Path) -> dict[str, object]:
    """What must not depend on how a cell was run: models, options, and reports but for paths."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("quantized.onnx", "fused.onnx", "formed.onnx", "config.yaml"):
            found[name] = path.read_bytes()
        elif path.name == "report.json":
            found[name] = json.loads(path.read_text()) | {"invocation": None}
    return found


def whole(base: Path, output: str, workers: int) -> float:
    """Seconds of a run to its end; its exit code must be 0."""
    begin = time.monotonic()
    code = start(base, output, secrets.token_hex(8), workers).wait()
    assert code == 0, code
    return time.monotonic() - begin


def killed(base: Path, random_: random.Random, longest: float) -> tuple[bool, str]:
    """One run that something ends; whether it was not whole by then, and what was hit."""
    mark = secrets.token_hex(8)
    run = start(base, "out", mark, 2)
    begun = ("*/.*", ".stages/cells/*")  # a cell has
    while run.poll() is None and not any(list((base / "out").glob(name)) for name in begun):
        time.sleep(0.05)
    end = time.monotonic() + random_.uniform(0, longest)
    while time.monotonic() < end and run.poll() is None:
        time.sleep(0.05)
    name = random_.choice([*VICTIMS, "sweep"])
    if name == "sweep":
        run.kill()
    else:
        found = [pid for pid, line in processes(mark).items() if VICTIMS[name] in line]
        for pid in random_.sample(found, min(1, len(found))):
            os.kill(pid, signal.SIGKILL)
        if name == "worker":  # the run goes on; it is interrupted a little later
            time.sleep(random_.uniform(0, 5))
            run.send_signal(signal.SIGINT)
    code = run.wait()
    for _ in range(100):
        if not processes(mark):
            break
        time.sleep(0.1)
    left = processes(mark)
    done = len(list((base / "out").glob("*/*/cell.json")))
    told = "".join(f"\n  left: {pid} {line[:90]!r}" for pid, line in left.items())
    text = f"{name}: exit code {code}, {len(left)} processes left, {done} cells have a record"
    return code != 0, text + told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=8, help="seconds until a kill, at most")
    parser.add_argument("--alone", type=Path, help="a result of the same matrix by one worker")
    parser.add_argument("--parts", action="store_true", help="files measured in parts")
    given = parser.parse_args()
    # Of a command in the background a shell has interrupts ignored, and what it starts too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random_ = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "s.yaml").write_text(PARTS if given.parts else MATRIX)
        if given.parts:
            many_pictures(base / "val.npy")
        alone = given.alone
        if alone is None:
            alone = base / "alone"
            print(f"one worker, undisturbed: {whole(base, 'alone', 1):.0f} s", flush=True)
        hits = 0
        while hits < given.kills:
            hit, text = killed(base, random_, given.longest)
            hits += hit
            print(f"kill {hits}, {text}" if hit else f"whole before, {text}", flush=True)
            if not hit and hits < given.kills:  # the next has all to do again
                shutil.rmtree(base / "out")
        print(f"two workers, to the end: {whole(base, 'out', 2):.0f} s", flush=True)
        wanted, found = content(alone), content(base / "out")
        same = sum(found.get(name) == value for name, value in wanted.items())
        print(f"{same} of {len(wanted)} files are the same; {len(found)} were written")
        left = [p for p in base.rglob(".*") if p.name not in (".ptq_onnx.json",)]
        print(f"hidden files left: {len(left)}")


if __name__ == "__main__":
    main()
