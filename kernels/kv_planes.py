"""How the GPU kernels lay out a KV cache: numbers in one tensor, scales in another.

The same formats as in kv_formats.py, where a head's scales stand behind its numbers: here numbers
stay on boundaries that a GPU reads widely. What they mean is in reference/kv_cache.py. No torch.
"""

from typing import NamedTuple

GROUP = 32  # values that share a scale in int4


class KVPlanes(NamedTuple):
    """Of one head of one token: its numbers, of torch's type `numbers`, and a shape of scales, of
    type `scales` ("" where there are none)."""

    numbers: str
    number_count: int
    scales: str = ""
    scale_shape: tuple[int, ...] = ()


FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")


def planes(kv_format: str, head_dim: int) -> KVPlanes:
    """ValueError for a format that is not known, or that has no such heads."""
    if kv_format in ("float32", "float16", "bfloat16"):
        return KVPlanes(kv_format, head_dim)
    if kv_format == "int8":
        return KVPlanes("int8", head_dim, "float32")
    if kv_format == "int4":
        if head_dim % GROUP:
            raise ValueError(
                f"a KV cache in int4 takes heads of a multiple of {GROUP} values, not of {head_dim}"
            )
        # Keys fill their bytes; behind the nibbles of values are the scales of both.
        return KVPlanes("uint8", head_dim // 2 + head_dim // 8)
    raise ValueError(
        f"A KV cache in {kv_format} is not supported; use one of {', '.join(FORMATS)}."
    )
