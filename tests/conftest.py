"""Shared fixtures. Tests that need the sample models of ../shared skip without them."""

import gc
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from short_digits import short_digits

import ptq_onnx  # noqa: F401  (before any onnxruntime: it switches off its telemetry)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
MODELS = {
    "vit": SHARED / "models/vit_tiny_patch16_224.opset14.onnx",
    "vit-dynamo": SHARED / "models/vit_tiny_patch16_224.dynamo.onnx",
    "deit": SHARED / "models/deit_tiny_patch16_224.opset17.onnx",
}

LONG = (
    "zoo/test_zoo.py",
    "targets/integer/test_integer_lowering.py",
    "oracle/test_oracle.py",
    "sweep/test_survival.py",
    "faults/test_signals.py",
    "analysis/test_graphwise.py",
    "test_targets.py",
    "cli/test_cli.py",
    "test_example.py",
    "auto/test_auto.py",
    "test_telemetry.py",
    "fuzz/test_fuzz.py",
    "test_api.py",
    "analysis/test_compare.py",
    "pipeline/test_timm_export.py",
    "engine/test_agreement.py",
    "runtime/test_workers.py",
    "analysis/test_analyse.py",
    "engine/test_engine.py",
    "analysis/test_figures.py",
    "sweep/test_sweep.py",
    "pipeline/test_rotate_option.py",
    "equalization/test_hidden_pieces.py",
    "equalization/test_token_factors.py",
    "test_progress.py",
    "quantizers/test_scale_search.py",
    "analysis/test_sensitivity.py",
    "test_wheel.py",
    "documentation/test_notebook.py",
)
"""Files of ten seconds and more, the longest first: none is left for one process at the end."""

gc.set_threshold(20_000, 20, 50)
"""Graphs are many small objects that live long: with Python's 700 a twentieth of the suite's time
went into searching them for garbage."""

IMPORTED = 200
"""So many new modules are worth a look at all objects."""
JOBS = 8
"""So many jobs begin with one search for garbage in place of one each, which PPQ asks for: a tenth
of a second, as long as many a small model takes."""
_modules = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others stay in their order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).as_posix(), len(LONG)))


def pytest_runtest_setup() -> None:
    """What the imports left is not searched for garbage again: torch's objects alone made a quarter
    of the time of a small job, which PPQ begins with ``gc.collect``. That is done now and then."""
    global _modules
    if len(sys.modules) >= _modules + IMPORTED:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()
    if ppq := sys.modules.get("ppq.core.defs"):
        ppq.__dict__["gc"] = _SELDOM


class _Seldom:
    """Stands for the module ``gc`` in PPQ."""

    def __init__(self) -> None:
        self.asked = 0

    def collect(self) -> None:
        self.asked += 1
        if self.asked % JOBS == 0:
            gc.collect()


_SELDOM = _Seldom()


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--workers`` are used for small models too, where they do not pay."""
    monkeypatch.setattr("ptq_onnx.pipeline.sharing.STARTING", 0.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample models and images."""
    if not SHARED.is_dir():
        pytest.skip("the sample models and images (../shared) are not here")
    return SHARED


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with one block of six."""
    return short_digits(tmp_path_factory.mktemp("short") / "short.onnx")


@pytest.fixture(scope="session")
def real_models(shared: Path) -> dict[str, Path]:
    """Paths of the three sample models by short name: vit, vit-dynamo, deit."""
    return MODELS
