"""The kernel of `kv_write`: new keys and values into the pages of a cache, in place.

The forms and their rounding are those of reference/kv_cache.py, bit for bit. Called by
kernels/ops/kv_cache.py on a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.reference.kv_cache import packed_bits
from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import target_of
from kernels.triton.plan import TYPES, Plan, flat_slots, packed, power, run, shipped
from kernels.triton.targets import Target

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: float32 numbers of this size are whole


@triton.jit
def _nearest(x):
    """x float32, below 2 ** 22 in magnitude, to the nearest whole number, of two the even one."""
    return (x + ROUND) - ROUND


@triton.jit
def _store_float(new, cache, at, to, ok, D: tl.constexpr, DP: tl.constexpr):
    """Row by row from new + at to cache + to; DP is D, padded to a power of two."""
    column = tl.arange(0, DP)[None, :]
    seen = ok[:, None] & (column < D)
    x = tl.load(new + at[:, None] + column, mask=seen, other=0.0)
    kept: tl.constexpr = cache.dtype.element_ty
    if new.dtype.element_ty != kept:
        # In two steps: one half form does not turn into the other directly.
        x = x.to(tl.float32).to(kept)
    tl.store(cache + to[:, None] + column, x, mask=seen)


@triton.jit
def _store_int8(new, cache, scales, at, to, scale_to, ok, D: tl.constexpr, DP: tl.constexpr):
    column = tl.arange(0, DP)[None, :]
    seen = ok[:, None] & (column < D)
    x = tl.load(new + at[:, None] + column, mask=seen, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0)
    divisor = tl.where(scale > 0, scale, float("inf"))
    q = _nearest(tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)))
    q = tl.minimum(tl.maximum(q, -127.0), 127.0)
    tl.store(cache + to[:, None] + column, q.to(tl.int8), mask=seen)
    tl.store(scales + scale_to, scale, mask=ok)


@triton.jit
def _store_packed(
    new, cache, scales, at, to, scale_to, ok, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr
):
    """Groups of 32 are read as two runs of 16, whose numbers share bytes."""
    group = tl.arange(0, DP // 32)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    seen = ok[:, None, None] & (group < D // 32)
    first_at = at[:, None, None] + group * 32 + column
    first = tl.load(new + first_at, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(new + first_at + 16, mask=seen, other=0.0).to(tl.float32)
    scale = _scale(first, second, BITS)
    wide = scale.to(tl.float32)
    divisor = tl.where(wide == 0, float("inf"), wide)[:, :, None]
    first = _level(first, divisor, BITS)
    second = _level(second, divisor, BITS)
    packed = ((first & 15) | ((second & 15) << 4)).to(tl.uint8)
    tl.store(cache + to[:, None, None] + group * 16 + column, packed, mask=seen)
    if BITS == 5:
        pair = tl.arange(0, 2)[None, None, :]
        fifths = cache + to[:, None, None] + D // 2 + group * 4 + pair
        tl.store(fifths, _fifths(first), mask=seen)
        tl.store(fifths + 2, _fifths(second), mask=seen)
    place = tl.arange(0, DP // 32)[None, :]
    tl.store(scales + scale_to[:, None] + place, scale, mask=ok[:, None] & (place < D // 32))


@triton.jit
def _scale(first, second, BITS: tl.constexpr):
    """float16 [.., groups]: what gives the number furthest from zero the outermost level."""
    most = tl.max(tl.maximum(first, second), axis=2)
    least = tl.min(tl.minimum(first, second), axis=2)
    zero: tl.constexpr = 2 ** (BITS - 1)
    return (tl.where(most > -least, most, least) * (-1.0 / zero)).to(tl.float16)


@triton.jit
def _level(x, divisor, BITS: tl.constexpr):
    """int32: the level nearest to x, counted from the lowest."""
    zero: tl.constexpr = 2 ** (BITS - 1)
    q = _nearest(tl.div_rn(x, tl.broadcast_to(divisor, x.shape)))
    return tl.minimum(tl.maximum(q, -1.0 * zero), zero - 1.0).to(tl.int32) + zero


@triton.jit
def _fifths(levels):
    """levels [rows, groups, 16] -> uint8 [rows, groups, 2]: their fifth bits, the first lowest."""
    bits = tl.reshape(levels >> 4, (levels.shape[0], levels.shape[1], 2, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, None, :], axis=3).to(tl.uint8)


@triton.jit
def _store(
    new, cache, scales, at, to, scale_to, ok, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr
):
    kept: tl.constexpr = cache.dtype.element_ty
    if kept == tl.int8:
        _store_int8(new, cache, scales, at, to, scale_to, ok, D, DP)
    elif kept == tl.uint8:
        _store_packed(new, cache, scales, at, to, scale_to, ok, D, DP, BITS)
    else:
        _store_float(new, cache, at, to, ok, D, DP)


@triton.jit(do_not_specialize=["rows"])
def kv_write_kernel(
    keys,
    values,
    slots,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    rows,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    key_cache_stride_s,
    key_cache_stride_h,
    value_cache_stride_s,
    value_cache_stride_h,
    key_scale_stride_s,
    key_scale_stride_h,
    value_scale_stride_s,
    value_scale_stride_h,
    KH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BR: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """A program stores BR of the `rows` = T * KH heads; strides of t, h and s (slot) in numbers.
    Bits are those of a uint8 cache, 0 for others."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    token = (row // KH).to(tl.int64)
    head = (row % KH).to(tl.int64)
    slot = tl.load(slots + token, mask=row < rows, other=-1)
    ok = slot >= 0
    _store(
        keys,
        key_cache,
        key_scales,
        token * key_stride_t + head * key_stride_h,
        slot * key_cache_stride_s + head * key_cache_stride_h,
        slot * key_scale_stride_s + head * key_scale_stride_h,
        ok,
        D,
        DP,
        KEY_BITS,
    )
    _store(
        values,
        value_cache,
        value_scales,
        token * value_stride_t + head * value_stride_h,
        slot * value_cache_stride_s + head * value_cache_stride_h,
        slot * value_scale_stride_s + head * value_scale_stride_h,
        ok,
        D,
        DP,
        VALUE_BITS,
    )


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """See reference/kv_cache.py. ValueError for a cache with gaps between slots or inside heads."""
    target = target_of("kv_write", keys)
    caches = (key_cache, value_cache, key_scales, value_scales)
    run(_plan(target, keys, values, slots, *caches))


def _plan(
    target: Target,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> Plan:
    tokens, heads, width = keys.shape
    config = choose("kv_write", target, tokens)
    args: dict[str, Any] = {"slots": slots.contiguous(), "rows": tokens * heads}
    args |= _side("key", packed(keys), key_cache, key_scales)
    args |= _side("value", packed(values), value_cache, value_scales)
    padded = max(power(width), 32)
    rows = max(1, config.constants["BLOCK"] // padded)
    args |= {"KH": heads, "D": width, "DP": padded, "BR": rows}
    args |= {"KEY_BITS": cache_bits(key_cache, key_scales)}
    args |= {"VALUE_BITS": cache_bits(value_cache, value_scales)}
    # The bits are those of the reference: nothing is fused.
    grid = (triton.cdiv(tokens * heads, rows) if width else 0,)
    return Plan(kv_write_kernel, grid, args, config, fp_fusion=False)


def _side(
    name: str, new: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None
) -> dict[str, Any]:
    """The arguments for the keys, or those for the values."""
    flat = flat_slots("kv_write", f"{name}_cache", cache, 1)
    args: dict[str, Any] = {f"{name}s": new, f"{name}_cache": flat, f"{name}_scales": None}
    steps = [0, 0]
    if scales is not None:
        # Those of a uint8 cache are [.., D / 32]; the other ones have no dimension within a head.
        inner = flat_slots("kv_write", f"{name}_scales", scales, scales.dim() - 3)
        args[f"{name}_scales"], steps = inner, [inner.stride(0), inner.stride(1)]
    args |= {f"{name}_stride_t": new.stride(0), f"{name}_stride_h": new.stride(1)}
    args |= {f"{name}_cache_stride_s": flat.stride(0), f"{name}_cache_stride_h": flat.stride(1)}
    args |= {f"{name}_scale_stride_s": steps[0], f"{name}_scale_stride_h": steps[1]}
    return args


def cache_bits(cache: torch.Tensor, scales: torch.Tensor | None) -> int:
    """Of a number in a uint8 cache: 4 or 5. 0 for every other cache."""
    if cache.dtype != torch.uint8 or scales is None:
        return 0
    return packed_bits(cache.shape[-1], scales.shape[-1]) or 0


def meta_cache(
    kind: str,
    dtype: torch.dtype,
    pages: int,
    page_tokens: int,
    heads: int,
    width: int,
    bits: int = 4,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cache without memory, for cases: (numbers, scales). kind: "float" (of dtype), "int8" or
    "int4", whose numbers have `bits`: 5 for keys, 4 for values."""
    shape = (pages, page_tokens, heads)
    if kind == "float":
        return torch.empty(*shape, width, dtype=dtype, device="meta"), None
    if kind == "int8":
        numbers = torch.empty(*shape, width, dtype=torch.int8, device="meta")
        return numbers, torch.empty(*shape, device="meta")
    numbers = torch.empty(*shape, width * bits // 8, dtype=torch.uint8, device="meta")
    return numbers, torch.empty(*shape, width // 32, dtype=torch.float16, device="meta")


def cases(target: Target) -> list[Case | Refused]:
    """Each form of cache, for 256 tokens of 8 heads."""
    made: list[Case | Refused] = []
    for kind, dtype, width in (
        ("float", torch.bfloat16, 128),
        ("float", torch.float16, 64),
        ("int8", torch.bfloat16, 128),
        ("int4", torch.float16, 128),
    ):
        new = torch.empty(256, 8, width, dtype=dtype, device="meta")
        slots = torch.empty(256, dtype=torch.int64, device="meta")
        keys, key_scales = meta_cache(kind, dtype, 16, 16, 8, width, bits=5)
        values, value_scales = meta_cache(kind, dtype, 16, 16, 8, width)
        plan = _plan(target, new, new, slots, keys, values, key_scales, value_scales)
        made.append(shipped(f"kv_write/{kind}-{TYPES[dtype]}-{width}", plan, 10 * new.numel()))
    return made
