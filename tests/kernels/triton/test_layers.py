"""Ops 1 to 8 against their oracles: linears, conversions, norms, rotations, gates.

The cases are those of the ops (tests/kernels/ops), put through the launchers as they would run on
a GPU with all units, on Turing, and on AMD's.
"""

from typing import Any

import pytest
import torch

from kernels.formats import FORMATS
from kernels.triton import gguf_split, launch, linear_int8, linear_w4, norm
from tests.kernels.ops.cases import ROWS, Case, Source, check, four, stored
from tests.kernels.ops.table import CASES
from tests.kernels.triton.conformance import DEVICE, watched
from tests.kernels.triton.ways import launcher, module

# Whose kernels are tested here.
MODULES = (
    "linear_w4",
    "linear_w8",
    "linear_int8",
    "linear_fp8",
    "gguf_split",
    "norm",
    "rope",
    "gated",
)
OURS = [case for case in CASES if module(case) in MODULES]
# On Turing the linears go other ways; elsewhere only the tiles differ.
WAYS = [
    pytest.param(
        case,
        name,
        marks=[pytest.mark.slow] if name == "gfx942" else [],
        id=f"{case.name}-{name}",
    )
    for case in OURS
    for name in ("sm_90", "sm_75", "gfx942")
    if name != "sm_75" or module(case).startswith("linear")
]


@pytest.mark.parametrize("case, name", WAYS)
def test_is_what_the_oracle_says(case: Case, name: str):
    """Every dtype, for 0, 1 and 17 rows, without a wrong access on the way; or the refusal."""
    with watched(name):
        if launch.interpreting() and refused(case, name):
            with pytest.raises(ValueError, match=f"{case.op_name} does not run on {name}: "):
                check(case, 17, torch.float32, op=launcher(case), device=DEVICE)
            return
        for dtype in case.dtypes:
            for rows in ROWS:
                check(case, rows, dtype, op=launcher(case), device=DEVICE)


def refused(case: Case, name: str) -> bool:
    if case.op_name in ("int8_matmul", "int8_linear"):
        return name == "sm_75"
    return case.op_name == "fp8_linear" and name != "sm_90"


@pytest.mark.parametrize("form", list(FORMATS))
def test_blocks_are_decoded_to_the_bits_of_the_reference(form: str):
    """Which are ggml's: tests/kernels/test_dequantize.py."""
    from kernels.reference.gguf_split import dequantize_blocks

    if form[0] == "Q":
        blocks = stored(form, 37)
    else:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[form]
        blocks = Source(0, dtype).normal(37).view(torch.uint8)
    for start in (0, FORMATS[form].block_bytes):  # the second one is not where a word begins
        for dtype in (torch.float32, torch.bfloat16):
            given = blocks[start:]
            made = gguf_split.dequantize_blocks(given.to(DEVICE), form, dtype)
            assert torch.equal(made.cpu(), dequantize_blocks(given, form, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_dequantised_to_the_bits_of_the_reference(symmetric: bool):
    from kernels.reference.linear_w4 import dequantize_w4

    weight: Any = four(Source(1, torch.float32), 19, 256, 64, symmetric)
    moved: Any = [each if each is None else each.to(DEVICE) for each in weight]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        made = linear_w4.dequantize_w4(moved[0], moved[1], moved[2], dtype)
        assert torch.equal(made.cpu(), dequantize_w4(weight[0], weight[1], weight[2], dtype))


@pytest.mark.parametrize("columns", [1, 33, 2048, 2049])
def test_rows_are_quantised_to_the_bits_of_the_reference(columns: int):
    """Halves between two levels, a row of zeros, one almost so, and one with its largest last."""
    from kernels.reference.linear_int8 import quantize_rowwise_int8

    x = Source(2, torch.float32).normal(5, columns)
    x[0], x[1, -1], x[2] = 0, 99, x[2] * 1e-43
    x[3] = (torch.arange(columns) % 250 - 125 + 0.5) / 127
    x[3, 0] = 1
    for each in (x, x.bfloat16()):
        q, scales = linear_int8.quantize_rowwise_int8(each.to(DEVICE))
        wanted, wanted_scales = quantize_rowwise_int8(each)
        assert torch.equal(q.cpu(), wanted) and torch.equal(scales.cpu(), wanted_scales)


def test_a_residual_is_the_norm_of_the_rounded_sum():
    """The same bits in one kernel or in two."""
    source = Source(3, torch.bfloat16)
    x, residual, weight = source.normal(3, 40), source.normal(3, 40), source.normal(40)
    x, residual, weight = (each.to(DEVICE) for each in (x, residual, weight))
    y, added = norm.rms_norm_residual(x, residual, weight, 1e-5)
    assert torch.equal(added, x + residual)
    assert torch.equal(y, norm.rms_norm(added, weight, 1e-5))


@pytest.mark.parametrize("rows", [2, 16, 20, 64, 70])
def test_every_tile_of_the_table_gives_the_same_product(rows: int):
    """On one-hot rows a product is a row of the dequantised weight, without rounding of a sum."""
    weight: Any = four(Source(4, torch.float16), 40, 128, 32, True)
    moved: Any = [each if each is None else each.to(DEVICE) for each in weight]
    x = torch.eye(128, dtype=torch.float16)[torch.arange(rows) * 3 % 128].to(DEVICE)
    dense = linear_w4.dequantize_w4(moved[0], moved[1], moved[2], torch.float16)
    with watched("sm_90"):
        made = linear_w4.w4_linear(x, *moved)
    assert torch.equal(made, dense.T[torch.arange(rows) * 3 % 128])
