"""Shared fixtures. Tests that need the sample models of ../shared skip without them."""

from pathlib import Path

import pytest

import ptq_onnx  # noqa: F401  (before any onnxruntime: it switches off its telemetry)

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = {
    "vit": SHARED / "models/vit_tiny_patch16_224.opset14.onnx",
    "vit-dynamo": SHARED / "models/vit_tiny_patch16_224.dynamo.onnx",
    "deit": SHARED / "models/deit_tiny_patch16_224.opset17.onnx",
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample models and images."""
    if not SHARED.is_dir():
        pytest.skip("the sample models and images (../shared) are not here")
    return SHARED


@pytest.fixture(scope="session")
def real_models(shared: Path) -> dict[str, Path]:
    """Paths of the three sample models by short name: vit, vit-dynamo, deit."""
    return MODELS
