"""Ops 1 to 8 against their oracles: linears, conversions, norms, rotations, gates.

The cases are those of the ops (tests/kernels/ops), put through the launchers, as they would run on
a GPU with matrix units, on Turing, and on AMD's; and larger ones, that take every row of the table
of tile sizes.
"""

import pytest
import torch

from kernels.triton import launch
from tests.kernels.ops.cases import ROWS, Case, check
from tests.kernels.ops.table import CASES
from tests.kernels.triton.ways import launcher, module

# Whose kernels are tested here.
MODULES = [
    "linear_w4",
    "linear_w8",
    "linear_int8",
    "linear_fp8",
    "gguf_split",
    "norm",
    "rope",
    "gated",
]


OURS = [case for case in CASES if module(case) in MODULES]
DEVICE = "cpu" if launch.interpreting() else "cuda"


@pytest.mark.parametrize("name", ["sm_90", "sm_75", "gfx942"])
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_is_what_the_oracle_says(case: Case, name: str):
    """Every dtype, for 0, 1 and 17 rows; or the refusal names the op and the target."""
    with launch.interpreted_as(name) as chosen:
        no_int8 = case.op_name in ("int8_matmul", "int8_linear") and not chosen.dot
        if no_int8 or (case.op_name == "fp8_linear" and not chosen.fp8):
            with pytest.raises(ValueError, match=f"{case.op_name} does not run on {name}: "):
                check(case, 17, torch.float32, op=launcher(case), device=DEVICE)
            return
        for dtype in case.dtypes:
            for rows in ROWS:
                check(case, rows, dtype, op=launcher(case), device=DEVICE)
