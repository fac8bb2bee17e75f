"""The kernel of `selective_scan`, Mamba's recurrence.

A program holds the states of BD channels of one sequence in registers and walks over its steps, so
that nothing but x, dt, b, c and y moves. Semantics: reference/scan.py. Called by
kernels/ops/scan.py on a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import need_float, target_of
from kernels.triton.plan import TYPES, Plan, packed, power, run, shipped
from kernels.triton.targets import Target


@triton.jit(do_not_specialize=["steps"])
def selective_scan_kernel(
    x,
    dt,
    a,
    b,
    c,
    d,
    state,
    y,
    last_state,
    steps,
    x_stride_b,
    x_stride_l,
    dt_stride_b,
    dt_stride_l,
    b_stride_b,
    b_stride_l,
    c_stride_b,
    c_stride_l,
    D: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """Sequence and block of channels are the program ids. a [D, N], d [D], y [B, L, D] and both
    states [B, D, N] are contiguous; without a state, h begins as zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    ours, used = channel < D, n < N
    ok = ours[:, None] & used[None, :]
    at = channel[:, None] * N + n[None, :]
    decay = tl.load(a + at, mask=ok, other=0.0).to(tl.float32)
    skip = tl.load(d + channel, mask=ours, other=0.0).to(tl.float32)
    h = tl.zeros((BD, NP), tl.float32)
    if state is not None:
        h = tl.load(state + sequence * D * N + at, mask=ok, other=0.0).to(tl.float32)
    x += sequence * x_stride_b + channel
    dt += sequence * dt_stride_b + channel
    b += sequence * b_stride_b + n
    c += sequence * c_stride_b + n
    y += sequence * steps * D + channel
    given, size, into, read = _step(x, dt, b, c, ours & (steps > 0), used & (steps > 0))
    for step in range(steps):
        x += x_stride_l
        dt += dt_stride_l
        b += b_stride_l
        c += c_stride_l
        # The next step is asked for before this one is computed, which waits for h.
        more = step + 1 < steps
        ahead = _step(x, dt, b, c, ours & more, used & more)
        h = tl.exp(size[:, None] * decay) * h + (size * given)[:, None] * into[None, :]
        seen = tl.sum(h * read[None, :], axis=1) + skip * given
        tl.store(y, seen.to(y.dtype.element_ty), mask=ours)
        y += D
        given, size, into, read = ahead
    tl.store(last_state + sequence * D * N + at, h, mask=ok)


@triton.jit
def _step(x, dt, b, c, ours, used):
    """(x, dt [BD], b, c [NP]) of one step, float32."""
    given = tl.load(x, mask=ours, other=0.0).to(tl.float32)
    size = tl.load(dt, mask=ours, other=0.0).to(tl.float32)
    into = tl.load(b, mask=used, other=0.0).to(tl.float32)
    return given, size, into, tl.load(c, mask=used, other=0.0).to(tl.float32)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/scan.py. ValueError for float64."""
    target = target_of("selective_scan", x)
    for each in (x, dt, a, b, c, d) if state is None else (x, dt, a, b, c, d, state):
        need_float("selective_scan", each)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last_state = torch.empty(x.shape[0], *a.shape, dtype=torch.float32, device=x.device)
    run(_plan(target, x, dt, a, b, c, d, state, y, last_state))
    return y, last_state


def _plan(
    target: Target,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None,
    y: torch.Tensor,
    last_state: torch.Tensor,
) -> Plan:
    sequences, steps, channels = x.shape
    config = choose("selective_scan", target, sequences)
    x, dt, b, c = packed(x), packed(dt), packed(b), packed(c)
    args: dict[str, Any] = {
        "x": x,
        "dt": dt,
        "a": a.contiguous(),
        "b": b,
        "c": c,
        "d": d.contiguous(),
        "state": None if state is None else state.contiguous(),
        "y": y,
        "last_state": last_state,
        "steps": steps,
        "x_stride_b": x.stride(0),
        "x_stride_l": x.stride(1),
        "dt_stride_b": dt.stride(0),
        "dt_stride_l": dt.stride(1),
        "b_stride_b": b.stride(0),
        "b_stride_l": b.stride(1),
        "c_stride_b": c.stride(0),
        "c_stride_l": c.stride(1),
        "D": channels,
        "N": a.shape[1],
        "NP": power(a.shape[1]),
        **config.constants,
    }
    grid = (sequences, triton.cdiv(channels, config.constants["BD"]))
    return Plan(selective_scan_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """4 sequences of 512 steps, 1536 channels of 16 states, with and without a first state."""
    made: list[Case | Refused] = []
    for dtype, goes_on in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        x = torch.empty(4, 512, 1536, dtype=dtype, device="meta")
        a, d = torch.empty(1536, 16, device="meta"), torch.empty(1536, device="meta")
        b = torch.empty(4, 512, 16, dtype=dtype, device="meta")
        state = torch.empty(4, 1536, 16, device="meta")
        first = state if goes_on else None
        plan = _plan(target, x, x, a, b, b, d, first, x, state)
        name = f"selective_scan/{TYPES[dtype]}-{'state' if goes_on else 'fresh'}"
        made.append(shipped(name, plan, 7 * x.numel() * 16))
    return made
