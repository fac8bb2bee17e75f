"""The block formats that weights may be stored in: names and sizes, no arithmetic.

Loaders size-check files with this table before they allocate anything; each implementation
folder holds the arithmetic (`reference/dequantize.py`). Imports nothing.
"""

from typing import NamedTuple


class BlockFormat(NamedTuple):
    """One storage format: `block_values` consecutive values take `block_bytes` bytes."""

    name: str
    block_values: int
    block_bytes: int


FORMATS: dict[str, BlockFormat] = {
    entry.name: entry
    for entry in (
        BlockFormat("F32", 1, 4),
        BlockFormat("F16", 1, 2),
        BlockFormat("BF16", 1, 2),
        BlockFormat("Q4_0", 32, 18),
        BlockFormat("Q4_1", 32, 20),
        BlockFormat("Q5_0", 32, 22),
        BlockFormat("Q5_1", 32, 24),
        BlockFormat("Q8_0", 32, 34),
        BlockFormat("Q4_K", 256, 144),
        BlockFormat("Q5_K", 256, 176),
        BlockFormat("Q6_K", 256, 210),
    )
}
