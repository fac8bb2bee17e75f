"""The kernel of the selective scan: the oracle's states, and a scan that can be cut anywhere."""

import pytest
import torch

from kernels.reference import scan as reference
from kernels.triton.scan import selective_scan
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import conforms, every, normal, watched


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("scan"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def inputs(batch=2, steps=9, channels=21, states=5):
    """x, dt, a, b, c, d, state: more channels than a program has."""
    x, dt = normal(batch, steps, channels), normal(batch, steps, channels, seed=2).abs()
    a, d = -normal(channels, states, seed=3).abs(), normal(channels, seed=4)
    b, c = normal(batch, steps, states, seed=5), normal(batch, steps, states, seed=6)
    return x, dt, a, b, c, d, normal(batch, channels, states, seed=7)


def run(args):
    with watched():
        return selective_scan(*args)


def same(got, wanted):
    for mine, right in zip(got, wanted, strict=True):
        agree(mine, right)


def test_several_programs_and_views():
    args = inputs()
    wanted = reference.selective_scan(*(each.double() for each in args))
    same(run(args), wanted)
    x, dt, a, b, c, d, state = args
    joined = torch.cat((x, dt, b, c), dim=2)
    views = joined.split([21, 21, 5, 5], dim=2)
    columns = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (a[None], state))
    a, state = columns
    same(run((views[0], views[1], a[0], views[2], views[3], d, state)), wanted)


def test_a_scan_that_goes_on_is_one_scan():
    x, dt, a, b, c, d, state = inputs()
    y, last = run((x, dt, a, b, c, d, state))
    parts = []
    for cut in (slice(0, 4), slice(4, 4), slice(4, 9)):
        part, state = run((x[:, cut], dt[:, cut], a, b[:, cut], c[:, cut], d, state))
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(state, last)


def test_no_first_state_is_zeros():
    *args, state = inputs(steps=3)
    fresh, zeros = run(args), run([*args, torch.zeros_like(state)])
    assert all(torch.equal(*pair) for pair in zip(fresh, zeros, strict=True))


def test_float64_is_refused():
    args = [each.double() for each in inputs(steps=1)]
    with pytest.raises(ValueError, match="selective_scan on a GPU takes .*float64"):
        run(args)
