"""The table of ops: how to make inputs, what the oracle is, what has a gradient.

`check` runs one case. The implementation is a parameter, so that the tests of kernels/triton can
hand in a launcher and its device. Shapes are small and odd: a page is not full, an expert is empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch

from kernels import ops
from kernels.reference.kv_cache import kv_write
from tests.kernels.ops.measure import Limit, agree

HALVES = (torch.float32, torch.float16, torch.bfloat16)
EXACT = (torch.float32,)
ROWS = (0, 1, 17)


class Source:
    """Random inputs of one dtype, the same for the same seed."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.chance, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.chance, dtype=torch.float64).to(self.dtype)

    def plain(self, *shape: int) -> torch.Tensor:
        """Between 0 and 1, in float32 whatever the dtype."""
        return torch.rand(*shape, generator=self.chance)

    def whole(self, low: int, high: int, *shape: int, dtype=torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.chance, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One op with one kind of inputs. make(source, rows) gives the arguments.

    differentiable: places of the arguments that have a gradient. run: what is compared, when that
    is not what the op returns. on_gpu: how far a float32 result of a GPU may be from the oracle,
    where its units keep less than float32.
    """

    name: str
    op: Callable[..., Any]
    make: Callable[[Source, int], tuple[Any, ...]]
    oracle: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = HALVES
    differentiable: tuple[int, ...] = ()
    run: Callable[..., Any] | None = None
    on_gpu: Limit | None = None

    @property
    def op_name(self) -> str:
        return self.name.split("/")[0]


def check(
    case: Case,
    rows: int,
    dtype: torch.dtype,
    op: Callable[..., Any] | None = None,
    device: str = "cpu",
) -> None:
    """AssertionError unless op (the registered one by default) gives what the oracle does."""
    args = case.make(Source(rows + 1, dtype), rows)
    wanted = case.oracle(*args)
    moved = tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)
    run = partial(case.run, op or case.op) if case.run else (op or case.op)
    got = run(*moved)
    pairs = [(got, wanted)] if isinstance(wanted, torch.Tensor) else zip(got, wanted, strict=True)
    for mine, right in pairs:
        narrow = mine.is_cuda and mine.dtype == torch.float32
        agree(mine, right, limit=case.on_gpu if narrow else None)


def four(s: Source, n: int, k: int, group: int, symmetric: bool) -> tuple[Any, ...]:
    """A 4-bit matrix: scales float16, as files have them, and minima that centre it."""
    scales = (s.plain(n, k // group) * 0.1 + 0.01).half()
    mins = None if symmetric else (scales.float() * -(6 + 3 * s.plain(n, k // group))).half()
    return s.whole(0, 256, n, k // 2, dtype=torch.uint8), scales, mins


def eight(s: Source, n: int, k: int, group: int) -> tuple[Any, ...]:
    scales = s.plain(n, k // group) * 0.01 + 0.001
    return s.whole(-128, 128, n, k, dtype=torch.int8), scales


def signed(s: Source, *shape: int) -> torch.Tensor:
    return s.whole(-128, 128, *shape, dtype=torch.int8)


def w4_case(s: Source, rows: int, group: int, symmetric: bool, bias: bool) -> tuple[Any, ...]:
    k, n = 2 * group + (group if group < 128 else 0), 19
    q, scales, mins = four(s, n, k, group, symmetric)
    if group == 64:
        scales = scales.float() * 1.001  # that half precision does not hold, as Q4_K's
    return s.normal(rows, k), q, scales, mins, s.normal(n) if bias else None


def w8_case(s: Source, rows: int, group: int, k: int, bias: bool) -> tuple[Any, ...]:
    return s.normal(rows, k), *eight(s, 19, k, group), s.normal(19) if bias else None


def stored(form: str, rows: int) -> torch.Tensor:
    """rows blocks of random numbers, with scales of an ordinary size."""
    kind = gguf.GGMLQuantizationType[form]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    chance = np.random.default_rng(rows)
    raw = chance.integers(0, 256, (rows, size), dtype=np.uint8)
    scales = [0, 2] if form in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [208 if form == "Q6_K" else 0]
    for place in scales:
        halves = (chance.random(rows) * 0.1 + 0.01).astype(np.float16)
        raw[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(raw).flatten()


def blocks_case(s: Source, rows: int, form: str) -> tuple[Any, ...]:
    return stored(form, rows), form, s.dtype


def gated_case(s: Source, rows: int, activation: str) -> tuple[Any, ...]:
    return s.normal(rows, 26), activation


def int8_case(s: Source, rows: int) -> tuple[Any, ...]:
    q, weight = signed(s, rows, 70), signed(s, 13, 70)
    return q, s.plain(rows) * 0.01, weight, s.plain(13) * 0.01, s.normal(13), s.dtype


def fp8_case(s: Source, rows: int) -> tuple[Any, ...]:
    x, w = s.normal(rows, 48), s.normal(11, 48)
    kind = torch.float8_e4m3fn
    return x.to(kind), s.plain(rows) + 0.5, w.to(kind), s.plain(11) + 0.5, s.dtype


def rope_case(s: Source, rows: int) -> tuple[Any, ...]:
    angles = s.plain(rows, 5) * 6
    return s.normal(rows, 4, 10), s.normal(rows, 2, 10), angles.cos(), angles.sin()


def caches(s: Source, kind: str, pages: int, page_tokens: int, heads: int, width: int):
    """(keys, values, key_scales, value_scales) of a cache that is full of normal numbers, written
    as every cache is. Scores of other bytes would be so large that one key takes all."""
    made = any_caches(s, kind, pages, page_tokens, heads, width)
    tokens = pages * page_tokens
    new = s.normal(tokens, heads, width), s.normal(tokens, heads, width)
    kv_write(*new, torch.arange(tokens), *made)
    return made


def any_caches(s: Source, kind: str, pages: int, page_tokens: int, heads: int, width: int):
    """The same, of random bytes: every level, and scales of either sign."""
    shape = (pages, page_tokens, heads)
    if kind == "float":
        return s.normal(*shape, width), s.normal(*shape, width), None, None
    if kind == "int8":
        pair = signed(s, *shape, width), signed(s, *shape, width)
        return *pair, s.plain(*shape) * 0.02, s.plain(*shape) * 0.02
    packed = [s.whole(0, 256, *shape, width * bits // 8, dtype=torch.uint8) for bits in (5, 4)]
    scales = [(s.plain(*shape, width // 32) - 0.5).half() for _ in range(2)]
    return *packed, *scales


def write_case(s: Source, rows: int, kind: str) -> tuple[Any, ...]:
    slots = torch.randperm(28, generator=s.chance)[:rows]
    slots[3:5] = -1
    new = s.normal(rows, 2, 64), s.normal(rows, 2, 64)
    if rows > 2:
        new[0][2] = 0  # a row of zeros has no scale
        # So far from zero that the rounding of a minimum is as large as the steps above it.
        new[0][1] = new[0][1] / 16 + 100
    return *new, slots, *caches(s, kind, 4, 7, 2, 64)


def written(op, keys, values, slots, *cache):
    """What the caches hold after a write, the originals untouched."""
    copies = [each if each is None else each.clone() for each in cache]
    assert op(keys, values, slots, *copies) is None
    order = (copies[0], copies[2], copies[1], copies[3])
    return tuple(each for each in order if each is not None)


def starts(rows: int) -> torch.Tensor:
    """Sequences of 0, 1 and more tokens; the last of many rows is in none."""
    first = min(1, rows)
    cuts = [0, first, first, max(rows - 1, first)]
    return torch.tensor(cuts, dtype=torch.int32)


def prefill_case(s: Source, rows: int, *settings: Any) -> tuple[Any, ...]:
    q, k, v = s.normal(rows, 4, 16), s.normal(rows, 2, 16), s.normal(rows, 2, 16)
    return q, k, v, starts(rows), *settings


PAGE = 8


def paged_case(s: Source, rows: int, kind: str, window: int, splits: int) -> tuple[Any, ...]:
    """Contexts at the edges of pages, tables in no order."""
    edges = [2 * PAGE + 1, 0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]
    contexts = torch.tensor([edges[row % 7] for row in range(rows)], dtype=torch.int32)
    tables = s.whole(0, 9, rows, 3, dtype=torch.int32)
    keys, values, key_scales, value_scales = caches(s, kind, 9, PAGE, 2, 32)
    scales = key_scales, value_scales
    return s.normal(rows, 6, 32), keys, values, *scales, tables, contexts, window, splits


def merge_case(s: Source, rows: int) -> tuple[Any, ...]:
    lse = s.plain(3, rows, 2) * 4
    lse[0, :, 0] = -torch.inf
    lse[:, 1:2] = -torch.inf
    return s.normal(3, rows, 2, 16), lse


def sparse_case(s: Source, rows: int, causal: bool) -> tuple[Any, ...]:
    blocks = -(-rows // 4)
    mask = s.whole(0, 2, 4, blocks, blocks).bool()
    mask[1] = False
    return s.normal(rows, 4, 16), s.normal(rows, 2, 16), s.normal(rows, 2, 16), mask, 4, causal


def experts(s: Source, *shape: int) -> torch.Tensor:
    """Of five: 3 has no rows, and -1 is held elsewhere."""
    return torch.tensor([0, 1, 2, 4, -1])[s.whole(0, 5, *shape)]


def grouped_case(s: Source, rows: int) -> tuple[Any, ...]:
    return s.normal(rows, 24), s.normal(5, 7, 24), experts(s, rows)


def outer_case(s: Source, rows: int) -> tuple[Any, ...]:
    return s.normal(rows, 7), s.normal(rows, 24), experts(s, rows), 5


def nm_case(s: Source, rows: int, n: int, m: int) -> tuple[Any, ...]:
    return s.normal(rows, 5 * m), *ops.linear_nm.nm_pack(s.normal(9, 5 * m), n, m), n, m


def sgmv_case(s: Source, rows: int) -> tuple[Any, ...]:
    a, b = s.normal(3, 4, 24), s.normal(3, 10, 4)
    adapters = torch.tensor([0, -1, 2])[s.whole(0, 3, rows)]
    return s.normal(rows, 24), a, b, adapters, s.plain(3) + 0.5


def scan_case(s: Source, rows: int, state: bool) -> tuple[Any, ...]:
    """rows steps of two sequences."""
    x, dt = s.normal(2, rows, 5), s.plain(2, rows, 5).to(s.dtype)
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    a, first = -(s.plain(5, 4) + 0.1).to(wide), s.plain(2, 5, 4).to(wide)
    b, c, d = s.normal(2, rows, 4), s.normal(2, rows, 4), s.normal(5)
    return x, dt, a, b, c, d, first if state else None


def sample_case(s: Source, rows: int) -> tuple[Any, ...]:
    """Every combination of a limit or none; ties, and tokens that may not be drawn."""
    logits = s.normal(rows, 37) * 2
    logits[:, 5:7] = -torch.inf
    logits[:, 10:13] = logits[:, 9:10]
    heat = s.plain(rows) * 2
    heat[::4] = 0
    top_k = torch.tensor([0, 3, 37, 1, 99, -1])[s.whole(0, 6, rows)]
    top_p = torch.tensor([1.0, 0.31, 0.93, 0.0])[s.whole(0, 4, rows)]
    return logits, heat, top_k, top_p, s.plain(rows)
