"""`selective_scan` and its backward pass. See reference/scan.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import scan as reference
from kernels.reference.precision import wide


def _check(
    op: str,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[Out, Out]:
    checks.dims(f"{op}: x", x, "[B, L, D]")
    checks.dims(f"{op}: a", a, "[D, N]")
    batch, steps, channels = x.shape
    states = a.shape[1]
    checks.shape(f"{op}: dt", dt, batch, steps, channels)
    checks.shape(f"{op}: a", a, channels, states)
    checks.shape(f"{op}: b", b, batch, steps, states)
    checks.shape(f"{op}: c", c, batch, steps, states)
    checks.shape(f"{op}: d", d, channels)
    for name, given in (("x", x), ("dt", dt), ("a", a), ("b", b), ("c", c), ("d", d)):
        checks.dtype(f"{op}: {name}", given, checks.FLOATS)
    if state is not None:
        checks.shape(f"{op}: state", state, batch, channels, states)
        checks.dtype(f"{op}: state", state, (wide(x),))
    return Out(x.shape, x.dtype), Out((batch, channels, states), wide(x))


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[Out, Out]:
    return _check("selective_scan", x, dt, a, b, c, d, state)


def _scan_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[Out, ...]:
    op = "selective_scan_backward"
    y, last = _check(op, x, dt, a, b, c, d, state)
    checks.shape(f"{op}: grad_y", grad_y, *y.shape)
    checks.shape(f"{op}: grad_state", grad_state, *last.shape)
    return (*(Out(given.shape, given.dtype) for given in (x, dt, a, b, c, d)), last)


_Seven = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]


def _plain_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None,
) -> _Seven:
    """As torch's schemas have it, where results have no names."""
    return reference.selective_scan_backward(grad_y, grad_state, x, dt, a, b, c, d, state)


selective_scan = define(reference.selective_scan, _scan, "scan")
selective_scan_backward = define(
    _plain_backward, _scan_backward, None, name="selective_scan_backward"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    *grads, state_grad = selective_scan_backward(grad_y, grad_state, *ctx.saved_tensors)
    return *grads, None if ctx.saved_tensors[6] is None else state_grad


register_autograd(selective_scan, _save, _backward)
