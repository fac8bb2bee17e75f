"""`prefill_attention` with `key_starts`: prompts in chunks see what whole ones do."""

import pytest
import torch

from kernels.ops.attention_prefill import prefill_attention as op
from kernels.reference.attention_prefill import prefill_attention as reference
from kernels.triton.attention_prefill import prefill_attention
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, normal, watched

HEADS, KV_HEADS, WIDTH = 4, 2, 32
LENGTHS = (37, 5, 64, 1)  # whole sequences
TAILS = (6, 5, 33, 1)  # of which so many tokens are queries


def starts(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)


def tails(x: torch.Tensor) -> torch.Tensor:
    parts = zip(x.split(list(LENGTHS)), TAILS, strict=True)
    return torch.cat([part[len(part) - tail :] for part, tail in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window,sink_tokens", [(0, 0), (7, 0), (9, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_last_tokens_of_sequences(
    dtype: torch.dtype, window: int, sink_tokens: int, causal: bool
):
    """The oracle attends to whole sequences, in float64, and knows nothing of chunks."""
    total = sum(LENGTHS)
    q = normal(total, HEADS, WIDTH, dtype=dtype)
    k, v = (normal(total, KV_HEADS, WIDTH, dtype=dtype, seed=seed) for seed in (2, 3))
    q64, k64, v64 = (each.double().cpu() for each in (q, k, v))
    how = (causal, window, sink_tokens)
    wanted = tails(reference(q64, k64, v64, starts(LENGTHS).cpu(), *how)).to(DEVICE)
    chunk = tails(q)
    places = (starts(TAILS), *how, None, starts(LENGTHS))
    with watched():
        agree(prefill_attention(chunk, k, v, *places), wanted)
    agree(op(chunk, k, v, *places), wanted)


def test_where_keys_begin_matters():
    """Queries that are taken for the first tokens see fewer keys, and differ."""
    q = normal(6, HEADS, WIDTH)
    k, v = (normal(37, KV_HEADS, WIDTH, seed=seed) for seed in (2, 3))
    right = op(q, k, v, starts((6,)), key_starts=starts((37,)))
    first = op(q, k[:6], v[:6], starts((6,)))
    assert (right - first).abs().max() > 0.1


def test_key_starts_are_for_the_same_sequences():
    q, k = normal(6, HEADS, WIDTH), normal(37, KV_HEADS, WIDTH)
    with pytest.raises(ValueError, match=r"key_starts should be \[2\], not \[3\]"):
        op(q, k, k, starts((6,)), key_starts=starts((30, 7)))
    with pytest.raises(ValueError, match=r"k should be \[6, 2, 32\]"):
        op(q, k, k, starts((6,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_before_the_first_and_sequences_of_no_rows(dtype: torch.dtype):
    """As a step of a fixed size has them: zeros for rows of nobody, beside keys of nobody."""
    before, behind, empty = 3, 150, 4
    total = sum(LENGTHS)
    q = normal(total, HEADS, WIDTH, dtype=dtype)
    k, v = (normal(total, KV_HEADS, WIDTH, dtype=dtype, seed=seed) for seed in (2, 3))
    chunk = tails(q)
    rows = torch.cat((q[:before], chunk, normal(behind, HEADS, WIDTH, dtype=dtype, seed=4)))
    queries, keys = starts(TAILS) + before, starts(LENGTHS)
    queries, keys = (torch.cat((each, each[-1:].expand(empty))) for each in (queries, keys))
    nobody = torch.full((9, KV_HEADS, WIDTH), 1e4, device=DEVICE).to(dtype)
    k_more, v_more = torch.cat((k, nobody)), torch.cat((v, nobody))
    with watched():
        got = prefill_attention(rows, k_more, v_more, queries, key_starts=keys)
        plain = prefill_attention(chunk, k, v, starts(TAILS), key_starts=starts(LENGTHS))
    assert torch.equal(got[before : before + len(chunk)], plain)
    assert not got[:before].any() and not got[before + len(chunk) :].any()
    agree(reference(rows, k_more, v_more, queries, key_starts=keys), got.double())
