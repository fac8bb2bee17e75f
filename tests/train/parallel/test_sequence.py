"""Attention over a sequence that several ranks share, against that of one: outputs, gradients, what
crosses the wire, and how evenly the work lies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.train.processes import on_ranks
from train.parallel.blocks import Flash, Seen, merge
from train.parallel.order import Order
from train.parallel.ring import Ring, ring_attention
from train.parallel.ulysses import ulysses_attention
from train.world import GlooWorld

BATCH, HEADS, WIDTH, TOKENS = 2, 4, 16, 48


def given(kv_heads: int = 2, tokens: int = TOKENS) -> list[Tensor]:
    """Query, key, value and the gradient of what comes out, of the whole sequence."""
    torch.manual_seed(5)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [torch.randn(BATCH, h, tokens, WIDTH, dtype=torch.float64) for h in heads]


def alone(kv_heads: int = 2) -> list[Tensor]:
    """Output and gradients by torch, in one process."""
    *inputs, grad = given(kv_heads)
    query, key, value = (x.requires_grad_() for x in inputs)
    gqa = kv_heads != HEADS
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


class CountedRectangles(Flash):
    """Counts products of a query and a key that are computed."""

    def __init__(self) -> None:
        self.pairs = 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Seen:
        self.pairs += query.shape[2] * key.shape[2] * (0.5 if causal else 1.0)
        return super().forward(query, key, value, causal)


def shared(world: GlooWorld, way: str, kv_heads: int) -> dict[str, Any]:
    """This rank's part of output and gradients, as whole tensors; and what it has counted."""
    order = Order(TOKENS, world.size, way == "zigzag")
    positions = order.positions(world.rank)
    *inputs, grad = [x[:, :, positions] for x in given(kv_heads)]
    query, key, value = (x.contiguous().requires_grad_() for x in inputs)
    counted, sent = CountedRectangles(), Sent()
    with sent:
        if way == "ulysses":
            out = ulysses_attention(query, key, value, world.group)
        else:
            out = ring_attention(query, key, value, Ring(world.group, order, counted))
        parts = [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]
    wholes = []
    for part in parts:
        whole = part.new_zeros((*part.shape[:2], TOKENS, WIDTH))
        whole[:, :, positions] = part
        world.all_reduce(whole)
        wholes.append(whole.numpy())  # a tensor's memory would be gone with its process
    return {"wholes": wholes, "pairs": counted.pairs, "bytes": sent.bytes}


class Sent:
    """What leaves this rank, in bytes, counted where torch.distributed is called."""

    def __init__(self) -> None:
        self.bytes = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Sent":
        isend, all_to_all = dist.isend, dist.all_to_all_single

        def counted_isend(tensor: Tensor, *args: Any, **more: Any) -> Any:
            self.bytes += tensor.nbytes
            return isend(tensor, *args, **more)

        def counted_exchange(out: Tensor, tensor: Tensor, *args: Any, **more: Any) -> Any:
            size = more["group"].size()
            self.bytes += tensor.nbytes * (size - 1) // size
            return all_to_all(out, tensor, *args, **more)

        self._patch.setattr(dist, "isend", counted_isend)
        self._patch.setattr(dist, "all_to_all_single", counted_exchange)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


@pytest.mark.parametrize("way", ["zigzag", "contiguous", "ulysses"])
@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_rank(way: str, size: int) -> None:
    """Output and three gradients, with keys for two queries each (four ranks of Ulysses repeat)."""
    for answer in on_ranks(size, shared, way, 2):
        for mine, theirs in zip(answer["wholes"], alone(2), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("zigzag", [True, False])
def test_one_rank_alone_is_plain_attention(zigzag: bool) -> None:
    """No group: nothing is sent, and the numbers are torch's."""
    *inputs, grad = given()
    query, key, value = (x.requires_grad_() for x in inputs)
    out = ring_attention(query, key, value, Ring(None, Order(TOKENS, 1, zigzag)))
    parts = [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]
    for mine, theirs in zip(parts, alone(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_zigzag_shares_the_work_and_contiguous_does_not() -> None:
    """Products of queries and keys on the busiest rank over the mean: published as about even, and
    as 2 - 1/P for contiguous tokens."""
    most = {}
    for way in ("zigzag", "contiguous"):
        pairs = [answer["pairs"] for answer in on_ranks(4, shared, way, 4)]
        assert sum(pairs) == TOKENS * TOKENS / 2
        most[way] = max(pairs) / (sum(pairs) / 4)
    assert most["zigzag"] <= 1.05
    assert most["contiguous"] >= 1.7


def test_ulysses_sends_what_the_paper_says() -> None:
    """Forward: 4 N h / P values of which (P - 1) / P leave a rank; the same once more backward."""
    size, hidden = 4, HEADS * WIDTH
    values = 4 * BATCH * TOKENS * hidden // size
    for answer in on_ranks(size, shared, "ulysses", HEADS):
        assert answer["bytes"] == 2 * values * (size - 1) // size * 8


def test_the_ring_sends_keys_once_round_each_way() -> None:
    """Forward P - 1 times keys and values; backward again, and their gradients P times."""
    size = 4
    block = 2 * BATCH * HEADS * (TOKENS // size) * WIDTH * 8
    for answer in on_ranks(size, shared, "zigzag", HEADS):
        assert answer["bytes"] == (2 * (size - 1) + size) * block


def halves(joined: Callable[[Seen, slice, Seen], None]) -> float:
    """How far attention to two halves of the keys, joined, is from attention to all of them."""
    query, key, value, _ = given(HEADS)
    seen = Seen(torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf))
    for half in (slice(0, TOKENS // 2), slice(TOKENS // 2, TOKENS)):
        joined(
            seen,
            slice(0, TOKENS),
            Flash().forward(query, key[:, :, half], value[:, :, half], False),
        )
    whole = functional.scaled_dot_product_attention(query, key, value)
    return float((seen.out - whole).abs().max())


def test_rectangles_are_joined_by_their_weights() -> None:
    """And if they are just added, which is the mutation, it shows."""

    def added(into: Seen, at: slice, more: Seen) -> None:
        into.out[:, :, at] += more.out

    assert halves(merge) < 1e-12
    assert halves(added) > 1e-3


def test_refusals_name_what_would_be_accepted() -> None:
    with pytest.raises(ValueError, match="50 tokens is not divisible by 2 x ranks.*= 8; 48"):
        Order(50, 4)
    with pytest.raises(ValueError, match="order is for 2 ranks, the group has 1"):
        Ring(None, Order(TOKENS, 2))
    query, key, value, _ = given()
    with pytest.raises(ValueError, match="holds 24 of 24 tokens; it was given 48"):
        ring_attention(query, key, value, Ring(None, Order(24, 1)))


def refused(world: GlooWorld) -> str:
    """What three ranks are told of four heads."""
    query, key, value, _ = given()
    try:
        ulysses_attention(query, key, value, world.group)
    except ValueError as error:
        return str(error)
    return ""


def test_more_ranks_than_heads_can_be_shared_by_are_refused() -> None:
    assert all("3 ranks cannot share 4 heads" in said for said in on_ranks(3, refused))
