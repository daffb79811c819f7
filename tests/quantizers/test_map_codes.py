"""What codes fqvit gives attention maps, by their bits."""

import pytest
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer

SHARES = Uniform(), (RowMaximum(), RowSums())
POWERS = Log2(), (RowSums(),)
PLAIN = Uniform(), ()


@pytest.mark.parametrize(
    ("attention", "lis", "expected"),
    [
        (2, None, POWERS), (4, None, POWERS), (6, None, POWERS), (7, None, SHARES),
        (8, None, SHARES), (16, None, SHARES), (8, True, POWERS), (4, True, POWERS),
        (8, False, PLAIN), (4, False, PLAIN),
    ],
)  # fmt: skip
def test_codes_of_maps(attention: int, lis: bool | None, expected: object) -> None:
    model = transformer(Choices())
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="fqvit", bits=f"8/8/{attention}", lis=lis, threads=1)
    quantizer = make_quantizer(Plan(model, blocks, find_sites(model, blocks), config))
    (rule,) = (
        r for name, r in quantizer.rules.items() if quantizer.plan.sites[name].role == "softmax"
    )
    assert (rule.code, rule.around) == expected
    assert rule.bits == attention
