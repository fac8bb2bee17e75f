"""Attention by the matrix units (batch_invariant = False) against float64 on what a cache stores,
and against itself in other pages, chunks and company. Single bfloat16 numbers would miss the
bounds."""

import pytest
import torch

from kernels.cpu import ops
from tests.kernels.caches import HEADS, Cache, attended, drawn, rotated

BOUND = 5e-4  # of the results' root mean square, at scores of some tens
FORMATS = ["float32", "float16", "int8", "int4"]

pytestmark = pytest.mark.skipif(not ops.has_matrix_units(), reason="this machine has no AMX")


def error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.double() - wanted).abs().max() / wanted.pow(2).mean().sqrt())


def stored(cache: Cache, qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """What float64 makes of the keys and values that the cache has."""
    queries, _, _ = rotated(qkv.double(), heads)
    return attended(queries, *cache.read(0))


@pytest.mark.parametrize("tokens", [17, 257, 530])
@pytest.mark.parametrize("heads", [2, 14])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_it_is_float64_s_attention(tokens: int, heads: int, kv_format: str):
    qkv = drawn(tokens, heads)
    cache = Cache(1, 544, kv_format=kv_format)
    made = cache.step([(0, qkv.clone())], heads, batch_invariant=False)
    wanted = stored(cache, qkv, heads)
    assert error(made, wanted) < BOUND
    # It is not the lanes that computed this.
    lanes = Cache(1, 544, kv_format=kv_format).step([(0, qkv.clone())], heads)
    assert not torch.equal(made, lanes)


def test_numbers_of_eight_bits_would_miss_the_bound():
    qkv = drawn(257)
    queries, keys, values = (x.bfloat16().double() for x in rotated(qkv.double()))
    assert error(attended(queries, keys, values), attended(*rotated(qkv.double()))) > 20 * BOUND


@pytest.mark.parametrize("page_tokens", [7, 64])
@pytest.mark.parametrize("cut", [40, 255, 300, 513])
def test_pages_chunks_threads_and_company_change_no_bit(page_tokens: int, cut: int):
    """As long as a chunk has queries enough for the units."""
    whole = Cache(1, 608).step([(0, drawn(600))], batch_invariant=False)
    cache, qkv = Cache(3, 700, page_tokens, seed=cut), drawn(600)
    parts = [cache.step([(2, drawn(33)), (0, qkv[:cut])], batch_invariant=False)[33:]]
    for at in range(cut, 600, 75):
        rows = qkv[at : at + 75]
        made = cache.step([(0, rows), (1, drawn(1))], threads=2, batch_invariant=False)
        parts.append(made[: len(rows)])
    assert torch.equal(torch.cat(parts), whole)


def test_few_queries_are_left_to_the_lanes():
    caches = [Cache(1, 608), Cache(1, 608)]
    made = []
    for cache, invariant in zip(caches, (True, False), strict=True):
        cache.step([(0, drawn(509))])
        made.append(cache.step([(0, drawn(2, seed=1))], batch_invariant=invariant))
    assert torch.equal(*made)


def test_what_lies_behind_the_context_is_never_felt():
    """Pages hold NaN where nobody wrote, and the tiles' last rows are whatever was there."""
    made = Cache(1, 608).step([(0, drawn(531))], batch_invariant=False)
    assert torch.isfinite(made).all() and made.shape[1] == HEADS * 64
