"""Tests run in forked processes: torch and PPQ are imported once, the package anew in each."""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType, ModuleType

import pytest

Function = tuple[str, int]
"""A file and the line on which a function of it begins."""


class Replaced(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from another text."""

    def __init__(self, path: Path, text: str) -> None:
        self.module = ".".join(path.with_suffix("").parts)
        super().__init__(self.module, str(path.resolve()))
        self.text = text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text.encode(), self.path)


class Counted(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports the package's modules with a first line in each function that says that it is called:
    a tracer, which sees those of torch too, would make some tests many times as slow."""

    def __init__(self, root: Path, called: Callable[[Function], None]) -> None:
        super().__init__("ptq_onnx", str(root / "ptq_onnx"))
        self.root, self.called = root, called

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "ptq_onnx":
            return None
        place = self.root.joinpath(*fullname.split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        loader = Counted(self.root, self.called)
        loader.name, loader.path = fullname, str(file)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__called__"] = self.called
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                line = ast.parse(f"__called__(({self.path!r}, {first}))").body[0]
                node.body.insert(ast.get_docstring(node) is not None, line)
        return compile(tree, self.path, "exec", dont_inherit=True)


class Record:
    """Which functions of the package each test calls, and how long it takes: of the processor, so
    that a busy machine leaves no test out, and by the clock."""

    def __init__(self) -> None:
        self.calls: dict[str, set[Function]] = {}
        self.seconds: dict[str, float] = {}
        self.clock: dict[str, float] = {}
        self.failed: list[str] = []
        self.called: set[Function] = set()

    def add(self, function: Function) -> None:
        """The running test calls a function."""
        self.called.add(function)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        self.called = self.calls.setdefault(item.nodeid, set())
        began, at = time.process_time(), time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - began
            self.clock[item.nodeid] = time.perf_counter() - at

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def preload() -> None:
    """What every test imports and no mutant changes. The package's own modules are forgotten: each
    process reads them for itself."""
    importlib.import_module("ptq_onnx.telemetry").switch_off()
    for name in (
        "torch", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "ptq_onnx.engine.ppq_import",
        "hypothesis", "hypothesis.extra.numpy", "scipy.stats", "PIL.Image", "pydantic", "typer",
        "rich.console", "jinja2", "matplotlib.pyplot",
    ):  # fmt: skip
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.suppress(ImportError),
        ):
            importlib.import_module(name)
    for name in [n for n in sys.modules if n.partition(".")[0] == "ptq_onnx"]:
        del sys.modules[name]


def _pytest(names: Sequence[str], *plugins: object) -> int:
    options = ["-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, *names], list(plugins)))


def forked(work: Callable[[], bytes], seconds: float) -> bytes | None:
    """What ``work`` returns in a process of its own; None where it takes longer."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            found = work()
        except BaseException as error:
            found = repr(error).encode()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(found)
        os._exit(0)
    os.close(writing)
    late = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal late
        late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return None if late else answer


def recorded(root: Path, tests: Sequence[str], seconds: float) -> Record:
    """The tests on the package as it is."""

    def work() -> bytes:
        record = Record()
        sys.meta_path.insert(0, Counted(root, record.add))
        _pytest(tests, record)
        return pickle.dumps(vars(record))

    answer = forked(work, seconds)
    if answer is None:
        raise SystemExit(f"The tests take longer than {seconds:.0f} s.")
    record = Record()
    vars(record).update(pickle.loads(answer))
    if record.failed:
        raise SystemExit(f"A test fails without a mutant: {record.failed[0]}.")
    return record


def passes(path: Path, text: str, tests: Sequence[str], seconds: float) -> bool | None:
    """Whether the tests pass with the module's text replaced; None where they take too long."""

    def work() -> bytes:
        sys.meta_path.insert(0, Replaced(path, text))
        sys.dont_write_bytecode = True
        return str(_pytest(tests)).encode()

    answer = forked(work, seconds)
    return None if answer is None else answer == b"0"
