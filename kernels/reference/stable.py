"""What makes torch's float32 results of a row the same, bit for bit, in any company.

Left alone, a matrix product on the CPU picks its order of additions by the number of rows, of
threads and by the kind of CPU. Results then depend on who else is in the batch, and a greedy answer
could change when a machine is busy. MKL's strict reproducible mode (kernels/__init__.py) fixes the
order for any rows and threads; what is left is the length of a reduction, fixed by `stable_width`.
tests/kernels/test_stable.py holds both; `rows_agree` tells whether this machine keeps to it.
"""

import torch
import torch.nn.functional as F

# Attention reads the context in blocks of 512. The terms of a short block are added in order, those
# of a longer one in parts, and how long these are depends on its length. Where that begins depends
# on the kind of CPU: 192 was the least seen.
BLOCK_WIDTH = 512
IN_ORDER_WIDTH = 192
STEP_WIDTH = 16


def stable_width(context: int) -> int:
    """The number of columns to attend over for `context` tokens: a multiple of 16 of which at most
    192 are in the last, unfinished block of 512; else the block is filled."""
    width = -(-context // STEP_WIDTH) * STEP_WIDTH
    if width % BLOCK_WIDTH > IN_ORDER_WIDTH:
        return -(-width // BLOCK_WIDTH) * BLOCK_WIDTH
    return width


def rows_agree() -> bool:
    """Whether a row of a product has the same bits alone and among others, in this process."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(576, 1536, generator=chance)
    rows = torch.randn(64, 1536, generator=chance)
    whole = F.linear(rows, weight)
    return all(torch.equal(F.linear(rows[:n], weight), whole[:n]) for n in (1, 4, 12, 57))
