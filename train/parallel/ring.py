"""Ring attention (Liu, Zaharia, Abbeel 2023): ranks share a sequence, each keeps its queries, and
keys and values go round.

In each of `size` turns a rank attends to the keys that it holds, while these are already on their
way to its neighbour. On the way back gradients of keys and values go round with them, and are home
after as many turns. A rank holds two sets of keys and values at most, whatever the size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.blocks import Attend, Flash, Seen, merge
from train.parallel.order import Order

KEYS, GRADIENTS = 1, 2
"""Tags of what is under way at the same time."""


class Passing:
    """A tensor on its way to the next rank, and another one on its way from the one before."""

    def __init__(self, arriving: Tensor, under_way: list[dist.Work]) -> None:
        self._arriving, self._under_way = arriving, under_way

    def wait(self) -> Tensor:
        """What the rank before has sent."""
        for work in self._under_way:
            work.wait()
        return self._arriving


class Ring:
    """The ranks of a process group, each with its neighbours; None: one rank, alone.

    attend: how a rectangle is computed.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, order: Order, attend: Attend | None = None
    ) -> None:
        self.rank = group.rank() if group is not None else 0
        self.size = group.size() if group is not None else 1
        if order.size != self.size:
            raise ValueError(f"the order is for {order.size} ranks, the group has {self.size}")
        self.order, self.attend = order, attend or Flash()
        self._group = group

    def holder(self, turn: int) -> int:
        """Whose keys this rank holds in a turn."""
        return (self.rank - turn) % self.size

    def pass_on(self, tensor: Tensor, tag: int) -> Passing:
        """Sends to the next rank, receives the like from the one before."""
        if self._group is None:
            return Passing(tensor, [])
        arriving = torch.empty_like(tensor)
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sent = dist.isend(tensor, group=self._group, group_dst=to, tag=tag)
        received = dist.irecv(arriving, group=self._group, group_src=source, tag=tag)
        works = [work for work in (sent, received) if work is not None]
        return Passing(arriving, works)


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
    """Causal attention over a sequence of which each rank holds the tokens of its order.

    query (batch, heads, local_tokens, head_dim), key and value with as many heads or a divisor;
    rotated by their positions already. Out: as query, and of its dtype. Called by all ranks.
    """
    if query.shape[2] != ring.order.local_tokens:
        raise ValueError(
            f"a rank of {ring.size} holds {ring.order.local_tokens} of {ring.order.tokens} tokens; "
            f"it was given {query.shape[2]}"
        )
    out: Tensor = _RingAttention.apply(query, key, value, ring)  # type: ignore[no-untyped-call]
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        seen = Seen(
            torch.zeros_like(query, dtype=wide, memory_format=torch.contiguous_format),
            query.new_full(query.shape[:-1], -torch.inf, dtype=wide),
        )
        held = torch.stack([key, value])
        for turn in range(ring.size):
            coming = ring.pass_on(held, KEYS) if turn + 1 < ring.size else None
            piece = ring.order.piece(ring.rank, ring.holder(turn))
            if piece is not None:
                mine, keys, values = query[:, :, piece.queries], *held[:, :, :, piece.keys]
                merge(seen, piece.queries, ring.attend.forward(mine, keys, values, piece.causal))
            if coming is not None:
                held = coming.wait()
        out = seen.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, seen.weight)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, weight = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad = grads[0].contiguous()
        wide = weight.dtype
        to_query = torch.zeros_like(query, dtype=wide)
        held = torch.stack([key, value])
        to_held = torch.zeros_like(held, dtype=wide)
        home: Passing | None = None
        for turn in range(ring.size):
            coming = ring.pass_on(held, KEYS) if turn + 1 < ring.size else None
            piece = ring.order.piece(ring.rank, ring.holder(turn))
            if home is not None:
                to_held = home.wait()
            if piece is not None:
                at, keys = piece.queries, piece.keys
                seen = Seen(out[:, :, at], weight[:, :, at])
                mine, theirs = query[:, :, at], held[:, :, :, keys]
                q, k, v = ring.attend.backward(
                    grad[:, :, at], mine, theirs[0], theirs[1], seen, piece.causal
                )
                to_query[:, :, at] += q
                to_held[0, :, :, keys] += k
                to_held[1, :, :, keys] += v
            home = ring.pass_on(to_held, GRADIENTS)
            if coming is not None:
                held = coming.wait()
        assert home is not None
        to_key, to_value = home.wait().to(key.dtype)
        return to_query.to(query.dtype), to_key, to_value, None
