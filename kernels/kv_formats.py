"""How a KV cache stores one token's keys, or values, of one head. No arithmetic and no torch.

A cache is [layers, 2, pages, page_tokens, kv_heads, elements]: elements of a format's type, so
that a copy of a page, or of some of its tokens, needs to know nothing of what they mean.
`kernels/cpu/src/table.h` says the same in C++; `serve/kv` takes sizes from here.
"""

from typing import NamedTuple

GROUP = 32  # values that share a scale in int4


class KVFormat(NamedTuple):
    """stored: torch's name for the type of an element, of `element_bytes`. A head of head_dim
    values takes value_bits for each, then head_bytes, or group_bytes for each GROUP of values."""

    name: str
    stored: str
    element_bytes: int
    value_bits: int
    head_bytes: int = 0
    group_bytes: int = 0

    def elements(self, head_dim: int) -> int:
        """Of one head of one token. ValueError where head_dim is not a whole number of groups."""
        if self.group_bytes and head_dim % GROUP:
            raise ValueError(
                f"a KV cache in {self.name} takes heads of a multiple of {GROUP} values, not of "
                f"{head_dim}"
            )
        size = head_dim * self.value_bits // 8 + self.head_bytes
        size += head_dim // GROUP * self.group_bytes
        return size // self.element_bytes


# int8: a byte for each value, absmax / 127 of the head as float32. int4: two values a byte (byte j
# of 16 holds value j low and j + 16 high); behind them four bytes of each group: with keys, which
# have five bits, their fifth bits (value j in bit j); with values, two halves, the scale of the
# group and that of the keys' one. So keys are read with the values beside them. The CPU kernels
# store int4 of a head turned by Hadamard's matrix, which levels its values.
FORMATS = {
    each.name: each
    for each in (
        KVFormat("float32", "float32", 4, 32),
        KVFormat("float16", "float16", 2, 16),
        KVFormat("bfloat16", "bfloat16", 2, 16),
        KVFormat("int8", "uint8", 1, 8, head_bytes=4),
        KVFormat("int4", "uint8", 1, 4, group_bytes=4),
    )
}
