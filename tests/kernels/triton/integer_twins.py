"""Compares kernels/triton/integer.py with reference/integer.py in this process, and prints as JSON
which calls have the same bits. Run with TRITON_INTERPRET=1, or on a GPU with DEVICE=cuda; an
argument limits it to operations whose names begin so."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from kernels.reference import integer as reference
from kernels.triton import integer as twins
from kernels.triton.launch import interpreted_as, interpreting

TOP = (1 << 31) - 1


class Call(NamedTuple):
    """An operation and what it is given."""

    op: str
    args: tuple[Any, ...]


def drawn(*shape: int, most: int = TOP, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=random, dtype=torch.int32)


def unlike(rows: int, columns: int) -> torch.Tensor:
    """Rows from zeros to the ends of int32."""
    bits = torch.tensor([0, 0, 3, 8, 12, 17, 20, 23, 28, 31])[torch.arange(rows) % 10, None]
    made = drawn(rows, columns) >> (31 - bits)
    made[0], made[-1, 0] = 0, TOP
    return made


def elementwise() -> Iterator[Call]:
    x = unlike(11, 70)
    yield Call("requantise", (x, drawn(70, most=1 << 24), 33))
    yield Call("requantise", (x, torch.tensor([2]), 0))
    yield Call("requantise", (x, drawn(70, most=1 << 29), torch.arange(70) % 63))
    for point in (14, 20, 24):
        near = drawn(7, 90, most=8 << point, seed=point)
        for name in ("silu", "gelu"):
            yield from (Call(name, (near, point)), Call(name, (x, point)))
            yield Call("gated", (near, name, point, point))
    yield Call("gated", (x[:, ::2][:, :34], "silu", 14, 1))


def rows() -> Iterator[Call]:
    for columns in (1, 17, 64, 1500):
        x, weight = unlike(10, columns), drawn(columns, most=1 << 24)
        yield Call("quantise", (x,))
        yield from (Call("rms_norm", (x, weight, *last)) for last in ((12345, 24), (1, 30)))
        visible = drawn(5, columns, most=1) != 0
        visible[2] = False
        for most in (1 << 14, 1 << 18, TOP):
            yield Call("softmax", (drawn(5, columns, most=most), visible))
    yield Call("rms_norm", (unlike(10, 5), drawn(5), 1 << 60, 3))
    cos, sin = drawn(5, 1, 8, most=1 << 15), drawn(5, 1, 8, most=1 << 15, seed=1)
    yield Call("rotate", (drawn(5, 3, 16), cos, sin, 31))
    yield Call("rotate", (drawn(5, 6, 16, most=1 << 16)[:, 1:4], cos, sin, 18))


LINEARS = ((3, 17, 40), (1, 1, 1), (17, 64, 33), (2, 200, 70))  # rows, terms, columns
# Tokens, places, heads, key heads, width.
ATTENTIONS = ((5, 9, 4, 2, 16), (1, 1, 1, 1, 2), (18, 40, 3, 1, 24), (2, 65, 2, 2, 40))


def products(most: int) -> Iterator[Call]:
    """Of the first shapes of both lists."""
    for count, terms, columns in LINEARS[:most]:
        x, weight = unlike(count, terms)[None], drawn(columns, terms, most=128, seed=1)
        shared = x, weight.clamp(max=127).to(torch.int8), drawn(columns, most=1 << 24)
        yield Call("linear", (*shared, 30))
        yield Call("linear", (*shared, 40, drawn(columns, seed=2)))
    for tokens, places, heads, kv_heads, width in ATTENTIONS[:most]:
        q = drawn(tokens, heads, width, most=16383)
        k, v = (drawn(places, kv_heads, width, most=16383, seed=seed).short() for seed in (1, 2))
        for shift in (30, 37):
            yield Call("attention", (q, k, v, (1 << 23) + 5, shift))


def same(call: Call, device: str) -> bool:
    there = [each.to(device) if isinstance(each, torch.Tensor) else each for each in call.args]
    wanted, made = getattr(reference, call.op)(*call.args), getattr(twins, call.op)(*there)
    pairs = zip(wanted, made, strict=True) if isinstance(wanted, tuple) else [(wanted, made)]
    return all(a.dtype == b.dtype and torch.equal(a, b.cpu()) for a, b in pairs)


def compared(device: str, begins: str) -> list[tuple[str, bool]]:
    torch.set_num_threads(1)
    made = []
    for call in (call for group in (elementwise(), rows(), products(4)) for call in group):
        if call.op.startswith(begins):
            made.append((call.op, same(call, device)))
    if not interpreting():
        return made
    with interpreted_as("sm_75"):
        for call in products(1):
            if call.op.startswith(begins):
                made.append((f"{call.op} without matrix units", same(call, device)))
    return made


if __name__ == "__main__":
    print(json.dumps(compared(os.environ.get("DEVICE", "cpu"), "".join(sys.argv[1:]))))
