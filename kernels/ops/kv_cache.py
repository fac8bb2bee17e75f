"""`kv_write`: new keys and values into their pages, in place. See reference/kv_cache.py."""

import torch

from kernels.ops import checks
from kernels.ops.define import define
from kernels.reference import kv_cache as reference
from kernels.reference.kv_cache import read_cache

__all__ = ["cached_shape", "kv_write", "read_cache"]


def cached_shape(
    op: str, name: str, cache: torch.Tensor, scales: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """[pages, page_tokens, KH, D] of a cache, whatever its numbers are kept in."""
    checks.dims(f"{op}: {name}", cache, "[pages, page_tokens, KH, D]")
    pages, page_tokens, kv_heads, width = cache.shape
    if cache.dtype in checks.FLOATS:
        checks.need(scales is None, f"{op}: {name} of {cache.dtype} has no scales; pass None.")
        return pages, page_tokens, kv_heads, width
    checks.dtype(f"{op}: {name}", cache, (*checks.FLOATS, torch.int8, torch.uint8))
    if scales is None:
        raise ValueError(f"{op}: {name} of {cache.dtype} needs its scales.")
    if cache.dtype == torch.int8:
        checks.shape(f"{op}: scales of {name}", scales, pages, page_tokens, kv_heads)
        checks.dtype(f"{op}: scales of {name}", scales, (torch.float32,))
        return pages, page_tokens, kv_heads, width
    checks.dims(f"{op}: scales of {name}", scales, "[pages, page_tokens, KH, D / 32]")
    groups = scales.shape[3]
    checks.need(
        groups > 0 and reference.packed_bits(width, groups) is not None,
        f"{op}: heads of a {name} of uint8 with {groups} scales should have {16 * groups} bytes (4 "
        f"bits a number) or {20 * groups} (5 bits), not {width}.",
    )
    checks.shape(f"{op}: scales of {name}", scales, pages, page_tokens, kv_heads, groups)
    checks.dtype(f"{op}: scales of {name}", scales, (torch.float16,))
    return pages, page_tokens, kv_heads, 32 * groups


def _write(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    wanted = cached_shape("kv_write", "key_cache", key_cache, key_scales)
    checks.need(
        cached_shape("kv_write", "value_cache", value_cache, value_scales) == wanted,
        "kv_write: both caches should have the same shape.",
    )
    checks.dtype("kv_write: value_cache", value_cache, (key_cache.dtype,))
    checks.dims("kv_write: slots", slots, "[T]")
    checks.dtype("kv_write: slots", slots, (torch.int64,))
    for name, new in (("keys", keys), ("values", values)):
        checks.shape(f"kv_write: {name}", new, slots.shape[0], *wanted[2:])
        checks.dtype(f"kv_write: {name}", new, checks.FLOATS)


kv_write = define(
    reference.kv_write,
    _write,
    "kv_cache",
    mutates=("key_cache", "value_cache", "key_scales", "value_scales"),
)
