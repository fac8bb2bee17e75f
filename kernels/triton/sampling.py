"""The kernel of `sample`: temperature, then the top k, then the top p, without sorting.

A program holds one row. What is kept is a prefix of the tokens by value, so the kernel looks for
where it ends: it narrows an interval of values, in a few passes over the row, until one token or
one value is left in it. Semantics: reference/sampling.py. Called by kernels/ops/sampling.py on a
CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import target_of
from kernels.triton.plan import TYPES, Plan, packed, precision, run, shipped
from kernels.triton.targets import Target

LEAST_KEY = tl.constexpr(-(2**31))


@triton.jit
def _key(x):
    """int32 numbers in the order of the float32 numbers x; both zeros have the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _chunk(logits, start, V, BLOCK: tl.constexpr):
    """(ids, values, keys) [BLOCK] of a row from `start` on; -inf and the least key past its end."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(logits + token, mask=token < V, other=float("-inf")).to(tl.float32)
    return token, x, tl.where(token < V, _key(x), LEAST_KEY)


@triton.jit
def _tally(logits, V, bounds, largest, inverse, BLOCK: tl.constexpr, BOUNDS: tl.constexpr):
    """(mass float32, count int32) [BOUNDS] of the tokens whose key is at least each bound; mass is
    their probability in units of the likeliest token's."""
    mass = tl.zeros((BOUNDS, BLOCK), tl.float32)
    count = tl.zeros((BOUNDS, BLOCK), tl.int32)
    for start in range(0, V, BLOCK):
        _, x, key = _chunk(logits, start, V, BLOCK)
        above = key[None, :] >= bounds.to(tl.int32)[:, None]
        mass += tl.where(above, tl.exp((x - largest) * inverse)[None, :], 0.0)
        count += above.to(tl.int32)
    return tl.sum(mass, axis=1), tl.sum(count, axis=1)


@triton.jit
def _cut(
    logits,
    V,
    low,
    high,
    below,
    goal,
    largest,
    inverse,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """Where the shortest prefix ends whose count (or mass) is at least `goal`.

    Keys from `high` on belong to it, those below `low` do not; `below` tokens have a key of `low`
    or more. Returns (low, high, below, need): of the tokens whose key is in low..high, which have
    the same value, the first `need` by id belong to the prefix.
    """
    above = tl.zeros((), tl.int32)
    mass = 0.0
    while (high - low > 1) & (below - above > 1):
        bounds = low + (high - low) * (tl.arange(0, BOUNDS) + 1) // (BOUNDS + 1)
        bounds = tl.maximum(bounds, low + 1)
        masses, counts = _tally(logits, V, bounds, largest, inverse, BLOCK, BOUNDS)
        enough = (masses if BY_MASS else counts.to(tl.float32)) >= goal
        below = tl.minimum(below, tl.min(tl.where(enough, counts, V), axis=0))
        above = tl.maximum(above, tl.max(tl.where(enough, 0, counts), axis=0))
        mass = tl.maximum(mass, tl.max(tl.where(enough, 0.0, masses), axis=0))
        lower = tl.max(tl.where(enough, bounds, low), axis=0)
        high = tl.min(tl.where(enough, high, bounds), axis=0)
        low = lower
    missing = goal - above.to(tl.float32)
    if BY_MASS:
        value = _key_value(low)
        each = tl.exp((value - largest) * inverse)
        missing = tl.ceil((goal - mass) / tl.where(each > 0, each, 1.0))
    most = (below - above).to(tl.float32)
    need = tl.minimum(tl.maximum(missing, 1.0), most).to(tl.int32)
    return low, high, below, need


@triton.jit
def _key_value(key):
    """The float32 number that has this key."""
    short = key.to(tl.int32)
    return (short ^ ((short >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kept(x, key, low, high, need, before, largest, inverse):
    """(mass [BLOCK] of the tokens that are kept, how many keys were in low..high up to now)."""
    equal = ((key >= low) & (key < high)).to(tl.int32)
    rank = tl.cumsum(equal, axis=0) - equal + before
    keep = (key >= high) | ((equal > 0) & (rank < need))
    mass = tl.where(keep, tl.exp((x - largest) * inverse), 0.0)
    return mass, before + tl.sum(equal, axis=0)


@triton.jit
def _kept_mass(logits, V, low, high, need, largest, inverse, BLOCK: tl.constexpr):
    """float32: the mass of all tokens that are kept."""
    total = 0.0
    before = 0
    for start in range(0, V, BLOCK):
        _, x, key = _chunk(logits, start, V, BLOCK)
        mass, before = _kept(x, key, low, high, need, before, largest, inverse)
        total += tl.sum(mass, axis=0)
    return total


@triton.jit
def _draw(logits, V, low, high, need, target, largest, inverse, BLOCK: tl.constexpr):
    """The first kept id at which the cumulated mass exceeds `target`, else the last kept one."""
    reached = 0.0
    before = 0
    drawn = V
    last = 0
    for start in range(0, V, BLOCK):
        token, x, key = _chunk(logits, start, V, BLOCK)
        mass, before = _kept(x, key, low, high, need, before, largest, inverse)
        beyond = (reached + tl.cumsum(mass, axis=0) > target) & (mass > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(beyond, token, V), axis=0))
        last = tl.maximum(last, tl.max(tl.where(mass > 0, token, 0), axis=0))
        reached += tl.sum(mass, axis=0)
    return tl.where(drawn < V, drawn, last)


@triton.jit
def _largest(logits, V, BLOCK: tl.constexpr):
    """(the largest value of a row, the first id that has it)."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        _, x, _ = _chunk(logits, start, V, BLOCK)
        best = tl.maximum(best, x)
    largest = tl.max(best, axis=0)
    first = tl.zeros((BLOCK,), tl.int32) + V
    for start in range(0, V, BLOCK):
        token, x, _ = _chunk(logits, start, V, BLOCK)
        first = tl.minimum(first, tl.where(x == largest, token, V))
    return largest, tl.min(first, axis=0)


@triton.jit
def sample_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    uniform,
    ids,
    V,
    logit_stride,
    BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """A program chooses the token of its row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logit_stride
    largest, chosen = _largest(logits, V, BLOCK)
    heat = tl.load(temperature + row).to(tl.float32)
    if heat != 0:
        inverse = 1.0 / heat
        low = tl.full((), LEAST_KEY, tl.int64)
        all_tokens = tl.zeros((), tl.int32) + V
        end = _key(largest).to(tl.int64) + 1
        high, below, need = end, all_tokens, all_tokens
        k = tl.load(top_k + row)
        if (k > 0) & (k < V):
            goal = k.to(tl.float32)
            low, high, below, need = _cut(
                logits, V, low, end, below, goal, largest, inverse, False, BLOCK, BOUNDS
            )
        p = tl.load(top_p + row).to(tl.float32)
        if p < 1:
            goal = p * _kept_mass(logits, V, low, high, need, largest, inverse, BLOCK)
            start, most = low, need
            low, high, below, need = _cut(
                logits, V, low, end, below, goal, largest, inverse, True, BLOCK, BOUNDS
            )
            need = tl.where(low == start, tl.minimum(need, most), need)
        target = _kept_mass(logits, V, low, high, need, largest, inverse, BLOCK)
        target *= tl.load(uniform + row).to(tl.float32)
        chosen = _draw(logits, V, low, high, need, target, largest, inverse, BLOCK)
    tl.store(ids + row, chosen.to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """See reference/sampling.py. ValueError for float64. Probabilities are summed in float32, so
    that a draw within 1e-6 of the border between two tokens may go either way."""
    target = target_of("sample", logits)
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    run(_plan(target, logits, temperature, top_k, top_p, uniform, ids))
    return ids


def _plan(
    target: Target,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    ids: torch.Tensor,
) -> Plan:
    precision("sample", logits.dtype)
    config = choose("sample", target, logits.shape[0])
    logits = packed(logits)
    args: dict[str, Any] = {
        "logits": logits,
        "temperature": temperature.contiguous(),
        "top_k": top_k.contiguous(),
        "top_p": top_p.contiguous(),
        "uniform": uniform.contiguous(),
        "ids": ids,
        "V": logits.shape[1],
        "logit_stride": logits.stride(0),
        **config.constants,
    }
    return Plan(sample_kernel, (logits.shape[0],), args, config)


def cases(target: Target) -> list[Case | Refused]:
    """64 rows of a vocabulary of 128256."""
    made: list[Case | Refused] = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.empty(64, 128256, dtype=dtype, device="meta")
        numbers, ids = (
            torch.empty(64, device="meta"),
            torch.empty(64, dtype=torch.int64, device="meta"),
        )
        plan = _plan(target, logits, numbers, ids, numbers, numbers, ids)
        # What one pass computes; how many there are depends on the values.
        made.append(shipped(f"sample/{TYPES[dtype]}", plan, 20 * logits.numel()))
    return made
