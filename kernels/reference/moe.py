"""Mixture-of-experts products without dropped tokens (MegaBlocks, Gale et al., 2022).

`moe_align` sorts routed tokens by expert into blocks that never mix two experts, which is the order
a kernel works in. `grouped_linear` is the product itself, `grouped_outer` its weight gradient.
"""

from typing import NamedTuple

import torch

from kernels.reference.precision import wide


class Alignment(NamedTuple):
    """rows int64 [blocks * block]: flat indices into [T * topk], T * topk where a block is padded.
    block_expert int64 [blocks]: -1 for blocks past the used ones. used_blocks int64 [1]."""

    rows: torch.Tensor
    block_expert: torch.Tensor
    used_blocks: torch.Tensor


def aligned_blocks(routed: int, experts: int, block: int) -> int:
    """How many blocks hold `routed` tokens at worst: every expert in use leaves one unfilled."""
    return (routed + min(experts, routed) * (block - 1)) // block


def moe_align(expert_ids: torch.Tensor, experts: int, block: int) -> Alignment:
    """expert_ids [T, topk] int -> the blocks of `Alignment`, of a size that depends on shapes only.

    Experts come in order, and within one its tokens in order of their flat index. An id of -1 (an
    expert that is held elsewhere) is left out.
    """
    flat = expert_ids.reshape(-1).long()
    routed = flat.numel()
    blocks = aligned_blocks(routed, experts, block)
    rows = torch.full((blocks * block,), routed, dtype=torch.int64, device=flat.device)
    block_expert = torch.full((blocks,), -1, dtype=torch.int64, device=flat.device)
    used = 0
    for expert in range(experts):
        mine = (flat == expert).nonzero()[:, 0]
        taken = -(-len(mine) // block)
        rows[used * block : used * block + len(mine)] = mine
        block_expert[used : used + taken] = expert
        used += taken
    return Alignment(rows, block_expert, torch.tensor([used], device=flat.device))


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """x [R, K], weight [E, N, K], expert_ids [R] int -> [R, N]: row r times the transposed weight
    of its expert. A row with expert -1 gives zeros."""
    exact = wide(x)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        rows = (expert_ids == expert).nonzero()[:, 0]
        out[rows] = (x[rows].to(exact) @ weight[expert].to(exact).T).to(x.dtype)
    return out


def grouped_outer(
    left: torch.Tensor, right: torch.Tensor, expert_ids: torch.Tensor, experts: int
) -> torch.Tensor:
    """left [R, N], right [R, K], expert_ids [R] int -> [E, N, K]: the sum of an expert's outer
    products, zeros for one without rows. Summed in float32, of right's dtype."""
    exact = wide(left, right)
    out = right.new_zeros(experts, left.shape[1], right.shape[1])
    for expert in range(experts):
        rows = (expert_ids == expert).nonzero()[:, 0]
        out[expert] = (left[rows].to(exact).T @ right[rows].to(exact)).to(right.dtype)
    return out
