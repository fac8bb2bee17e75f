"""The kernel of block-sparse attention: the oracle's results, of the blocks that are asked for."""

import pytest
import torch

from kernels.reference import attention_sparse as reference
from kernels.triton.attention_prefill import prefill_attention
from kernels.triton.attention_sparse import block_sparse_attention
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched, whole


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("attention_sparse"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def inputs(tokens, block, heads=2, width=16):
    fused = normal(tokens, heads * 2, width)
    q, k, v = fused.split([heads, heads // 2, heads // 2], dim=1)
    blocks = -(-tokens // block)
    return q, k, v, whole(0, 2, heads, blocks, blocks).bool(), block


def run(args, *settings, target="sm_80"):
    with watched(target):
        return block_sparse_attention(*args, *settings)


def exact(args, *settings):
    q, k, v, *rest = args
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), *rest, *settings)


@pytest.mark.parametrize(
    ("tokens", "block", "target", "causal"),
    [
        (50, 12, "sm_80", True),
        (70, 33, "sm_80", False),
        (90, 70, "sm_80", True),
        (40, 20, "sm_75", False),
        (40, 20, "gfx1100", True),
    ],
)
def test_blocks_smaller_and_larger_than_a_tile(tokens, block, target, causal):
    args = inputs(tokens, block)
    agree(run(args, causal, 0.2, target=target), exact(args, causal, 0.2))


def test_all_blocks_are_plain_attention():
    q, k, v, mask, block = inputs(70, 16)
    starts = torch.tensor([0, 70], dtype=torch.int32, device=DEVICE)
    with watched():
        wanted = prefill_attention(q, k, v, starts)
    agree(run((q, k, v, torch.ones_like(mask), block)), wanted)


def test_what_is_left_out_is_not_read():
    """NaN in keys of blocks that no query reads; queries that read nothing give zeros."""
    q, k, v, mask, block = inputs(40, 16)
    mask[:, :, 1] = False
    mask[:, 2] = False
    wanted = run((q, k, v, mask, block))
    k, v = k.clone(), v.clone()
    k[16:32], v[16:32] = torch.nan, torch.nan
    assert torch.equal(run((q, k, v, mask, block)), wanted)
    assert not wanted[32:].any() and wanted[:16].any()


def test_blocks_of_keys_may_stand_anywhere():
    q, k, v, mask, block = inputs(48, 16)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    moved = [each.view(3, 16, *each.shape[1:])[order].flatten(0, 1) for each in (k, v)]
    agree(run((q, *moved, mask[:, :, order], block), False), run((q, k, v, mask, block), False))
