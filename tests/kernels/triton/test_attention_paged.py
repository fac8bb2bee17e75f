"""The kernels of paged attention: the oracle's results, from the pages alone that are named."""

from typing import Any

import pytest
import torch

from kernels.reference import attention_paged as reference
from kernels.triton.attention_paged import cases as shipped
from kernels.triton.attention_paged import merge_states, paged_attention, paged_attention_parts
from kernels.triton.case import Case
from kernels.triton.targets import TARGETS
from tests.kernels.ops.cases import Source, any_caches, caches
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched, whole

KINDS = ("float", "int8", "int4")


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("attention_paged"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def inputs(
    kind: str,
    pages=5,
    page_tokens=7,
    heads=2,
    width=32,
    sequences=2,
    dtype=torch.float32,
    filled=caches,
) -> list[Any]:
    """q, keys, values, key_scales, value_scales, page_tables, context_tokens: of 19 and 8."""
    cache = filled(Source(3, dtype), kind, pages, page_tokens, heads, width)
    keys, values, *scales = (each if each is None else each.to(DEVICE) for each in cache)
    tables = torch.tensor([[3, 0, 4], [1, 2, 99]], dtype=torch.int32, device=DEVICE)
    context = torch.tensor([19, 8], dtype=torch.int32, device=DEVICE)
    q = normal(sequences, 2 * heads, width, dtype=dtype)
    return [q, keys, values, *scales, tables, context]


def run(args, *settings, target="sm_80", **named):
    with watched(target):
        return paged_attention(*args, *settings, **named)


def exact(args, *settings, **named):
    """The reference in float64."""
    wide = [
        each.double() if each is not None and each.is_floating_point() else each for each in args
    ]
    return reference.paged_attention(*wide, *settings, **named)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_may_lie_anywhere(kind):
    """The same pages in another order, and the table with them: equal bits."""
    args = inputs(kind)
    wanted = run(args)
    order = torch.tensor([2, 4, 1, 0, 3], device=DEVICE)
    moved = [args[0], *(None if each is None else each[order] for each in args[1:5])]
    tables = args[5].clone()
    tables[tables < 5] = order.argsort()[tables[tables < 5].long()].int()
    assert torch.equal(run([*moved, tables, args[6]]), wanted)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_no_sequence_has_is_never_read(kind):
    """NaN in pages that no table names, and past the end of the last one; a wild table beyond."""
    args = inputs(kind)
    wanted = run(args)
    wild: list[Any] = [each if each is None else each.clone() for each in args]
    for each in wild[1:5]:
        if each is not None and each.is_floating_point():
            each[4, 5:], each[2, 1:] = torch.nan, torch.nan
    assert torch.equal(run(wild), wanted)
    alone = [wild[0][:1], *wild[1:5], wild[5][:1], wild[6][:1]]
    for each in wild[1:5]:
        if each is not None and each.is_floating_point():
            each[1:3] = torch.nan
    assert torch.equal(run(alone), wanted[:1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bytes_of_every_kind_are_read_exactly(kind):
    """Every level and any scale: scores are large, so that a wrong bit changes which key wins."""
    args = inputs(kind, width=64, filled=any_caches)
    agree(run(args), exact(args))


def test_parts_do_not_change_the_result():
    args = inputs("int8")
    wanted = exact(args)
    for splits in (1, 2, 5):
        agree(run(args, 0, splits, target="sm_75"), wanted)


def test_a_window_of_the_whole_context_is_no_window():
    args = inputs("float")
    assert torch.equal(run(args, 19), run(args))
    agree(run(args, 3, target="gfx1100"), exact(args, 3))


def test_parts_are_those_of_the_context():
    """Each part and its log-sum-exp, and more parts than tiles: zeros and -inf."""
    args = inputs("float", page_tokens=8)
    with watched():
        outs, lse = paged_attention_parts(*[*args, 0, 3])
    assert outs.dtype == lse.dtype == torch.float32
    assert (lse[2] == -torch.inf).all() and not outs[2].any()
    right, right_lse = reference.merge_states(outs.double(), lse.double())
    agree(right, exact(args), torch.float32)
    whole_lse = reference.paged_attention_parts(*args)[1][0]
    agree(right_lse, whole_lse.double(), torch.float32)


def test_merging_ignores_what_an_empty_part_holds():
    outs, lse = normal(3, 5, 3, 20), normal(3, 5, 3, seed=2)
    lse[1, :2], outs[1, :2] = -torch.inf, torch.nan
    lse[:, 2], outs[:, 2] = -torch.inf, torch.nan
    with watched():
        out, together = merge_states(outs, lse)
    wanted, right = reference.merge_states(outs.double(), lse.double())
    agree(out, wanted)
    agree(together, right)


@pytest.mark.parametrize("width", [20, 80, 33])
def test_heads_that_are_no_power_of_two(width):
    """Of any size for floats; a view of a fused projection; three query heads to a key head."""
    args = inputs("float", width=width)
    fused = normal(2, 9, width + 1)
    args[0] = fused[:, 1:7, :width]
    agree(run(args, scale=0.3), exact(args, scale=0.3))


def test_heads_of_a_larger_cache():
    """Caches with gaps between tokens are read where they are."""
    args = inputs("int8", heads=3)
    part = [args[0][:, 2:6], *(each[:, :, 1:] for each in args[1:5]), *args[5:]]
    agree(run(part), exact([each.contiguous() for each in part]))


def test_what_is_refused():
    args = inputs("float")
    with pytest.raises(ValueError, match="float16, bfloat16 or float32, not torch.float64"):
        run([args[0].double(), *args[1:]])
    large = inputs("float", width=272)
    with pytest.raises(ValueError, match="heads of up to 256 numbers, not 272"):
        run(large)
    gaps = [args[0], args[1][:, ::2], args[2], *args[3:]]
    with pytest.raises(ValueError, match="pages of keys should follow one another"):
        run(gaps)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_form_ships(target):
    names = {case.name for case in shipped(target) if isinstance(case, Case)}
    for kind in KINDS:
        assert any(f"-{kind}-128" in name for name in names), kind


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_contexts_of_real_models(kind, width):
    """Several tiles of tokens in every part, in each way the kernel is built."""
    for target in ("sm_80", "sm_75", "gfx1100"):
        for dtype in (torch.float32, torch.bfloat16):
            args = inputs(kind, pages=9, page_tokens=16, width=width, dtype=dtype)
            args[5] = whole(0, 9, 2, 9, dtype=torch.int32)
            args[6] = torch.tensor([137, 64], dtype=torch.int32, device=DEVICE)
            agree(run(args, 0, 2, target=target), exact(args))
