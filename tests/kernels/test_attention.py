"""Paged attention against attention written out in float64, one query at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference.attention import kv_write, paged_attention, plan_attention

KV_HEADS, HEAD_DIM = 2, 16


def naive(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Rows first.. of one sequence; keys and values [context, kv_heads, head_dim]."""
    group = queries.shape[1] // KV_HEADS
    out = torch.empty_like(queries, dtype=torch.float64)
    for row in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            seen = slice(0, first + row + 1)
            scores = keys[seen, head // group].double() @ queries[row, head].double()
            weights = (scores * HEAD_DIM**-0.5).softmax(0)
            out[row, head] = weights @ values[seen, head // group].double()
    return out


def run(
    shapes: list[tuple[int, int]], group: int, page_tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the oracle's rows for sequences of (earlier tokens, rows), in scattered pages."""
    random = torch.Generator().manual_seed(seed)
    width = max(-(-(before + rows) // page_tokens) for before, rows in shapes)
    tables = torch.randperm(len(shapes) * width, generator=random).view(len(shapes), width)
    kv = torch.full((2, tables.numel(), page_tokens, KV_HEADS, HEAD_DIM), 1e4)
    queries, wanted, starts = [], [], [0]
    for table, (before, rows) in zip(tables, shapes, strict=True):
        keys, values = torch.randn(2, before + rows, KV_HEADS, HEAD_DIM, generator=random)
        place = torch.arange(before + rows)
        slots = table[place // page_tokens] * page_tokens + place % page_tokens
        kv_write(kv, slots, keys, values)
        queries.append(torch.randn(rows, KV_HEADS * group, HEAD_DIM, generator=random))
        wanted.append(naive(queries[-1], keys, values, before))
        starts.append(starts[-1] + rows)
    contexts = [before + rows for before, rows in shapes]
    plan = plan_attention(starts, contexts, tables, page_tokens, torch.float32)
    flat = torch.cat(queries)
    out = torch.full_like(flat, float("nan"))
    paged_attention(flat, kv, plan, out)
    return out, torch.cat(wanted)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([1, 3, 4, 5]),
    st.sampled_from([4, 16, 24]),
)
@settings(max_examples=40)
def test_equals_attention_written_out(shapes: list[tuple[int, int]], group: int, page_tokens: int):
    out, wanted = run(shapes, group, page_tokens)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_tokens", [16, 24])
def test_long_and_short_contexts_in_one_batch(page_tokens: int):
    """Crosses every width class: up to 192, one block of 512, and two of them."""
    shapes = [(3, 1), (191, 1), (192, 1), (511, 1), (600, 1), (190, 5), (0, 200), (510, 4)]
    out, wanted = run(shapes, 3, page_tokens)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_single_rows_share_one_group_wherever_they_stand():
    tables = torch.zeros(4, 8, dtype=torch.int64)
    plan = plan_attention([0, 1, 4, 5, 6], [7, 9, 100, 3], tables, 16, torch.float32)
    assert [group.sequences for group in plan.groups] == [3]
    assert len(plan.segments) == 1
    assert torch.as_tensor(plan.groups[0].rows).tolist() == [0, 4, 5]


def test_a_context_longer_than_its_table_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError):
        plan_attention([0, 1], [33], torch.zeros(1, 2, dtype=torch.int64), 16, torch.float32)
