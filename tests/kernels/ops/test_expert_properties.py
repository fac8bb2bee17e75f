"""What must hold where rows go to experts or adapters of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.lora_batched import sgmv
from kernels.ops.moe import grouped_linear, moe_align
from tests.kernels.ops.cases import Source, grouped_case, sgmv_case
from tests.kernels.ops.measure import agree, error


def source(dtype: torch.dtype = torch.float32) -> Source:
    return Source(0, dtype)


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(-1, 4), max_size=24),
    topk=st.integers(1, 3),
    experts=st.integers(5, 7),
    block=st.sampled_from([1, 2, 3, 16]),
)
def test_alignment_keeps_every_row_once_and_mixes_no_experts(ids, topk, experts, block):
    table = torch.tensor(ids[: len(ids) // topk * topk], dtype=torch.int64).view(-1, topk)
    rows, owners, used = moe_align(table, experts, block)
    flat = table.flatten()
    filled = rows.view(-1, block)
    real = rows[rows < flat.numel()]
    assert sorted(real.tolist()) == (flat >= 0).nonzero()[:, 0].tolist()
    for at, owner in enumerate(owners.tolist()):
        mine = filled[at][filled[at] < flat.numel()]
        assert (at < used.item()) == (owner >= 0) == (len(mine) > 0)
        assert (flat[mine] == owner).all()
        # Padding stands at the end of a block.
        assert torch.equal(filled[at][: len(mine)], mine)
    assert owners[: used.item()].diff().ge(0).all()


def test_a_product_over_aligned_blocks_is_the_grouped_product():
    """As a kernel does it: one matrix for each block."""
    x, weight, ids = grouped_case(source(), 17)
    rows, owners, used = moe_align(ids[:, None], 5, 4)
    out = torch.zeros(18, 7)
    for rows_of_block, owner in zip(rows.view(-1, 4)[:used], owners[:used], strict=True):
        gathered = torch.cat((x, torch.zeros(1, 24)))[rows_of_block]
        out[rows_of_block] = gathered @ weight[owner].T
    agree(out[:17], grouped_linear(x, weight, ids).double())
    assert not out[17].any()


def test_experts_and_rows_may_stand_in_any_order():
    x, weight, ids = grouped_case(source(), 17)
    wanted = grouped_linear(x, weight, ids)
    order = torch.tensor([3, 0, 4, 2, 1])
    place = torch.empty(6, dtype=torch.int64)
    place[order], place[-1] = torch.arange(5), -1
    assert torch.equal(grouped_linear(x, weight[order], place[ids]), wanted)
    assert error(grouped_linear(x, weight[order], ids), wanted.double()).rms > 0.1
    turned = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    agree(grouped_linear(x[turned], weight, ids[turned]), wanted[turned].double())


def test_one_expert_is_a_plain_product_and_the_others_are_not_touched():
    x, weight, _ = grouped_case(source(), 17)
    weight[[0, 1, 3, 4]] = torch.nan
    agree(grouped_linear(x, weight, torch.full((17,), 2)), x.double() @ weight[2].double().T)
    assert not grouped_linear(x, weight, torch.full((17,), -1)).any()


def test_experts_without_rows_have_no_gradient():
    x, weight, ids = grouped_case(source(), 17)
    weight.requires_grad_()
    grouped_linear(x, weight, ids).sum().backward()
    assert weight.grad is not None and not weight.grad[3].any()
    assert all(weight.grad[expert].any() for expert in ids.unique().tolist() if expert >= 0)


def test_rows_without_adapter_are_zero_whatever_is_in_them():
    x, a, b, _, scaling = sgmv_case(source(), 17)
    x[:] = torch.nan
    assert torch.equal(sgmv(x, a, b, torch.full((17,), -1), scaling), torch.zeros(17, 10))
    none = a[:0], b[:0], torch.full((17,), -1), scaling[:0]
    assert torch.equal(sgmv(x, *none), torch.zeros(17, 10))


def test_adapters_are_merged_weights():
    """x (W + s B A) is x W and what the adapter adds."""
    x, a, b, adapters, scaling = sgmv_case(source(), 17)
    base = source().normal(10, 24).double()
    y = x.double() @ base.T + sgmv(x, a, b, adapters, scaling)
    for row, adapter in enumerate(adapters.tolist()):
        merged = base
        if adapter >= 0:
            merged = base + scaling[adapter].double() * (b[adapter].double() @ a[adapter].double())
        agree(y[row].float(), merged @ x[row].double())


def test_adapters_and_rows_may_stand_in_any_order():
    x, a, b, adapters, scaling = sgmv_case(source(), 17)
    wanted = sgmv(x, a, b, adapters, scaling)
    order, place = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0, -1])
    assert torch.equal(sgmv(x, a[order], b[order], place[adapters], scaling[order]), wanted)
    assert error(sgmv(x, a, b[order], adapters, scaling), wanted.double()).rms > 0.1
    turned = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    agree(sgmv(x[turned], a, b, adapters[turned], scaling), wanted[turned].double())


def test_what_lies_between_a_and_b_is_not_rounded():
    """A sum that half precision would lose: 2048 + 1 - 2048."""
    x = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    a = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=torch.float16)
    b = torch.tensor([[[1.0, -1.0]]], dtype=torch.float16)
    assert sgmv(x, a, b, torch.tensor([0]), torch.ones(1)).item() == 1


@pytest.mark.parametrize("adapter", [0, 1, 2])
def test_an_adapter_has_the_gradient_of_its_rows_only(adapter: int):
    x, a, b, adapters, scaling = sgmv_case(source(torch.float64), 17)
    mine = (adapters == adapter).nonzero()[:, 0]
    whole, part = a.clone().requires_grad_(), a.clone().requires_grad_()
    sgmv(x, whole, b, adapters, scaling).sum().backward()
    sgmv(x[mine], part, b, adapters[mine], scaling).sum().backward()
    assert whole.grad is not None and part.grad is not None
    agree(whole.grad[adapter], part.grad[adapter])
    assert bool(whole.grad[adapter].any()) == (len(mine) > 0)
