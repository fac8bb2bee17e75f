"""Quantised KV caches of the CPU kernels: what is stored, bit for bit; what attention makes of it,
against float64 over the decoded numbers; and that nothing around a row changes it."""

import pytest
import torch

from kernels.cpu import ops
from tests.kernels.caches import (
    DIM,
    HEADS,
    KV_HEADS,
    Cache,
    attended,
    decoded,
    drawn,
    encoded,
    rotated,
    spread,
)

FORMATS = ("float16", "int8", "int4")


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("isa", ops.instruction_sets())
def test_what_is_stored_is_what_the_format_says(kv_format: str, isa: str):
    qkv = drawn(40)
    qkv[3] = 0
    qkv[4] *= 1e-6
    qkv[5] *= 1e-42  # scales that are no normal numbers, or none
    qkv[6] *= 3e4  # beyond the halves
    qkv[7] = qkv[7].abs()
    qkv[8] = 3.7  # no range
    cache = Cache(1, 48, kv_format=kv_format)
    cache.step([(0, qkv.clone())], isa=isa)
    flat = cache.kv.flatten(1, 2)[:, cache.slots(0, 0, 40)]
    _, keys, values = rotated(qkv)
    wanted = torch.stack((keys, values))
    wanted = encoded(spread(wanted) if kv_format == "int4" else wanted, kv_format)
    assert torch.equal(flat.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_round_trip_loses_half_a_step(kv_format: str):
    x = drawn(50).view(2, -1, 2, 32)
    made = decoded(encoded(x.flatten(2), kv_format), kv_format).view_as(x)
    if kv_format == "float16":
        half_step = x.abs() * 2**-11
    elif kv_format == "int8":
        half_step = x.abs().amax((2, 3), keepdim=True) / 254
    else:  # of keys and of values, in root mean square: what is far out may be cut for the others
        half_step = x.abs().amax(3, keepdim=True) / torch.tensor([32, 16]).view(2, 1, 1, 1)
    lost = (made - x).abs() / half_step
    if kv_format == "int4":  # 1/sqrt(3) without the fit
        assert all(0.3 < each.square().mean().sqrt() < 0.57 for each in lost)
    else:
        assert 0.85 < lost.max() <= 1.0001


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 17, 256, 300])
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_it_is_float64_s_attention_over_what_is_stored(kv_format: str, tokens: int, heads: int):
    qkv, cache = drawn(tokens, heads), Cache(1, 304, kv_format=kv_format)
    made = cache.step([(0, qkv)], heads)
    queries, _, _ = rotated(drawn(tokens, heads).double(), heads)
    wanted = attended(queries, *cache.read(0))
    assert torch.allclose(made.double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_nothing_around_a_row_changes_a_bit(kv_format: str):
    qkv, other = drawn(530), drawn(530, seed=1)
    whole = Cache(1, 544, kv_format=kv_format).step([(0, qkv.clone())])
    for page_tokens, cut in ((1, 1), (7, 255), (16, 300), (256, 513)):
        cache = Cache(2, 544, page_tokens, seed=cut, kv_format=kv_format)
        made = [cache.step([(1, other[:2].clone()), (0, qkv[:cut].clone())])[2:]]
        for at in range(cut, 530, 97):
            part = qkv[at : at + 97].clone()
            made.append(
                cache.step([(0, part), (1, other[at:][:1].clone())], threads=2)[: len(part)]
            )
        assert torch.equal(torch.cat(made), whole), (page_tokens, cut)
    for isa in ops.instruction_sets():
        cache = Cache(1, 544, kv_format=kv_format)
        made = [
            cache.step([(0, part.clone())], isa=isa, threads=threads)
            for threads, part in enumerate(qkv.split([270, 1, 259]), 1)
        ]
        assert torch.equal(torch.cat(made), whole), isa


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_page_may_be_anywhere(kv_format: str):
    """The same pages in another order of memory give the same rows."""
    qkv, made = drawn(70), []
    for seed in range(3):
        cache = Cache(3, 70, 8, seed=seed, kv_format=kv_format)
        cache.step([(2, qkv[:69].clone())])
        made.append(cache.step([(2, qkv[69:].clone())]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_a_cache_of_no_format_is_refused():
    cache = Cache(1, 16, kv_format="int8")
    cache.kv = torch.zeros(2, 1, 16, KV_HEADS, DIM + 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="with 69 elements is no cache of heads of 64 values"):
        cache.step([(0, drawn(1))], HEADS)
