"""Shapes for which torch's float32 products give each row the same bits in any company.

A matrix product on the CPU picks another order of additions for one to three rows, and another
split of long reductions for other lengths. Results then depend on who else is in the batch, and a
greedy answer could change when a machine is busy. Measured (torch 2.13 with MKL, 1 to 8 threads,
tests/kernels/test_stable.py): rows in multiples of four agree with each other, and so do
reductions of up to 192 terms with those of any multiple of 512.
"""

ROWS = 4
# From here on every count of rows is served by the same code.
ANY_ROWS = 12
SHORT_WIDTH = 192
LONG_WIDTH = 512


def padding_rows(rows: int) -> int:
    """How many rows to add to `rows` to reach a multiple of four."""
    return -rows % ROWS


def batch_padding_rows(rows: int) -> int:
    """The same for the rows of a plain matrix product, where large counts need none."""
    return padding_rows(rows) if rows < ANY_ROWS else 0


def stable_width(context: int) -> int:
    """The number of columns to attend over for `context` tokens: a multiple of 16 up to 192,
    beyond that a multiple of 512."""
    step = 16 if context <= SHORT_WIDTH else LONG_WIDTH
    return -(-context // step) * step
