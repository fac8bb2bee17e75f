"""Attention of the CPU kernels against float64, and against itself: in other pages, chunks,
company, threads and instruction sets, over contexts of several parts."""

import pytest
import torch

from kernels.cpu import ops
from tests.kernels.caches import DIM, HEADS, Cache, angles_of, attended, drawn, rotated


def exactly(qkv: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """In float64 from the start, rotation included."""
    return attended(*rotated(qkv.double(), heads))


@pytest.mark.parametrize("tokens", [0, 1, 17, 256, 257, 530])
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_it_is_float64_s_attention(tokens: int, heads: int):
    qkv = drawn(tokens, heads)
    made = Cache(1, 544).step([(0, qkv)], heads)
    assert made.shape == (tokens, heads * DIM)
    assert torch.allclose(made.double(), exactly(qkv, heads), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return Cache(1, 608).step([(0, drawn(600))])


@pytest.mark.parametrize("page_tokens", [1, 7, 16, 64, 256])
@pytest.mark.parametrize("cut", [1, 255, 256, 300, 513])
def test_pages_chunks_and_company_change_no_bit(whole: torch.Tensor, page_tokens: int, cut: int):
    cache, qkv = Cache(3, 700, page_tokens, seed=cut), drawn(600)
    other = drawn(700, seed=1)
    cache.step([(1, other[:300])])
    parts = [cache.step([(2, other[:3]), (0, qkv[:cut])])[3:]]
    for at in range(cut, 600, 37):
        made = cache.step([(0, qkv[at : at + 37]), (1, other[300 + at % 99 :][:1])], threads=2)
        parts.append(made[: len(qkv[at : at + 37])])
    assert torch.equal(torch.cat(parts), whole)


def test_one_row_at_a_time_is_the_same(whole: torch.Tensor):
    """A single row's parts are apart, and merged in a phase of their own."""
    cache, qkv = Cache(2, 608), drawn(600)
    cache.step([(0, qkv[:509]), (1, qkv[:509])])
    for at in range(509, 519):
        made = cache.step([(0, qkv[at : at + 1]), (1, qkv[at : at + 1])])
        assert torch.equal(made, whole[[at, at]])


@pytest.mark.parametrize("isa", ops.instruction_sets())
def test_instruction_sets_and_threads_change_no_bit(whole: torch.Tensor, isa: str):
    for threads in (1, 2, 3):
        cache, qkv = Cache(1, 608), drawn(600)
        made = [
            cache.step([(0, part)], threads=threads, isa=isa) for part in qkv.split([520, 3, 77])
        ]
        assert torch.equal(torch.cat(made), whole), threads


def test_positions_that_do_not_follow_are_rows_of_their_own(whole: torch.Tensor):
    """Nothing says that a step's rows of one sequence are neighbours."""
    cache, qkv = Cache(1, 608), drawn(600)
    cache.step([(0, qkv)])
    chosen = torch.tensor([590, 3, 4, 300, 299])
    angles = angles_of(chosen)
    slots = cache.tables[0, chosen // 16] * 16 + chosen % 16
    step = ops.LayerStep(
        chosen, slots, torch.zeros_like(chosen), cache.tables, angles.cos(), angles.sin()
    )
    assert torch.equal(ops.attention(qkv[chosen], cache.kv, HEADS, step), whole[chosen])


def test_scores_of_any_size_stay_finite():
    """Large ones in one part, small ones in the next: the merge takes the largest of both."""
    qkv = drawn(520)
    qkv[:256] *= 6
    qkv[300:] *= 1e-20
    made = Cache(1, 528).step([(0, qkv)])
    assert torch.allclose(made.double(), exactly(qkv), rtol=1e-3, atol=1e-3)


def test_opcheck():
    cache, rows = Cache(1, 32), drawn(3)
    place = torch.arange(3)
    angles = torch.zeros(3, DIM // 2)
    cache.kv.zero_()
    of = (place, place, torch.zeros_like(place), cache.tables, angles.cos(), angles.sin())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops._ops().attention, (rows, cache.kv, HEADS, *of, 1, "auto"), test_utils=tests
    )


def test_refusals():
    cache = Cache(1, 16)
    with pytest.raises(ValueError, match="qkv should be"):
        cache.step([(0, drawn(2))], heads=2)
    slot, far = torch.tensor([0]), torch.tensor([16])
    step = ops.LayerStep(far, slot, slot, cache.tables, *torch.zeros(2, 1, DIM // 2))
    with pytest.raises(IndexError, match="position 16 is in no page of its table"):
        ops.attention(drawn(1), cache.kv, HEADS, step)
