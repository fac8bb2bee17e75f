"""The kernel of prefill attention: the oracle's results, and no sequence that knows of another."""

import pytest
import torch

from kernels.reference import attention_prefill as reference
from kernels.triton.attention_prefill import prefill_attention
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("attention_prefill"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def inputs(lengths, heads=2, width=16, dtype=torch.float32):
    """Views of a fused projection, two query heads to a key head, and where sequences begin."""
    fused = normal(sum(lengths), heads * 2, width + 2, dtype=dtype)[..., 1:-1]
    q, k, v = fused.split([heads, heads // 2, heads // 2], dim=1)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(DEVICE)
    return q, k, v, starts


def run(args, *settings, target="sm_80", **named):
    with watched(target):
        return prefill_attention(*args, *settings, **named)


def exact(args, *settings, **named):
    """The reference in float64."""
    q, k, v, starts = args
    wide = q.double(), k.double(), v.double()
    return reference.prefill_attention(*wide, starts, *settings, **named)


SETTINGS = [
    (True, 0, 0),
    (False, 0, 0),
    (True, 40, 0),
    (True, 20, 66),
    (True, 16, 3),
    (False, 20, 90),
    (False, 1, 0),
    (True, 64, 64),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_windows_and_sinks_across_tiles(settings):
    """A sequence of several tiles of queries and keys, behind a short one."""
    args = inputs((3, 90))
    agree(run(args, *settings), exact(args, *settings))


@pytest.mark.parametrize("target", ["sm_75", "gfx1100"])
def test_tiles_without_matrix_units(target):
    args = inputs((21,), width=40)
    agree(run(args, True, 7, 2, 0.2, target=target), exact(args, True, 7, 2, 0.2))


def test_lengths_at_the_edges_of_tiles():
    """Programs are found for every sequence, whatever tile it begins in."""
    lengths = (64, 1, 0, 63, 0, 2)
    args = inputs(lengths)
    agree(run(args), exact(args))


def test_a_sequence_is_the_same_beside_others():
    q, k, v, starts = inputs((30, 17, 5))
    together = run((q, k, v, starts))
    only = torch.tensor([30, 47], dtype=torch.int32, device=DEVICE)
    for each in (q, k, v):
        each[:30], each[47:] = torch.nan, torch.nan
    alone = run((q, k, v, only))
    assert torch.equal(alone[30:47], together[30:47])
    assert not alone[:30].any() and not alone[47:].any()


def test_a_window_of_everything_is_no_window():
    args = inputs((66,))
    plain = run(args)
    assert torch.equal(run(args, True, 66), plain) and torch.equal(run(args, True, 1, 66), plain)


def test_without_sequences_or_heads_of_another_size():
    q, k, v, starts = inputs((4,), width=33)
    assert not run((q, k, v, starts[:1])).any()
    agree(run((q, k, v, starts)), exact((q, k, v, starts)))
    with pytest.raises(ValueError, match="heads of up to 256 numbers, not 264"):
        run(inputs((4,), width=264))
    with pytest.raises(ValueError, match="not torch.float64"):
        run((q.double(), k.double(), v.double(), starts))


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
def test_heads_of_real_models(width):
    for target in ("sm_80", "sm_90", "sm_75", "gfx1100"):
        for dtype in (torch.float32, torch.bfloat16):
            args = inputs((5, 150), width=width, dtype=dtype)
            agree(run(args, True, 50, 4, target=target), exact(args, True, 50, 4))
