"""The claim that results per row do not depend on company, on this machine's matrix library."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from kernels.reference.attention import kv_write, paged_attention, plan_attention
from kernels.reference.stable import rows_agree, stable_width


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (77, 130)]


@pytest.mark.parametrize(("rows_out", "columns"), SHAPES)
def test_rows_of_a_product_agree(threads: int, rows_out: int, columns: int):
    weight, x = torch.randn(rows_out, columns), torch.randn(300, columns)
    whole = F.linear(x, weight)
    chance = random.Random(0)
    for rows in [*range(1, 70), 96, 128, 129, 200, 299]:
        start = chance.randrange(300 - rows)
        part = F.linear(x[start : start + rows], weight)
        assert torch.equal(part, whole[start : start + rows]), rows


def test_the_number_of_threads_does_not_matter():
    weight, x = torch.randn(576, 1536), torch.randn(64, 1536)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(F.linear(x, weight))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


CHECK = "from kernels.reference.stable import rows_agree; print(rows_agree())"


def agreed(mode: str | None) -> str:
    """What a fresh process says whose matrix library was told `mode` from outside."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    environment |= {} if mode is None else {"MKL_CBWR": mode}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_process_asks_for_it_by_itself():
    assert rows_agree()
    assert agreed(None) == "True"


def test_the_check_notices_a_library_told_otherwise():
    assert agreed("COMPATIBLE") == "False"


def test_widths():
    assert [stable_width(n) for n in (1, 16, 17, 192, 193, 512, 513, 704, 705)] == [
        16, 16, 32, 192, 512, 512, 528, 704, 1024,
    ]  # fmt: skip


def test_attention_of_a_position_is_the_same_however_it_is_reached(threads: int):
    """1,300 positions in one go, in pieces, and alone among others: the same bits."""
    tokens, heads, kv_heads, head_dim, page_tokens = 1300, 9, 3, 64, 16
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
    for step in (37, 150, 256):
        pieces = [(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        assert torch.equal(torch.cat([attend([piece]) for piece in pieces]), whole), step
    alone = [(position, position + 1) for position in range(0, tokens, 13)]
    assert torch.equal(attend(alone), whole[::13])
    assert torch.equal(torch.cat([attend([span]) for span in alone]), whole[::13])
    for first in range(64, tokens, 100):
        assert torch.equal(attend([(0, first)]), whole[:first]), first
