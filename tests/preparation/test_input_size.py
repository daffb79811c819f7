"""Dynamic axes over a fixed table: the size from the graph, or one line that names ``--size``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from small_graph import SmallGraph, run, sample

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation.prepare import prepare

CASES = Path(__file__).resolve().parents[3] / "shared/cases"
WIDTH = 8


def vit(
    tmp_path: Path,
    places: int,
    *,
    shape: tuple[int | str, ...] = ("batch_size", "num_channels", "height", "width"),
    tokens: int = 1,
    patch: int = 4,
    pads: int = 0,
    kernel: int = 0,
    grid: tuple[int, int] | None = None,
    table: bool = True,
) -> Path:
    """Patches, class tokens, a position table of ``places`` and tokens, a mean and a head.

    ``grid``: rows and columns into which a Reshape cuts the patches.
    """
    g = SmallGraph(shape)
    weight = g.const(0.1 * sample(WIDTH, 3, kernel or patch, kernel or patch), "w")
    x = g("Conv", "x", weight, strides=[patch] * 2, pads=[pads] * 4)
    dims = g("Slice", g("Shape", x), np.array([0]), np.array([2]), np.array([0]))
    x = g("Reshape", x, g("Concat", dims, np.array([-1]), axis=0))
    x = g("Transpose", x, perm=[0, 2, 1])
    if tokens:
        batch = g("Gather", g("Shape", x), np.array([0]), axis=0)
        size = g("Concat", batch, np.array([tokens, WIDTH]), axis=0)
        x = g("Concat", g("Expand", g.const(sample(1, tokens, WIDTH), "cls"), size), x, axis=1)
    if table:
        x = g("Add", x, g.const(sample(1, places + tokens, WIDTH), "table"))
    if grid is not None:
        cut = g("Slice", x, np.array([tokens]), np.array([2**31]), np.array([1]))
        x = g("Reshape", g("Relu", g("Reshape", cut, np.array([0, *grid, WIDTH]))),
              np.array([0, -1, WIDTH]))  # fmt: skip
    out = g("MatMul", g("ReduceMean", x, np.array([1]), keepdims=0), sample(WIDTH, 5))
    return g.save(tmp_path / "model.onnx", out)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"places": 16}, (16, 16)),
        ({"places": 25, "tokens": 5}, (20, 20)),
        ({"places": 16, "tokens": 0}, (16, 16)),
        ({"places": 16, "shape": ("b", 3, "side", "side")}, (16, 16)),
        ({"places": 16, "shape": ("b", 3, "4*h", "4*w")}, (16, 16)),
        ({"places": 16, "shape": (None, None, None, None)}, (16, 16)),
        ({"places": 24, "shape": ("b", 3, 16, "width")}, (16, 24)),
        ({"places": 24, "shape": ("b", 3, "height", 24)}, (16, 24)),
        ({"places": 24, "grid": (4, 6)}, (16, 24)),
        ({"places": 36, "grid": (4, 9)}, (16, 36)),
        ({"places": 64, "patch": 2, "pads": 1, "kernel": 3}, (16, 16)),
    ],
)
def test_the_size_is_told_by_the_graph(
    options: dict[str, object], size: tuple[int, int], tmp_path: Path
) -> None:
    """Length, tokens, patches and paddings; a known side, or a Reshape that is no square."""
    path = vit(tmp_path, **options)  # type: ignore[arg-type]
    prepared = prepare(path)
    image = prepared.model.graph.inputs[0]
    assert image.shape is not None
    assert tuple(image.shape)[1:] == (3, *size)
    assert not isinstance(image.shape[0], int)
    note = f"The image size {size[0]}x{size[1]} is inferred from the table 'table' [1, "
    assert any(text.startswith(note) for text in prepared.cleaned.notes)
    assert resolve_preprocess(path, QuantizeConfig()).size == size
    x = sample(2, 3, *size)
    np.testing.assert_allclose(run(prepared.model, x)[0], run(path, x)[0], rtol=1e-4, atol=1e-5)


def test_sizes_that_are_not_told(tmp_path: Path) -> None:
    """24 places are no square: one line names the option, and sizes that would do."""
    path = vit(tmp_path, 24)
    with pytest.raises(ModelError) as caught:
        prepare(path)
    text = str(caught.value)
    assert "give --size HxW, as in 16x24 or 24x16" in text
    assert "the table 'table' [1, 25, 8]" in text
    assert "\n" not in text
    prepared = prepare(path, size=(16, 24))
    assert tuple(prepared.model.graph.inputs[0].shape or ())[1:] == (3, 16, 24)
    assert any("16x24 is given by --size" in note for note in prepared.cleaned.notes)
    assert resolve_preprocess(path, QuantizeConfig(size=(16, 24))).size == (16, 24)


def test_a_size_that_contradicts_the_table(tmp_path: Path) -> None:
    path = vit(tmp_path, 16)
    with pytest.raises(
        ConfigError, match=r"^--size 32x32: .* 65 positions .* has 17; it takes 16x16"
    ):
        prepare(path, size=(32, 32))
    with pytest.raises(ConfigError, match="it takes 16x24 or 24x16"):
        prepare(vit(tmp_path, 24), size=(16, 16))


def test_a_model_of_any_size_stays_dynamic(tmp_path: Path) -> None:
    path = vit(tmp_path, 16, table=False)
    for size in (None, (16, 24)):
        prepared = prepare(path, size=size)
        dims = [
            d if isinstance(d, int) else d.value for d in prepared.model.graph.inputs[0].shape or ()
        ]
        assert dims == ["batch_size", 3, "height", "width"]
    assert resolve_preprocess(path, QuantizeConfig()).size == (224, 224)


def test_a_size_decides_branches(tmp_path: Path) -> None:
    """Without a table only they need the size: it is fixed where it is given."""
    g = SmallGraph(("batch", 3, "height", "width"))
    out = helper.make_tensor_value_info("y", 1, None)
    ways = [
        helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, [], [out])
        for op in ("Relu", "Neg")
    ]
    height = g("Gather", g("Shape", "x"), np.array(2))
    y = g("If", g("Equal", height, np.array(8)), then_branch=ways[0], else_branch=ways[1])
    g.output_shape = ("batch", 3)
    path = g.save(tmp_path / "model.onnx", g("ReduceMean", y, np.array([2, 3]), keepdims=0))
    with pytest.raises(ModelError, match="dynamic axis 'height' of the input, which --size HxW"):
        prepare(path)
    for size, kind in (((8, 8), "Relu"), ((16, 8), "Neg")):
        prepared = prepare(path, size=size)
        assert prepared.model.graph[0].op_type == kind
        assert any(f"{size[0]}x{size[1]} is given by" in n for n in prepared.cleaned.notes)


def test_a_size_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    """What no equation tells is found by a run before the work starts."""
    g = SmallGraph(("batch", 3, "height", "width"))
    cut = g("DepthToSpace", g("SpaceToDepth", "x", blocksize=5), blocksize=5)
    out = g("Squeeze", g("ReduceMean", cut, np.array([2, 3])), np.array([2, 3]))
    path = g.save(tmp_path / "model.onnx", out)
    with pytest.raises(ModelError, match=r"does not run on images of 224x224: .* --size HxW") as e:
        quantize(path, calib="noise", output=tmp_path / "out",
                 config=QuantizeConfig(quantizer="vanilla", images=2))  # fmt: skip
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
def test_the_cases() -> None:
    image = prepare(CASES / "optimum_vit.onnx").model.graph.inputs[0]
    assert tuple(image.shape or ())[1:] == (3, 32, 32)
    with pytest.raises(ModelError, match="give --size HxW, as in 56x84 or 84x56"):
        prepare(CASES / "dinov2_reg_multi_dy.onnx")
    image = prepare(CASES / "dinov2_reg_multi_dy.onnx", size=(56, 84)).model.graph.inputs[0]
    assert tuple(image.shape or ())[1:] == (3, 56, 84)
