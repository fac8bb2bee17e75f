"""The kernels of experts: the very alignment of the reference, products that never mix experts."""

import pytest
import torch

from kernels.reference import moe as reference
from kernels.triton.moe import grouped_linear, moe_align
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched, whole


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("moe"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "block"), [(1, 1, 1), (40, 7, 16), (700, 3, 1), (1200, 5, 32)]
)
def test_alignment_is_the_references(tokens, experts, block):
    """More tokens than a chunk, more blocks than a chunk, an expert without any, ids of -1."""
    ids = whole(-1, experts, tokens, 2)
    ids[ids == 1] = 0
    with watched():
        mine = moe_align(ids, experts, block)
        narrow = moe_align(ids.int(), experts, block)
    for got, small, wanted in zip(
        mine, narrow, reference.moe_align(ids, experts, block), strict=True
    ):
        assert torch.equal(got, wanted) and torch.equal(small, wanted)


def inputs(rows=70, n=150, k=90, dtype=torch.float32):
    ids = whole(-1, 4, rows)
    ids[ids == 2] = 3
    return normal(rows, k, dtype=dtype), normal(4, n, k, dtype=dtype, seed=2), ids


def run(args, target="sm_80"):
    with watched(target):
        return grouped_linear(*args)


@pytest.mark.parametrize(
    ("target", "shape"),
    [("sm_80", (70, 150, 90)), ("sm_75", (20, 40, 40)), ("gfx1100", (20, 40, 40))],
)
def test_several_tiles(target, shape):
    x, weight, ids = inputs(*shape)
    wanted = reference.grouped_linear(x.double(), weight.double(), ids)
    agree(run((x, weight, ids), target), wanted)
    half = run((x.bfloat16(), weight.bfloat16(), ids), target)
    rounded = x.bfloat16().double(), weight.bfloat16().double()
    agree(half, reference.grouped_linear(*rounded, ids))


def test_experts_may_stand_anywhere():
    x, weight, ids = inputs(20, 40)
    order = torch.tensor([3, 1, 0, 2], device=DEVICE)
    moved = torch.where(ids < 0, ids, order.argsort()[ids.clamp(min=0)])
    assert torch.equal(run((x, weight[order], moved)), run((x, weight, ids)))


def test_an_expert_without_rows_is_not_read():
    x, weight, ids = inputs(20, 40)
    wanted = run((x, weight, ids))
    weight[2] = torch.nan
    x = torch.where((ids < 0)[:, None], torch.nan, x)
    got = run((x, weight, ids))
    assert torch.equal(got, wanted) and not got[ids < 0].any()


def test_views_and_transposed_weights():
    x, weight, ids = inputs(12, 24, 40)
    wide = torch.cat((x, x), dim=1)[:, 10:50]
    wanted = reference.grouped_linear(wide.double(), weight.double(), ids)
    agree(run((wide, weight.transpose(1, 2).contiguous().transpose(1, 2), ids)), wanted)
