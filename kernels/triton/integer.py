"""Launchers of the integer-only operations: names, signatures and bits of reference/integer.py.

Tensors lie on a CUDA or ROCm device (in the interpreter, on the CPU) and may have any strides. The
kernels are in integer_kernels.py. Called by kernels/ops/integer.py, under the names at the end.
"""

from typing import Any

import torch
import triton

from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose
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
from kernels.triton.launch import target_of
from kernels.triton.plan import Plan, power, run, shipped
from kernels.triton.targets import Target


def _plan(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: Config) -> Plan:
    """No float, so nothing to fuse either."""
    return Plan(kernel, grid, args | dict(config.constants), config, fp_fusion=False)


def _rows(target: Target, columns: int) -> Config:
    """For a row a program."""
    config = choose("integer_rows", target, 0)
    return config._replace(constants={"B": min(config.constants["B"], power(columns))})


def _like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=torch.int32, device=values.device)


def requantise(
    values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor | int
) -> torch.Tensor:
    """See reference/integer.py; multiplier and shift have one value, or one for each column."""
    made = _like(values)
    run(_requantise(target_of("integer_requantise", values), values, multiplier, shift, made))
    return made


def _requantise(
    target: Target,
    values: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | int,
    made: torch.Tensor,
) -> Plan:
    columns, config = values.shape[-1], choose("integer_flat", target, 0)
    shifts = torch.as_tensor(shift, device=values.device).long().expand(columns).contiguous()
    args: dict[str, Any] = {"values": values.contiguous(), "shift": shifts, "made": made}
    args |= {"multiplier": multiplier.long().expand(columns).contiguous()}
    args |= {"size": values.numel(), "N": columns}
    grid = (triton.cdiv(values.numel(), config.constants["B"]),)
    return _plan(requantise_kernel, grid, args, config)


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/integer.py."""
    made = _like(values)
    exponents = torch.empty(*values.shape[:-1], 1, dtype=torch.int64, device=values.device)
    run(_quantise(target_of("integer_quantise", values), values, made, exponents))
    return made, exponents


def _quantise(
    target: Target, values: torch.Tensor, made: torch.Tensor, exponents: torch.Tensor
) -> Plan:
    columns = values.shape[-1]
    args: dict[str, Any] = {"values": values.contiguous(), "made": made, "exponents": exponents}
    args |= {"N": columns}
    return _plan(quantise_kernel, (exponents.numel(),), args, _rows(target, columns))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    shift: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See reference/integer.py."""
    target = target_of("integer_linear", x)
    short, exponents = quantise(x)
    made = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32, device=x.device)
    run(_linear(target, short, exponents, weight, multiplier, shift, bias, made))
    return made


def _linear(
    target: Target,
    short: torch.Tensor,
    exponents: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    shift: int,
    bias: torch.Tensor | None,
    made: torch.Tensor,
) -> Plan:
    columns, terms = weight.shape
    rows, config = exponents.numel(), choose("integer_linear", target, exponents.numel())
    args: dict[str, Any] = {"x": short, "exponents": exponents, "weight": weight.contiguous()}
    args |= {"multiplier": multiplier.contiguous(), "made": made, "rows": rows, "shift": shift}
    args |= {"bias": None if bias is None else bias.contiguous(), "N": columns, "K": terms}
    tile = config.constants
    grid = (triton.cdiv(rows, tile["BM"]), triton.cdiv(columns, tile["BN"]))
    return _plan(linear_kernel, grid, args, config)


def softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(scores)
    run(_softmax(target_of("integer_softmax", scores), scores, visible, made))
    return made


def _softmax(
    target: Target, scores: torch.Tensor, visible: torch.Tensor, made: torch.Tensor
) -> Plan:
    columns = scores.shape[-1]
    args: dict[str, Any] = {"scores": scores.contiguous(), "made": made, "N": columns}
    args |= {"visible": visible.to(torch.uint8).contiguous()}
    grid = (scores.numel() // max(columns, 1),)
    return _plan(softmax_kernel, grid, args, _rows(target, columns))


def silu(x: torch.Tensor, point: int) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(x)
    run(_activate(target_of("integer_silu", x), x, None, "silu", (point, 0), made))
    return made


def gelu(x: torch.Tensor, point: int) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(x)
    run(_activate(target_of("integer_gelu", x), x, None, "gelu", (point, 0), made))
    return made


def gated(gate_up: torch.Tensor, activation: str, point: int, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    both, half = gate_up.contiguous(), gate_up.shape[-1] // 2
    made = torch.empty(*both.shape[:-1], half, dtype=torch.int32, device=both.device)
    target = target_of("integer_gated", both)
    run(_activate(target, both, both[..., half:], activation, (point, shift), made))
    return made


def _activate(
    target: Target,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    shifts: tuple[int, int],
    made: torch.Tensor,
) -> Plan:
    config = choose("integer_flat", target, 0)
    args: dict[str, Any] = {"gate": gate.contiguous(), "up": up, "made": made}
    args |= {"size": made.numel(), "point": shifts[0], "shift": shifts[1]}
    args |= {"N": made.shape[-1], "GELU": activation == "gelu"}
    return _plan(gated_kernel, (triton.cdiv(made.numel(), config.constants["B"]),), args, config)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: int, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(x)
    run(_rms_norm(target_of("integer_rms_norm", x), x, weight, epsilon, shift, made))
    return made


def _rms_norm(
    target: Target,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: int,
    shift: int,
    made: torch.Tensor,
) -> Plan:
    columns = x.shape[-1]
    args: dict[str, Any] = {"x": x.contiguous(), "weight": weight.contiguous(), "made": made}
    args |= {"epsilon": epsilon, "shift": shift, "N": columns}
    return _plan(rms_norm_kernel, (x.numel() // columns,), args, _rows(target, columns))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shift: int) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(x)
    run(_rotate(target_of("integer_rotate", x), x, cos, sin, shift, made))
    return made


def _rotate(
    target: Target,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    shift: int,
    made: torch.Tensor,
) -> Plan:
    tokens, heads, width = x.shape
    args: dict[str, Any] = {"x": x.contiguous(), "cos": cos.contiguous(), "sin": sin.contiguous()}
    args |= {"made": made, "heads": heads, "shift": shift, "HALF": width // 2}
    config = choose("integer_rows", target, 0)._replace(constants={"B": power(width // 2)})
    return _plan(rotate_kernel, (tokens * heads,), args, config)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, multiplier: int, shift: int
) -> torch.Tensor:
    """See reference/integer.py."""
    made = _like(q)
    run(_attention(target_of("integer_attention", q), (q, k, v), multiplier, shift, made))
    return made


def _attention(
    target: Target,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    multiplier: int,
    shift: int,
    made: torch.Tensor,
) -> Plan:
    q, k, v = (each.contiguous() for each in given)
    tokens, heads, width = q.shape
    config = choose("integer_attention", target, tokens)
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "made": made, "tokens": tokens}
    args |= {"places": k.shape[0], "multiplier": multiplier, "shift": shift}
    args |= {"H": heads, "KH": k.shape[1], "D": width, "BD": max(32, power(width))}
    grid = (triton.cdiv(tokens, config.constants["BM"]), heads)
    return _plan(attention_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """16 tokens of a model with 4096 numbers each, 32 heads over 8 and a context of 2048."""

    def whole(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, row, exponents = whole(16, 4096), whole(4096), whole(16, 1, dtype=torch.int64)
    weight, both = whole(4096, 4096, dtype=torch.int8), whole(16, 8192)
    q, scores, half = whole(16, 32, 128), whole(512, 2048), whole(16, 1, 64)
    k = whole(2048, 8, 128, dtype=torch.int16)
    shift = whole(1, dtype=torch.int64)
    linear = _linear(target, x, exponents, weight, row, 40, row, x)
    attention = _attention(target, (q, k, k), 1 << 23, 40, q)
    units = ["int8" if plan.config.constants["MATRIX"] else "" for plan in (linear, attention)]
    n, context = x.numel(), 16 * 32 * 2048 * 128
    return [
        shipped("integer_requantise/4096", _requantise(target, x, row, shift, x), 4 * n),
        shipped("integer_quantise/4096", _quantise(target, x, x, exponents), 8 * n),
        shipped("integer_linear/rows16", linear, 4 * n * 4096, units[0]),
        shipped("integer_softmax/2048", _softmax(target, scores, scores, scores), 20 * 512 * 2048),
        shipped("integer_silu/4096", _activate(target, x, None, "silu", (20, 0), x), 20 * n),
        shipped("integer_gelu/4096", _activate(target, x, None, "gelu", (20, 0), x), 20 * n),
        shipped(
            "integer_gated/4096",
            _activate(target, both, both[:, 4096:], "silu", (20, 20), x),
            22 * n,
        ),
        shipped("integer_rms_norm/4096", _rms_norm(target, x, row, 1, 40, x), 10 * n),
        shipped("integer_rotate/128", _rotate(target, q, half, half, 20, q), 6 * q.numel()),
        # Scores three times over, each and the mixture of four products of bytes.
        shipped("integer_attention/128", attention, 4 * 2 * 4 * context, units[1]),
    ]


integer_requantise, integer_quantise, integer_linear = requantise, quantise, linear
integer_softmax, integer_silu, integer_gelu, integer_gated = softmax, silu, gelu, gated
integer_rms_norm, integer_rotate, integer_attention = rms_norm, rotate, attention
