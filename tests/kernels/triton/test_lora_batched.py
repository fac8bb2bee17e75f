"""The kernels of batched adapters: each row its own, and rows without one exactly zero."""

import pytest
import torch

from kernels.reference import lora_batched as reference
from kernels.triton.lora_batched import sgmv
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("lora_batched"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def inputs(rank=8, columns=40, width=50, dtype=torch.float32):
    """x, a, b, adapters, scaling: four adapters, the second unused, rows without any."""
    adapters = torch.tensor([3, -1, 0, 0, 2, 3, -1, 3, 2], device=DEVICE)
    x, a = normal(9, columns, dtype=dtype), normal(4, rank, columns, dtype=dtype, seed=2)
    b, scaling = normal(4, width, rank, dtype=dtype, seed=3), normal(4, seed=4)
    return [x, a, b, adapters, scaling]


def run(args, target="sm_80"):
    with watched(target):
        return sgmv(*args)


def exact(args):
    """The reference in float64."""
    return reference.sgmv(*(each.double() if each.is_floating_point() else each for each in args))


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_80", torch.float32),
        ("sm_80", torch.bfloat16),
        ("sm_75", torch.bfloat16),
        ("gfx1100", torch.float32),
    ],
)
def test_several_tiles_and_parts_of_k(target, dtype):
    """Ranks above a tile, two parts of K of which the last one is short, two tiles of columns."""
    args = inputs(rank=33, columns=140, width=70, dtype=dtype)
    agree(run(args, target), exact(args))


def test_rows_without_an_adapter_are_zero():
    """Whatever x has there; and an adapter that no row has is not read."""
    args = inputs()
    wanted = run(args)
    none = args[3] < 0
    args[0][none], args[1][1], args[2][1] = torch.nan, torch.nan, torch.nan
    got = run(args)
    assert torch.equal(got, wanted)
    assert (got[none] == 0).all() and got[~none].all()
    args[3] = torch.full_like(args[3], -1)
    assert not run(args).any()


def test_adapters_may_stand_anywhere():
    x, a, b, adapters, scaling = inputs()
    order = torch.tensor([2, 3, 1, 0], device=DEVICE)
    moved = torch.where(adapters < 0, adapters, order.argsort()[adapters.clamp(min=0)])
    got = run([x, a[order], b[order], moved, scaling[order]])
    assert torch.equal(got, run([x, a, b, adapters, scaling]))


def test_scaling_is_linear():
    args = inputs()
    assert torch.equal(run([*args[:4], args[4] * 2]), run(args) * 2)


def test_without_adapters_and_views():
    x, a, b, adapters, scaling = inputs()
    nobody = torch.full_like(adapters, -1)
    assert not run([x, a[:0], b[:0], nobody, scaling[:0]]).any()
    wide = torch.cat((x, x), dim=1)[:, 7:47]
    args = [wide, a.transpose(1, 2).contiguous().transpose(1, 2), b, adapters, scaling]
    agree(run(args), exact(args))
