"""Parts of the model with their gradients written out, each in fewer passes over memory than
autograd's own: on a CPU those passes, not the matrix products, are what is left to save.

All are functions of tensors that autograd knows; gradients come out in float64 as autograd's to
rounding (tests/train/test_fused.py). None may be differentiated twice.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

SHORT_TOKENS = 512
"""Up to here `attention` computes its gradient by whole rows of scores. torch's own kernel, which
goes head by head, took 1.7 to 2 times as long there in bfloat16, and less at 1,024."""
ROWS = 128
"""Rows of scores that are computed at once: later keys are left out block by block."""


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `rms_norm`."""
        wide = x.float() if x.dtype == torch.bfloat16 else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # one pass, nothing between
        inverse: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x / r: (g w - y mean(g w y)) / r, and the sum of g y."""
        (gradient,) = gradients
        x, weight, inverse = ctx.saved_tensors
        wide, scale = gradient.to(inverse.dtype), weight.to(inverse.dtype)
        normal = x * inverse
        product = (wide * normal).flatten(0, -2)
        less = (product @ scale).div_(-x.shape[-1]).view(inverse.shape)
        of_x = (wide * scale).addcmul_(normal, less).mul_(inverse)
        return of_x.to(x.dtype), product.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019), in float32 at least.
    x: (..., width); weight: (width,)."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        """See `project`."""
        joined = _joined(weights)
        ctx.save_for_backward(x, *weights)
        return functional.linear(x, joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """One product for the input, one for all matrices."""
        (gradient,) = gradients
        x, *weights = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_weights = rows.t() @ x.flatten(0, -2)
        of_x = (rows @ _joined(weights)).view(x.shape)
        return of_x, *torch.split(of_weights, [len(weight) for weight in weights])


def project(x: Tensor, *weights: Tensor) -> Tensor:
    """x: (..., width) times several matrices (out_i, width) in one product: (..., sum of out_i)."""
    out: Tensor = _Project.apply(x, *weights)  # type: ignore[no-untyped-call]
    return out


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The matrices below each other: where they lie, if they lie so, as a flat buffer has them."""
    first, width = weights[0], weights[0].shape[1]
    place = first.storage_offset()
    for weight in weights:
        apart = weight.storage_offset() != place or not weight.is_contiguous()
        if apart or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(tuple(weights))
        place += weight.numel()
    rows = sum(len(weight) for weight in weights)
    view: Tensor = first.as_strided((rows, width), (width, 1), first.storage_offset())
    return view


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        """See `swiglu`."""
        gate, up = joined.chunk(2, -1)
        opened = functional.silu(gate)
        ctx.save_for_backward(joined, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Both halves are written where the joined product's gradient wants them."""
        (gradient,) = gradients
        joined, opened = ctx.saved_tensors
        gate, up = joined.chunk(2, -1)
        out = torch.empty_like(joined)
        of_gate, of_up = out.chunk(2, -1)
        torch.mul(gradient, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) x up (Shazeer 2020) of (..., 2 x width), gate first."""
    out: Tensor = _SwiGLU.apply(joined)  # type: ignore[no-untyped-call]
    return out


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `rotate`."""
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The same angles, the other way."""
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (batch, tokens, heads, head_dim), its halves turned by each position's angles (Su et al.
    2021, in the half-split order); cos, sin: (tokens, head_dim / 2)."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x * torch.cat([cos, cos], -1)[:, None]
    first, second = x.chunk(2, -1)
    sin = sin[:, None]
    half = x.shape[-1] // 2
    out[..., :half].addcmul_(second, sin, value=-1)
    out[..., half:].addcmul_(first, sin)
    return out


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `attention`."""
        ctx.save_for_backward(query, key, value)
        return _whole(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores anew, ROWS of queries at a time against the keys up to theirs. The queries of a
        key's group are rows beside each other, so its gradient is summed by the product."""
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        batch, tokens, heads, width = query.shape
        kv_heads, group = key.shape[2], heads // key.shape[2]
        scale = 1 / math.sqrt(width)
        queries = _by_group(query, kv_heads) * scale
        outs = _by_group(gradient, kv_heads)
        keys, values = _by_group(key, kv_heads), _by_group(value, kv_heads)
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        of_values = torch.zeros_like(values)
        for start in range(0, tokens, ROWS):
            stop = min(start + ROWS, tokens)
            rows = slice(start * group, stop * group)
            query_rows, out_rows = queries[:, rows], outs[:, rows]
            near_keys, near_values = keys[:, :stop], values[:, :stop]
            mask = _later(start, stop, group, query.dtype).expand(len(keys), -1, -1)
            scores = torch.baddbmm(mask, query_rows, near_keys.mT)
            shares = torch.softmax(scores, -1)
            of_values[:, :stop].baddbmm_(shares.mT, out_rows)
            of_shares = torch.bmm(out_rows, near_values.mT)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_queries[:, rows] = torch.bmm(of_scores, near_keys)
            of_keys[:, :stop].baddbmm_(of_scores.mT, query_rows)
        by_head = of_queries.mul_(scale).view(batch, kv_heads, tokens, group, width)
        return (
            by_head.transpose(1, 2).reshape(query.shape),
            of_keys.view(batch, kv_heads, tokens, width).transpose(1, 2),
            of_values.view(batch, kv_heads, tokens, width).transpose(1, 2),
        )


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention. query: (batch, tokens, heads, head_dim); key, value: (batch, tokens,
    kv_heads, head_dim), heads a multiple of kv_heads. Out: as query."""
    if not written_out(query.shape[1], query.dtype):
        return _whole(query, key, value)
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


def written_out(tokens: int, compute: torch.dtype) -> bool:
    """Whether `attention` has a gradient of its own for sequences of so many tokens. In float32
    torch's is the faster one at any length, by a fifth at 256 tokens; it saves softmax's sums."""
    return tokens <= SHORT_TOKENS and compute != torch.float32


def _whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, tokens, heads, width) as (batch x kv_heads, tokens x heads / kv_heads, width),
    contiguous; with one key head that may be the tensor itself."""
    batch, tokens, heads, width = x.shape
    split = x.view(batch, tokens, kv_heads, heads // kv_heads, width).transpose(1, 2)
    return split.contiguous().view(batch * kv_heads, -1, width)


def _later(start: int, stop: int, group: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores of queries start to stop - 1, each `group` times, against keys 0 to
    stop - 1: minus infinity where the key comes later."""
    mask = torch.full((stop - start, stop), -math.inf, dtype=dtype).triu_(start + 1)
    return mask.repeat_interleave(group, 0) if group > 1 else mask
