"""The claim that results per row do not depend on company, on this machine's matrix library."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from kernels.reference.attention import kv_write, paged_attention, plan_attention
from kernels.reference.stable import batch_padding_rows, stable_width


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows_out", "columns"), [(960, 576), (576, 1536)])
def test_padded_rows_of_a_product_agree(threads: int, rows_out: int, columns: int):
    weight, x = torch.randn(rows_out, columns), torch.randn(130, columns)
    whole = F.linear(x, weight)
    for rows in [*range(1, 20), 33, 64, 129]:
        padded = F.pad(x[:rows], (0, 0, 0, batch_padding_rows(rows)))
        assert torch.equal(F.linear(padded, weight)[:rows], whole[:rows]), rows


def test_widths():
    assert [stable_width(n) for n in (1, 16, 17, 192, 193, 512, 513)] == [
        16, 16, 32, 192, 512, 512, 1024,
    ]  # fmt: skip


def test_attention_of_a_position_is_the_same_however_it_is_reached(threads: int):
    """600 positions in one go, in pieces of 37, and alone among others: the same bits."""
    tokens, heads, kv_heads, head_dim, page_tokens = 600, 9, 3, 64, 16
    pages = -(-tokens // page_tokens)
    kv = torch.zeros(2, pages, page_tokens, kv_heads, head_dim)
    keys, values = torch.randn(2, tokens, kv_heads, head_dim)
    kv_write(kv, torch.arange(tokens), keys, values)
    queries = torch.randn(tokens, heads, head_dim)
    table = torch.arange(pages)[None]

    def attend(spans: list[tuple[int, int]]) -> torch.Tensor:
        flat = torch.cat([queries[start:stop] for start, stop in spans])
        starts = [0]
        for start, stop in spans:
            starts.append(starts[-1] + stop - start)
        tables = table.expand(len(spans), -1)
        stops = [stop for _, stop in spans]
        plan = plan_attention(starts, stops, tables, page_tokens, torch.float32)
        out = torch.empty_like(flat)
        paged_attention(flat, kv, plan, out)
        return out

    whole = attend([(0, tokens)])
    pieces = [(start, min(start + 37, tokens)) for start in range(0, tokens, 37)]
    assert torch.equal(torch.cat([attend([piece]) for piece in pieces]), whole)
    alone = [(position, position + 1) for position in range(0, tokens, 13)]
    assert torch.equal(attend(alone), whole[::13])
    assert torch.equal(torch.cat([attend([span]) for span in alone]), whole[::13])
