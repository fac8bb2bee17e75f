"""Layer B: what a kernel does wrong is named. What ships is watched in its own tests."""

import pytest
import torch

from kernels.triton.verify.guard import Fault, guarded
from tests.kernels.triton import broken

pytestmark = pytest.mark.usefixtures("only_interpreted")
ROWS, N = 4, 5


def launch(kernel, x, out):
    with guarded():
        kernel[(ROWS,)](x, out, N, x.stride(0), out.stride(0), BLOCK=8)


def tensors():
    """What is stored into has gaps between its rows."""
    return torch.arange(ROWS * N).float().view(ROWS, N) + 1, torch.empty(ROWS, 9)[:, :N]


def test_a_right_kernel_passes():
    x, out = tensors()
    launch(broken.copy_rows, x, out)
    assert torch.equal(out, x)


def test_what_is_only_read_may_be_read_by_all():
    x, out = tensors()
    launch(broken.copy_rows, x[:1].expand(ROWS, N), out)
    assert torch.equal(out, x[:1].expand(ROWS, N))


FAULTS = {
    broken.store_past_the_end: r"store: 1 of 6 lanes are out of bounds in program \(0, 0, 0\)",
    broken.load_past_the_end: r"load: 3 of 8 lanes are out of bounds in program \(3, 0, 0\)",
    broken.all_store_one_row: r"race: program \(1, 0, 0\) stores to what program \(0, 0, 0\) stor",
    broken.load_what_the_last_one_stored: r"program \(1, 0, 0\) loads what program \(0, 0, 0\) sto",
    broken.store_what_another_loads: r"program \(3, 0, 0\) stores to what program \(2, 0, 0\) load",
    broken.lanes_meet: r"lanes of program \(0, 0, 0\) store unlike values to one place",
}


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: kernel.fn.__name__)
def test_what_is_wrong_is_named(kernel):
    with pytest.raises(Fault, match=FAULTS[kernel]):
        launch(kernel, *tensors())


def test_a_gap_between_rows_is_out_of_bounds():
    x = torch.zeros(ROWS, 9)[:, :N]
    with pytest.raises(Fault, match=r"load: 3 of 8 lanes are out of bounds in program \(0, 0, 0\)"):
        launch(broken.load_past_the_end, x, torch.empty(ROWS, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undefined_lanes_reach_the_result(dtype):
    x, out = (each.to(dtype) for each in tensors())
    launch(broken.sum_undefined_lanes, x, out)
    assert out.isnan().all()


def test_memory_that_nobody_has_written_is_conspicuous():
    with guarded():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(3, dtype=torch.int8) == 0x5A).all()
    assert torch.zeros(3).isnan().sum() == 0


def test_the_guard_ends_with_its_block():
    x, out = tensors()
    before = torch.empty
    with guarded():
        assert torch.empty is not before
    assert torch.empty is before
    # Nobody watches here; x is large enough for it to be harmless.
    broken.all_store_one_row[(ROWS,)](x, out, N, N, N, BLOCK=8)
