"""Attention of some queries to some keys, with what is needed to merge it with that to other keys,
and its gradient. By torch's flash kernels (Dao et al. 2022): no matrix of scores is ever whole.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Seen(NamedTuple):
    """out (batch, heads, queries, head_dim): the mix of values; weight (batch, heads, queries): the
    logarithm of the sum of exponentials of scores."""

    out: Tensor
    weight: Tensor


class Attend(Protocol):
    """Attention over a rectangle of queries and keys, and its gradient. Tensors are (batch, heads,
    tokens, head_dim); keys and values may have fewer heads."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Seen:
        """causal: token i of the queries sees the keys up to i."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Seen, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. seen: of ALL keys of these queries, not only of these;
        so the gradients of several rectangles add up."""
        ...


class Flash:
    """torch's kernels for the CPU."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Seen:
        """See `Attend`. ValueError on another device than the CPU."""
        if query.device.type != "cpu":
            raise ValueError(f"ring attention computes on cpu; the model is on {query.device}")
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return Seen(*op(query, key, value, 0.0, causal))

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Seen, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attend`."""
        groups = query.shape[1] // key.shape[1]
        wide_key, wide_value = (x.repeat_interleave(groups, 1) for x in (key, value))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = op(
            grad, query, wide_key, wide_value, seen.out, seen.weight, 0.0, causal
        )
        return to_query, _grouped(to_key, groups), _grouped(to_value, groups)


def _grouped(grad: Tensor, groups: int) -> Tensor:
    """The gradient of heads that `groups` heads each read."""
    batch, heads, *rest = grad.shape
    return grad.view(batch, heads // groups, groups, *rest).sum(2)


def merge(into: Seen, at: slice, more: Seen) -> None:
    """Adds attention to further keys, for the queries `at`, in place (Milakov and Gimelshein 2018).
    A weight of -inf is a query that has seen nothing yet."""
    out, weight = into.out[:, :, at], into.weight[:, :, at]
    total = torch.logaddexp(weight, more.weight.to(weight.dtype))
    out.mul_((weight - total).exp().unsqueeze(-1))
    out.addcmul_(more.out.to(out.dtype), (more.weight - total).exp().unsqueeze(-1).to(out.dtype))
    weight.copy_(total)
