"""The selective scan of Mamba (Gu and Dao, 2023): a linear recurrence whose step depends on input.

h = exp(dt * a) * h + dt * b * x and y = c . h + d * x, for every channel with N states. The
backward pass walks the same steps from the end.
"""

from typing import NamedTuple

import torch

from kernels.reference.precision import wide


class ScanGradients(NamedTuple):
    """Gradients of `selective_scan`'s inputs, in its order."""

    x: torch.Tensor
    dt: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    d: torch.Tensor
    state: torch.Tensor


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dt [B, L, D], a [D, N], b and c [B, L, N], d [D], state [B, D, N] (zeros when None).

    (y [B, L, D] of x's dtype, last_state [B, D, N] in float32 (float64 if x is)), where handing
    last_state to the next call goes on as if the two had been one.
    """
    exact = wide(x)
    outs, dtype = [], x.dtype
    h = _first_state(x, a, state)
    x, dt, a, b, c, d = (each.to(exact) for each in (x, dt, a, b, c, d))
    for step in range(x.shape[1]):
        h = _advance(h, x, dt, a, b, step)
        outs.append((h * c[:, step, None, :]).sum(-1) + d * x[:, step])
    y = torch.stack(outs, dim=1) if outs else torch.empty_like(x)
    return y.to(dtype), h


def _first_state(x: torch.Tensor, a: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    exact = wide(x)
    if state is None:
        return torch.zeros(x.shape[0], *a.shape, dtype=exact, device=x.device)
    return state.to(exact, copy=True)


def _advance(
    h: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, step: int
) -> torch.Tensor:
    """The state [B, D, N] after one more step."""
    size = dt[:, step, :, None]
    return (size * a).exp() * h + size * b[:, step, None, :] * x[:, step, :, None]


def selective_scan_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor | None,
) -> ScanGradients:
    """Gradients for grad_y [B, L, D] and grad_state [B, D, N] (of last_state); each of the dtype of
    what it belongs to, that of the state float32 (float64 if x is) also where state is None."""
    exact = wide(x)
    states = [_first_state(x, a, state)]
    dtypes = [each.dtype for each in (x, dt, a, b, c, d)]
    grad_y = grad_y.to(exact)
    x, dt, a, b, c, d = (each.to(exact) for each in (x, dt, a, b, c, d))
    for step in range(x.shape[1]):
        states.append(_advance(states[-1], x, dt, a, b, step))
    g_x, g_d = grad_y * d, (grad_y * x).sum((0, 1))
    g_dt, g_a, g_b, g_c = (torch.zeros_like(each) for each in (dt, a, b, c))
    g_h = grad_state.to(exact, copy=True)
    for step in reversed(range(x.shape[1])):
        size, before = dt[:, step, :, None], states[step]
        out = grad_y[:, step, :, None]
        g_c[:, step] = (out * states[step + 1]).sum(1)
        g_h = g_h + out * c[:, step, None, :]
        decay = (size * a).exp()
        g_decay = g_h * before * decay  # of dt * a, the exponent
        given, at = x[:, step, :, None], b[:, step, None, :]
        g_a += (g_decay * size).sum(0)
        g_dt[:, step] = (g_decay * a + g_h * at * given).sum(-1)
        g_b[:, step] = (g_h * size * given).sum(1)
        g_x[:, step] += (g_h * size * at).sum(-1)
        g_h = g_h * decay
    grads = (g_x, g_dt, g_a, g_b, g_c, g_d)
    rounded = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    return ScanGradients._make((*rounded, g_h))
