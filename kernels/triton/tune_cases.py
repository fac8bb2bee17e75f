"""What `tune.py` measures: for each key of configs*.json and number of rows, shapes of real models
and candidates for their tiles.

Shapes are those of Llama-3-8B and of SmolLM2-135M; the first of a tuning is measured with all
candidates. Imports no GPU.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from kernels.triton import (
    attention_paged,
    attention_prefill,
    linear_fp8,
    linear_int8,
    linear_w4,
    linear_w8,
    moe,
)
from kernels.triton.configs import Config
from kernels.triton.kv_cache import meta_cache
from kernels.triton.linear import by_hand
from kernels.triton.plan import Plan
from kernels.triton.targets import Target

HALF, FP8 = torch.bfloat16, torch.float8_e4m3fn
GROUP = 32
LARGE = ((4096, 4096), (14336, 4096), (4096, 14336))  # columns (N) and terms (K) of a product
FEW = (*LARGE, (128256, 4096), (1536, 576))
HEADS, KV_HEADS, WIDTH, PAGE_TOKENS = 32, 8, 128, 16

SHARED_BYTES = 227 << 10  # of one program, on the cards that have most
_FOUR: dict[str, tuple[int, ...]] = {"warps": (4,), "stages": (3, 4)}
_EIGHT: dict[str, tuple[int, ...]] = {"warps": (4, 8), "stages": (3, 4)}

Build = Callable[[torch.device, Target], Callable[[], tuple[Plan, ...]]]


class Shape(NamedTuple):
    """build: makes tensors, and what plans the launches for them with the tiles of the moment.
    read_bytes: of what a launch reads. other: what is done where no tiles are given."""

    name: str
    build: Build
    read_bytes: int
    other: Callable[[torch.device], Callable[[], object]] | None = None


class Tuning(NamedTuple):
    """A key of the table, and the largest number of rows that its entry will be for."""

    key: str
    rows: int
    shapes: tuple[Shape, ...]
    candidates: tuple[Config, ...]


def whole(
    low: int, high: int, *shape: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.randint(low, high, shape, device=device).to(dtype)


def _w4(m: int, n: int, k: int) -> Shape:
    def tensors(device: torch.device) -> tuple[torch.Tensor, ...]:
        x = torch.randn(m, k, device=device, dtype=HALF)
        levels = whole(0, 256, n, k // 2, dtype=torch.uint8, device=device)
        return x, levels, torch.rand(n, k // GROUP, device=device).half() * 0.01

    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        x, levels, scales = tensors(device)
        out = x.new_empty(m, n)
        return lambda: linear_w4.plan_linear(target, x, levels, scales, None, None, out)

    def other(device: torch.device) -> Callable[[], object]:
        x, levels, scales = tensors(device)
        return lambda: by_hand(x, linear_w4.dequantize_w4(levels, scales, None, HALF), None)

    return Shape(f"{n}x{k}", build, n * k * 9 // 16, other)


def _w8(m: int, n: int, k: int) -> Shape:
    def tensors(device: torch.device) -> tuple[torch.Tensor, ...]:
        x = torch.randn(m, k, device=device, dtype=HALF)
        levels = whole(-127, 128, n, k, dtype=torch.int8, device=device)
        return x, levels, torch.rand(n, k // GROUP, device=device).half() * 0.01

    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        x, levels, scales = tensors(device)
        out = x.new_empty(m, n)
        return lambda: linear_w8.plan_linear(target, x, levels, scales, None, out)

    def other(device: torch.device) -> Callable[[], object]:
        x, levels, scales = tensors(device)
        return lambda: by_hand(x, linear_w8.dequantize_w8(levels, scales, HALF), None)

    return Shape(f"{n}x{k}", build, n * k * 17 // 16, other)


def _int8(m: int, n: int, k: int) -> Shape:
    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        q = whole(-127, 128, m, k, dtype=torch.int8, device=device)
        weight = whole(-127, 128, n, k, dtype=torch.int8, device=device)
        row, column = torch.rand(m, device=device), torch.rand(n, device=device)
        out = torch.empty(m, n, device=device, dtype=HALF)
        scales = row, column, None
        return lambda: (linear_int8.plan_product("int8_linear", target, q, weight, *scales, out),)

    return Shape(f"{m}: {n}x{k}", build, n * k)


def _fp8(m: int, n: int, k: int) -> Shape:
    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        q = torch.randn(m, k, device=device, dtype=HALF).to(FP8)
        weight = torch.randn(n, k, device=device, dtype=HALF).to(FP8)
        row, column = torch.rand(m, device=device), torch.rand(n, device=device)
        out = torch.empty(m, n, device=device, dtype=HALF)
        return lambda: (linear_fp8.plan_product(target, q, weight, row, column, out),)

    return Shape(f"{m}: {n}x{k}", build, n * k)


def _grouped(routed: int, experts: int, n: int, k: int) -> Shape:
    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        x = torch.randn(routed, k, device=device, dtype=HALF)
        weight = torch.randn(experts, n, k, device=device, dtype=HALF)
        out = x.new_zeros(routed, n)
        if device.type != "meta":
            ids = (torch.arange(routed, device=device) * experts // routed)[:, None]
        else:
            ids = torch.empty(routed, 1, dtype=torch.int64, device=device)

        def plans() -> tuple[Plan, ...]:
            config = moe._config(target, x, weight)
            if device.type == "meta":
                aligned = moe._align_plans(target, ids, experts, config.constants["BM"])[1]
            else:
                aligned = moe.moe_align(ids, experts, config.constants["BM"])
            return (moe._grouped_plan(config, x, weight, aligned, out),)

        return plans

    return Shape(f"{routed}: {experts}x{n}x{k}", build, 2 * min(routed, experts) * n * k)


def _paged(kind: str, streams: int, context: int, parts: int) -> Shape:
    sizes = {"float": 4 * WIDTH, "int8": 2 * WIDTH + 8, "int4": WIDTH * 5 // 4}
    pages = streams * context // PAGE_TOKENS

    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        q = torch.randn(streams, HEADS, WIDTH, device=device, dtype=HALF)
        sides = []
        for bits in (5, 4):
            numbers, scales = meta_cache(kind, HALF, pages, PAGE_TOKENS, KV_HEADS, WIDTH, bits)
            if kind == "float":
                cache = torch.randn_like(numbers, device=device)
            else:
                cache = whole(0, 127, *numbers.shape, dtype=numbers.dtype, device=device)
            made = None if scales is None else torch.rand_like(scales, device=device) * 0.01
            sides.append((cache, made))
        (keys, key_scales), (values, value_scales) = sides
        tables = torch.randperm(pages, device=device).view(streams, -1).int()
        contexts = torch.full((streams,), context, dtype=torch.int32, device=device)
        outs = torch.empty(parts, *q.shape, device=device)
        lse = torch.empty(parts, *q.shape[:2], device=device)
        every = keys, values, key_scales, value_scales, tables, contexts
        return lambda: (attention_paged._plan(target, q, *every, outs, lse, 0, None),)

    return Shape(
        f"{kind} S={streams} context={context} parts={parts}",
        build,
        streams * context * KV_HEADS * sizes[kind],
    )


def _prompt(tokens: int) -> Shape:
    def build(device: torch.device, target: Target) -> Callable[[], tuple[Plan, ...]]:
        q = torch.randn(tokens, HEADS, WIDTH, dtype=HALF, device=device)
        k, v = (torch.randn(tokens, KV_HEADS, WIDTH, dtype=HALF, device=device) for _ in range(2))
        starts = torch.zeros(2, dtype=torch.int32, device=device)
        starts[1:] = tokens
        out = torch.zeros_like(q)
        return lambda: (attention_prefill._plan(target, q, k, v, starts, out),)

    return Shape(f"T={tokens}", build, 2 * tokens * WIDTH * (HEADS + 2 * KV_HEADS))


def _tiles(programs: tuple[int, ...] = (0,), **choices: tuple[int, ...]) -> Iterator[Config]:
    """Every combination; `warps` and `stages` among the choices."""
    for each in product(programs, *choices.values()):
        values = dict(zip(choices, each[1:], strict=True))
        warps, stages = values.pop("warps"), values.pop("stages")
        yield Config(0, values, warps, stages, each[0])


def _fits(config: Config, weight_bits: int, x_bits: int) -> bool:
    """Whether stages of both tiles may be in shared memory, and the sums in registers; and whether
    a warp has 16 columns of a weight, or more."""
    bm, bn, bk = (config.constants[name] for name in ("BM", "BN", "BK"))
    stage_bytes = (bn * bk * weight_bits + bm * bk * x_bits) // 8
    return stage_bytes * (config.num_stages - 1) <= SHARED_BYTES and 4 <= _sums(config) <= 128


def _sums(config: Config) -> int:
    """Registers of a thread that hold sums."""
    return config.constants["BM"] * config.constants["BN"] // (32 * config.num_warps)


def _weights(op: str, bits: int) -> Iterator[Tuning]:
    """Products with weights that are unpacked on the way; a tile of more rows unpacks each weight
    less often."""
    shape = _w4 if bits == 4 else _w8
    one = [
        each
        for each in _tiles(BN=(4, 8, 16, 32), BK=(512, 1024, 2048), warps=(1, 2, 4, 8), stages=(1,))
        if 8 <= each.constants["BN"] * each.constants["BK"] * bits // (256 * each.num_warps) <= 64
    ]
    one += _tiles((264, 528), BM=(16,), BN=(64,), BK=(128, 256), warps=(4,), stages=(3,))
    yield Tuning(op, 1, tuple(shape(1, *each) for each in FEW), tuple(one))
    for rows, bm, bk, stages, programs in (
        (16, (16,), (128, 256), (3, 4, 5), (132, 264, 528)),
        (32, (32,), (128, 256), (3, 4), (0, 132, 264, 528)),
        (64, (64,), (64, 128), (3, 4), (0, 132, 264)),
        (128, (64, 128), (64, 128), (3, 4), (0, 264)),
        (256, (128, 256), (64, 128), (3, 4), (0, 264)),
    ):
        sizes: dict[str, tuple[int, ...]] = dict(BM=bm, BN=(64, 128), BK=bk)
        found = _tiles(programs, **sizes, warps=(4, 8), stages=stages)
        tiles = [each for each in found if each.constants["BN"] == 16 * each.num_warps]
        shapes = FEW if rows <= 64 else LARGE
        yield Tuning(
            op,
            rows,
            tuple(shape(rows, *each) for each in shapes),
            tuple(each for each in tiles if _fits(each, bits, 16)),
        )


def _narrow(op: str) -> Iterator[Tuning]:
    """Products of 8 bits with 8."""
    fp8 = op == "fp8_linear"
    shape = _fp8 if fp8 else _int8
    few = _tiles(BM=(16, 64), BN=(32, 64), BK=(128, 256, 512), warps=(4,), stages=(3, 4))
    some = list(_tiles(BM=(64,), BN=(32, 64, 128), BK=(128, 256), warps=(4,), stages=(3, 4)))
    more = list(_tiles(BM=(128,), BN=(64, 128), BK=(128,), warps=(4, 8), stages=(3, 4)))
    many = _tiles(BM=(128, 256), BN=(128, 256), BK=(64, 128), warps=(8, 16), stages=(3, 4))
    for rows, measured, found in (
        (16, (16,), few),
        (64, (64,), some),
        (256, (256,), [*some, *more]),
        (0, (4096, 1024), many),
    ):
        shapes = FEW if 0 < rows <= 64 else LARGE
        yield Tuning(
            op,
            rows,
            tuple(shape(m, *each) for m in measured for each in shapes),
            # Partial sums of fp8 take registers of their own.
            tuple(each for each in found if _fits(each, 8, 8) and (not fp8 or _sums(each) <= 64)),
        )


def _experts() -> Iterator[Tuning]:
    for rows, routed, tiles in (
        (16, (16, 64), _tiles(MATRIX=(1,), BM=(16,), BN=(64, 128), BK=(64, 128), **_FOUR)),
        (64, (256,), _tiles(MATRIX=(1,), BM=(32, 64), BN=(64, 128), BK=(64, 128), **_FOUR)),
        (0, (4096,), _tiles(MATRIX=(1,), BM=(64, 128), BN=(128, 256), BK=(64,), **_EIGHT)),
    ):
        shapes = tuple(_grouped(each, 8, 14336, 4096) for each in routed)
        fitting = tuple(each for each in tiles if _fits(each, 16, 16))
        yield Tuning("grouped_linear/half", rows, shapes, fitting)


def _decode() -> Iterator[Tuning]:
    for kind in ("float", "int8", "int4"):
        found = _tiles(MATRIX=(1,), BN=(32, 64, 128), warps=(2, 4, 8), stages=(2, 3, 4))
        tiles = (each for each in found if 8 <= each.constants["BN"] // each.num_warps <= 32)
        shapes = (
            _paged(kind, 16, 8192, 4),
            _paged(kind, 64, 1024, 1),
            _paged(kind, 1, 32768, 64),
            _paged(kind, 1, 1024, 8),
        )
        yield Tuning(f"paged_attention/half-{WIDTH}-{kind}", 0, shapes, tuple(tiles))


def _prefill() -> Iterator[Tuning]:
    found = _tiles(MATRIX=(1,), BM=(64, 128), BN=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
    tiles = (each for each in found if each.constants["BM"] // each.num_warps == 16)
    shapes = tuple(_prompt(tokens) for tokens in (4096, 1024, 16384))
    yield Tuning(f"prefill_attention/half-{WIDTH}", 0, shapes, tuple(tiles))


def tunings(begins: str = "") -> list[Tuning]:
    """Those whose key begins so, in an order that does not change."""
    every = [
        *_weights("w4_linear", 4),
        *_weights("w8_linear", 8),
        *_decode(),
        *_prefill(),
        *_narrow("fp8_linear"),
        *_narrow("int8_matmul"),
        *_experts(),
    ]
    return [each for each in every if each.key.startswith(begins)]
