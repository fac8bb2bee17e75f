"""Compiles at start what a model will launch, so that no request pays for it.

Kernels are compiled for the sizes of the model's matrices, for every entry of the table of tile
sizes, by launching each once on a device on tensors of zeros. `late` then says of what is compiled
all the same. Called by whoever serves a model on a GPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from kernels.triton import gated, linear_w4, linear_w8, norm, rope
from kernels.triton.launch import target_of
from kernels.triton.linear import entries

MOST_ROWS = 512  # launched for an entry that is for any number of rows


class Linear(NamedTuple):
    """A quantised matrix of a model. bits: 4 or 8. scales: their dtype. mins: only of 4 bits."""

    rows: int
    columns: int
    bits: int
    group: int
    scales: torch.dtype
    mins: bool = False
    bias: bool = False


class Layers(NamedTuple):
    """What a decoder is made of, as far as kernels of this folder compute it. activation: of
    `gated`, over feed_forward columns."""

    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    activation: str
    linears: Sequence[Linear]


class Warmed(NamedTuple):
    """An op, the numbers of rows it was launched with, and how long all of that took."""

    op: str
    rows: tuple[int, ...]
    seconds: float


def warm_up(
    layers: Layers, device: torch.device | str, others: Sequence[Callable[[], object]] = ()
) -> list[Warmed]:
    """Launches what the layers need, and `others`: functions without arguments that launch kernels
    of a shape which only their caller knows, such as attention over its own pages."""
    done = [_linear(each, layers.dtype, device) for each in dict.fromkeys(layers.linears)]
    x = torch.zeros(2, layers.hidden, dtype=layers.dtype, device=device)
    done.append(_timed("rms_norm", (2,), lambda _: norm.rms_norm(x, x[0], 1e-5)))
    done.append(
        _timed("rms_norm_residual", (2,), lambda _: norm.rms_norm_residual(x, x, x[0], 1e-5))
    )
    q, k = (
        x.new_zeros(2, layers.heads, layers.head_dim),
        x.new_zeros(2, layers.kv_heads, layers.head_dim),
    )
    angles = torch.zeros(2, layers.head_dim // 2, device=device)
    done.append(_timed("rope", (2,), lambda _: rope.rope(q, k, angles, angles)))
    both = x.new_zeros(2, 2 * layers.feed_forward)
    done.append(_timed("gated", (2,), lambda _: gated.gated(both, layers.activation)))
    done += [_once(each) for each in others]
    return done


def _linear(each: Linear, dtype: torch.dtype, device: torch.device | str) -> Warmed:
    """Every entry of the table, and what is multiplied by hand above them."""
    op = f"w{each.bits}_linear"
    scales = torch.zeros(each.rows, each.columns // each.group, dtype=each.scales, device=device)
    bias = torch.zeros(each.rows, dtype=dtype, device=device) if each.bias else None
    known = entries(op, target_of(op, scales), dtype)
    rows = tuple(entry.rows or MOST_ROWS for entry in known)
    rows += (known[-1].rows + 1,) if known[-1].rows else ()
    if each.bits == 4:
        levels = torch.zeros(each.rows, each.columns // 2, dtype=torch.uint8, device=device)
        mins = scales if each.mins else None

        def multiply(count: int) -> None:
            x = torch.zeros(count, each.columns, dtype=dtype, device=device)
            linear_w4.w4_linear(x, levels, scales, mins, bias)

    else:
        whole = torch.zeros(each.rows, each.columns, dtype=torch.int8, device=device)

        def multiply(count: int) -> None:
            x = torch.zeros(count, each.columns, dtype=dtype, device=device)
            linear_w8.w8_linear(x, whole, scales, bias)

    return _timed(op, rows, multiply)


def _once(launch: Callable[[], object]) -> Warmed:
    return _timed(getattr(launch, "__name__", "other"), (), lambda _: launch())


def _timed(op: str, rows: tuple[int, ...], launch: Callable[[int], object]) -> Warmed:
    begun = time.perf_counter()
    for count in rows or (0,):
        launch(count)
    return Warmed(op, rows, time.perf_counter() - begun)


@contextmanager
def late(told: Callable[[str], None]) -> Iterator[None]:
    """Within it, `told` is called with the name of every kernel that Triton compiles."""
    import triton

    before = triton.knobs.runtime.jit_post_compile_hook

    def compiled(*args: Any, **named: Any) -> Any:
        told(str(named["fn"].name))
        return before(*args, **named) if before else None

    triton.knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
