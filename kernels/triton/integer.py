"""Launchers of the integer-only operations: names, signatures and bits of reference/integer.py.

Tensors lie on a CUDA or ROCm device (in the interpreter, on the CPU) and may have any strides. The
kernels are in integer_kernels.py.
"""

from typing import Any

import torch
import triton

from kernels.triton.integer_kernels import (
    attention_kernel,
    gated_kernel,
    linear_kernel,
    quantise_kernel,
    requantise_kernel,
    rms_norm_kernel,
    rotate_kernel,
    softmax_kernel,
)


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """RuntimeError when the first tensor is where Triton cannot run; nothing for no program."""
    device = args[0].device
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"{kernel.__name__} in Triton needs its tensors on a CUDA or ROCm device, not on "
            f"{device}: move them there, or call kernels/reference/integer.py."
        )
    if 0 not in grid:
        kernel[grid](*args, **constants, num_warps=4, num_stages=2, enable_fp_fusion=False)


def matrix_units(device: torch.device) -> bool:
    """Whether Triton has int8 products for them: not on CUDA devices before sm_80."""
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _block(length: int, most: int = 1024) -> int:
    return min(most, 1 << max(length - 1, 0).bit_length())


def _like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=torch.int32, device=values.device)


def requantise(
    values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor | int
) -> torch.Tensor:
    """See reference/integer.py; multiplier and shift have one value, or one for each column."""
    columns = values.shape[-1]
    factors = multiplier.long().expand(columns).contiguous()
    shifts = torch.as_tensor(shift, device=values.device).long().expand(columns).contiguous()
    made = _like(values)
    grid = (triton.cdiv(values.numel(), 1024),)
    args = (values.contiguous(), factors, shifts, made, values.numel())
    _run(requantise_kernel, grid, *args, N=columns, B=1024)
    return made


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/integer.py."""
    columns, made = values.shape[-1], _like(values)
    exponents = torch.empty(*values.shape[:-1], 1, dtype=torch.int64, device=values.device)
    args = (values.contiguous(), made, exponents)
    _run(quantise_kernel, (exponents.numel(),), *args, N=columns, B=_block(columns))
    return made, exponents


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    shift: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See reference/integer.py."""
    short, exponents = quantise(x)
    columns, terms = weight.shape
    rows = exponents.numel()
    made = torch.empty(*x.shape[:-1], columns, dtype=torch.int32, device=x.device)
    matrix = matrix_units(x.device)
    tile = {"BM": 16, "BN": 32, "BK": 64} if matrix else {"BM": 4, "BN": 32, "BK": 16}
    grid = (triton.cdiv(rows, tile["BM"]), triton.cdiv(columns, tile["BN"]))
    args = (short, exponents, weight.contiguous(), multiplier.contiguous(), bias, made, rows, shift)
    _run(linear_kernel, grid, *args, N=columns, K=terms, **tile, MATRIX=matrix)
    return made


def softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """See reference/integer.py."""
    columns, made = scores.shape[-1], _like(scores)
    args = (scores.contiguous(), visible.to(torch.uint8).contiguous(), made)
    grid = (scores.numel() // max(columns, 1),)
    _run(softmax_kernel, grid, *args, N=columns, B=_block(columns))
    return made


def silu(x: torch.Tensor, point: int) -> torch.Tensor:
    """See reference/integer.py."""
    return _activate(x, None, "silu", point, 0)


def gelu(x: torch.Tensor, point: int) -> torch.Tensor:
    """See reference/integer.py."""
    return _activate(x, None, "gelu", point, 0)


def gated(gate_up: torch.Tensor, activation: str, point: int, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    both = gate_up.contiguous()
    return _activate(both, both[..., gate_up.shape[-1] // 2 :], activation, point, shift)


def _activate(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, point: int, shift: int
) -> torch.Tensor:
    made = _like(gate if up is None else up)
    grid = (triton.cdiv(made.numel(), 1024),)
    args = (gate.contiguous(), up, made, made.numel(), point, shift)
    _run(gated_kernel, grid, *args, N=made.shape[-1], GELU=activation == "gelu", B=1024)
    return made


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: int, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    columns, made = x.shape[-1], _like(x)
    args = (x.contiguous(), weight.contiguous(), made, epsilon, shift)
    _run(rms_norm_kernel, (x.numel() // columns,), *args, N=columns, B=_block(columns))
    return made


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    tokens, heads, width = x.shape
    made = _like(x)
    args = (x.contiguous(), cos.contiguous(), sin.contiguous(), made, heads, shift)
    _run(rotate_kernel, (tokens * heads,), *args, HALF=width // 2, B=_block(width // 2))
    return made


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, multiplier: int, shift: int
) -> torch.Tensor:
    """See reference/integer.py."""
    tokens, heads, width = q.shape
    made = _like(q)
    args = (q.contiguous(), k.contiguous(), v.contiguous(), made, tokens, k.shape[0])
    matrix = matrix_units(q.device)
    rows, places = (16, 32) if matrix else (2, 16)
    grid = (triton.cdiv(tokens, rows), heads)
    sizes = {"H": heads, "KH": k.shape[1], "D": width, "BM": rows, "BN": places}
    sizes |= {"BD": max(32, _block(width)), "MATRIX": matrix}
    _run(attention_kernel, grid, *args, multiplier, shift, **sizes)
    return made
