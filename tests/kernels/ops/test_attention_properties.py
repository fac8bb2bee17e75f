"""What must hold of attention and its cache: order, padding, windows, parts, what is never read."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.ops.attention_paged import merge_states, paged_attention
from kernels.ops.attention_prefill import prefill_attention
from kernels.ops.attention_sparse import block_sparse_attention
from kernels.ops.kv_cache import kv_write, read_cache
from kernels.reference import attention_paged as reference
from tests.kernels.ops.cases import PAGE, Source, caches
from tests.kernels.ops.measure import agree, error

KINDS = ("float", "int8", "int4")


def prompt(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = Source(seed, torch.float32)
    return s.normal(tokens, 4, 32), s.normal(tokens, 2, 32), s.normal(tokens, 2, 32)


def bounds(*cuts: int) -> torch.Tensor:
    return torch.tensor(cuts, dtype=torch.int32)


def alone(q, k, v, *settings) -> torch.Tensor:
    return prefill_attention(q, k, v, bounds(0, q.shape[0]), *settings)


@pytest.mark.parametrize("causal", [True, False])
def test_one_sequence_is_what_torch_computes(causal: bool):
    q, k, v = (each.double().transpose(0, 1) for each in prompt(13))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    ours = alone(*(each.transpose(0, 1) for each in (q, k, v)), causal)
    agree(ours, wanted.transpose(0, 1))


def test_sequences_side_by_side_do_not_meet():
    """Each gives what it gives alone, in any order, whatever is in the rows of none."""
    q, k, v = prompt(12)
    q[10:], k[10:], v[10:] = torch.nan, torch.nan, torch.nan
    parts = [slice(0, 3), slice(3, 4), slice(4, 10)]
    together = prefill_attention(q, k, v, bounds(0, 3, 3, 4, 10))
    single = [alone(q[part], k[part], v[part]) for part in parts]
    agree(together[:10], torch.cat(single).double())
    assert not together[10:].any()
    turned = torch.cat([torch.arange(12)[part] for part in reversed(parts)])
    backwards = prefill_attention(q[turned], k[turned], v[turned], bounds(0, 6, 7, 10))
    agree(backwards, torch.cat(single[::-1]).double())


def test_what_comes_later_is_not_seen():
    q, k, v = prompt(9)
    before = alone(q, k, v)[:6]
    k[6:], v[6:] = torch.nan, torch.inf
    assert torch.isfinite(before).all()
    agree(alone(q[:6], k[:6], v[:6]), before.double())


def test_a_window_of_the_whole_is_no_window():
    q, k, v = prompt(9)
    full = alone(q, k, v)
    for window, sinks in ((9, 0), (50, 0), (7, 2), (1, 9)):
        assert torch.equal(alone(q, k, v, True, window, sinks), full)
    for window, sinks in ((8, 0), (6, 2)):
        assert not torch.allclose(alone(q, k, v, True, window, sinks)[8], full[8], atol=1e-3)


def test_a_window_of_one_sees_itself():
    q, k, v = prompt(9)
    agree(alone(q, k, v, True, 1), v.double().repeat_interleave(2, dim=1))
    agree(alone(q, k, v, False, 1), v.double().repeat_interleave(2, dim=1))


def test_a_full_mask_of_blocks_is_plain_attention():
    q, k, v = prompt(9)
    full = torch.ones(4, 3, 3, dtype=torch.bool)
    for causal in (True, False):
        agree(block_sparse_attention(q, k, v, full, 4, causal), alone(q, k, v, causal).double())
    # Blocks of one token can spell out a window.
    near = (torch.arange(9)[:, None] - torch.arange(9)).abs() < 3
    windowed = block_sparse_attention(q, k, v, near.expand(4, 9, 9), 1)
    agree(windowed, alone(q, k, v, True, 3).double())


def test_rows_that_see_no_block_are_zero():
    q, k, v = prompt(9)
    mask = torch.ones(4, 3, 3, dtype=torch.bool)
    mask[2, 1] = False
    out = block_sparse_attention(q, k, v, mask, 4)
    assert not out[4:8, 2].any() and out[4:8, 1].all() and out[8, 2].all()
    # Only what lies ahead: causal rows see nothing of it.
    mask[:] = torch.triu(torch.ones(3, 3), 1).bool()
    assert not block_sparse_attention(q, k, v, mask, 4).any()


def filled(kind: str, seed: int = 0) -> dict[str, Any]:
    """Five sequences at the edges of pages, on pages that nobody shares."""
    s = Source(seed, torch.float32)
    names = ("keys", "values", "key_scales", "value_scales")
    made: dict[str, Any] = dict(zip(names, caches(s, kind, 16, PAGE, 2, 32), strict=True))
    made["q"] = s.normal(5, 4, 32)
    made["page_tables"] = torch.randperm(16, generator=s.chance)[:15].view(5, 3).int()
    made["context_tokens"] = torch.tensor(
        [PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 1], dtype=torch.int32
    )
    return made


def moved(cache: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    return None if cache is None else cache[order]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_may_lie_anywhere(kind: str):
    made = filled(kind)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    place = torch.empty(16, dtype=torch.int32)
    place[order] = torch.arange(16, dtype=torch.int32)
    names = ("keys", "values", "key_scales", "value_scales")
    shuffled = made | {name: moved(made[name], order) for name in names}
    wanted = paged_attention(**made)
    assert not torch.equal(paged_attention(**shuffled), wanted)
    shuffled["page_tables"] = place[made["page_tables"].long()]
    assert torch.equal(paged_attention(**shuffled), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_may_come_in_any_order(kind: str):
    made = filled(kind)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = {name: made[name][order] for name in ("q", "page_tables", "context_tokens")}
    assert torch.equal(paged_attention(**made | turned), paged_attention(**made)[order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, PAGE + 2])
def test_parts_join_to_the_whole(kind: str, window: int):
    made = filled(kind) | {"window": window}
    whole = paged_attention(**made).double()
    for splits in (2, 3, 7, 40):
        agree(paged_attention(**made, splits=splits), whole)


def test_a_part_that_is_lost_is_seen(monkeypatch):
    made = filled("float")
    whole = paged_attention(**made).double()
    parts = reference.paged_attention_parts

    def losing(*args):
        outs, lse = parts(*args)
        lse[-1] = -torch.inf
        return outs, lse

    monkeypatch.setattr(reference, "paged_attention_parts", losing)
    assert error(paged_attention(**made, splits=3), whole).rms > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_the_context_is_no_window(kind: str):
    made = filled(kind)
    full = paged_attention(**made)
    assert torch.equal(paged_attention(**made, window=3 * PAGE), full)
    assert not torch.allclose(paged_attention(**made, window=3 * PAGE - 1)[3], full[3], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, PAGE])
def test_what_is_not_in_a_context_is_never_read(kind: str, window: int):
    """NaN in pages of nobody, behind the last token and before the window; tables end in numbers
    that name no page."""
    made = filled(kind) | {"window": window}
    wanted = paged_attention(**made, splits=2)
    used = torch.zeros(16, PAGE, dtype=torch.bool)
    for row, context in enumerate(made["context_tokens"].tolist()):
        for token in range(max(0, context - window) if window else 0, context):
            used[made["page_tables"][row, token // PAGE], token % PAGE] = True
        made["page_tables"][row, -(-context // PAGE) :] = 10**6
    spoilt = ("keys", "values") if kind == "float" else ("key_scales", "value_scales")
    for name in spoilt:
        made[name][~used] = torch.nan
    assert torch.equal(paged_attention(**made, splits=2), wanted)
    # That NaN would be seen: one token more is read.
    made["context_tokens"][0] += 1
    assert paged_attention(**made, splits=2)[0].isnan().any()


def test_sequences_without_tokens_are_zero_and_change_nothing():
    made = filled("float")
    wanted = paged_attention(**made)
    made["q"] = torch.cat((made["q"], torch.full((3, 4, 32), torch.nan)))
    made["context_tokens"] = torch.cat((made["context_tokens"], bounds(0, 0, 0)))
    made["page_tables"] = torch.cat((made["page_tables"], torch.full((3, 3), -1).int()))
    out = paged_attention(**made)
    assert torch.equal(out[:5], wanted) and not out[5:].any()


@pytest.mark.parametrize("kind,bound", [("float", 1e-6), ("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_a_written_prompt_is_read_as_prefill_reads_it(kind: str, bound: float, tokens: int):
    q, k, v = prompt(tokens)
    names = ("keys", "values", "key_scales", "value_scales")
    empty = caches(Source(1, torch.float32), kind, 5, PAGE, 2, 32)
    cache: dict[str, Any] = dict(zip(names, empty, strict=True))
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    places = torch.arange(tokens)
    slots = table[0, places // PAGE].long() * PAGE + places % PAGE
    kv_write(k, v, slots, *cache.values())
    context = torch.tensor([tokens], dtype=torch.int32)
    out = paged_attention(q[-1:], **cache, page_tables=table, context_tokens=context)
    assert error(out, alone(q, k, v)[-1:].double()).rms <= bound
    cache["keys"].zero_()
    assert (
        tokens == 1
        or error(
            paged_attention(q[-1:], **cache, page_tables=table, context_tokens=context),
            alone(q, k, v)[-1:].double(),
        ).rms
        > 1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_touches_its_slots_only_and_is_the_same_in_any_company(kind: str):
    s = Source(2, torch.float32)
    cache = caches(s, kind, 4, PAGE, 2, 64)
    before: tuple[Any, ...] = tuple(each if each is None else each.clone() for each in cache)
    k, v = s.normal(6, 2, 64), s.normal(6, 2, 64)
    slots = torch.tensor([5, -1, 31, 0, 17, -1])
    kv_write(k, v, slots, *cache)
    untouched = torch.ones(4 * PAGE, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    for now, then in zip(cache, before, strict=True):
        if now is not None and then is not None:
            flat, old = now.flatten(0, 1), then.flatten(0, 1)
            assert torch.equal(flat[untouched], old[untouched])
    for token in reversed(range(6)):
        kv_write(k[token : token + 1], v[token : token + 1], slots[token : token + 1], *before)
    for now, then in zip(cache, before, strict=True):
        assert now is then is None or torch.equal(now, then)


@pytest.mark.parametrize("kind", KINDS)
def test_written_numbers_are_within_half_a_step(kind: str):
    s = Source(3, torch.float32)
    keys, values, key_scales, value_scales = caches(s, kind, 2, PAGE, 2, 64)
    k = s.normal(16, 2, 64) * 3
    kv_write(k, k, torch.arange(16), keys, values, key_scales, value_scales)
    off = (read_cache(keys, key_scales).view(16, 2, 64) - k).abs()
    if kind == "float":
        assert not off.any()
    elif kind == "int8":
        assert (off <= key_scales.view(16, 2, 1) * 0.5001).all()
    else:
        # One level more on one side of zero: a number as far out on the other loses up to a step.
        steps = key_scales.view(16, 2, 2, 1).float().abs()
        off, groups = (each.view(16, 2, 2, 32) for each in (off, k))
        assert (off <= steps * 1.01).all()
        assert (off <= steps * 0.51)[groups.abs() <= 15.4 * steps].all()
        assert ((off > steps * 0.51).sum((1, 2, 3)) <= 4).all()


def test_states_are_merged_in_any_grouping():
    s = Source(4, torch.float64)
    outs, lse = s.normal(4, 3, 2, 8), s.normal(4, 3, 2)
    whole, total = merge_states(outs, lse)
    pairs = [merge_states(outs[at : at + 2], lse[at : at + 2]) for at in (0, 2)]
    joined, sums = merge_states(*(torch.stack(each) for each in zip(*pairs, strict=True)))
    agree(joined, whole)
    agree(sums, total)
    one, same = merge_states(outs[:1], lse[:1])
    assert torch.equal(one, outs[0]) and torch.equal(same, lse[0])
    outs[1], lse[1] = torch.nan, -torch.inf
    agree(merge_states(outs, lse)[0], merge_states(outs[[0, 2, 3]], lse[[0, 2, 3]])[0])
