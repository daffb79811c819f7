"""ONNX Runtime's symbolic shape inference: a file of its package, and no part of its API."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import onnx

MODULE = "onnxruntime.tools.symbolic_shape_infer"


def symbolic_inference(proto: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's symbolic shape inference.

    Its public entry writes a file into the working directory where inference is incomplete;
    the steps are taken one by one here, and an incomplete result is used as it is.
    """
    # Its guesses at sizes, which are warnings to its own users
    logging.getLogger(MODULE).setLevel(logging.ERROR)
    inference = _module().SymbolicShapeInference(
        int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0
    )
    inference._preprocess(proto)
    while inference.run_:
        inference._infer_impl()
    inference._update_output_from_vi()
    inferred: onnx.ModelProto = inference.out_mp_
    return inferred


def _module() -> ModuleType:
    """The module, without the rest of its folder, which imports torch where there is one: longer
    than all that a model without quantization is looked at for."""
    package = importlib.util.find_spec("onnxruntime")
    folders = package.submodule_search_locations if package is not None else None
    path = Path((folders or [""])[0]) / "tools" / "symbolic_shape_infer.py"
    if MODULE in sys.modules or not path.is_file():
        return importlib.import_module(MODULE)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module
