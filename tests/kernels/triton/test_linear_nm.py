"""The kernels of N:M weights: gathered or spread out, the oracle's product."""

import pytest
import torch

from kernels.reference.linear_nm import nm_pack, nm_unpack
from kernels.triton.case import Case
from kernels.triton.linear_nm import cases as shipped
from kernels.triton.linear_nm import nm_linear
from kernels.triton.targets import target as known
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import conforms, every, normal, watched


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("linear_nm"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def run(x, values, indices, n, m, target="sm_80"):
    with watched(target):
        return nm_linear(x, values, indices, n, m)


@pytest.mark.parametrize(
    ("n", "m", "columns", "rows", "target"),
    [
        (2, 4, 152, 35, "sm_80"),
        (2, 4, 152, 3, "sm_80"),
        (4, 8, 72, 6, "sm_75"),
        (3, 7, 63, 35, "gfx1100"),
        (1, 16, 144, 2, "gfx942"),
    ],
)
def test_several_tiles(n, m, columns, rows, target):
    """Few rows are gathered, many are multiplied with tiles, on Turing all are gathered."""
    x, packed = normal(rows, columns), nm_pack(normal(35, columns, seed=2), n, m)
    agree(run(x, *packed, n, m, target), x.double() @ nm_unpack(*packed, n, m).double().T)


@pytest.mark.parametrize("rows", [1, 16])
def test_what_is_kept_can_be_read_back(rows):
    """One-hot rows give single columns of the weight, exactly."""
    weight = normal(9, 16, dtype=torch.bfloat16)
    x = torch.eye(16, dtype=torch.bfloat16, device=weight.device)[:rows]
    packed = nm_pack(weight, 2, 4)
    assert torch.equal(run(x, *packed, 2, 4), nm_unpack(*packed, 2, 4).T[:rows])


def test_views():
    x, packed = normal(6, 60), nm_pack(normal(20, 32, seed=2), 2, 4)
    values, indices = (torch.cat((each, each), dim=1)[:, 4:20] for each in packed)
    for part in (x[:, 3:35], x[:3, 3:35]):
        wanted = part.double() @ nm_unpack(values.contiguous(), indices, 2, 4).double().T
        agree(run(part, values, indices, 2, 4), wanted)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="nm_linear on a GPU computes in float16"):
        run(normal(2, 8).double(), *nm_pack(normal(4, 8), 2, 4), 2, 4)


def test_one_row_is_gathered_on_every_gpu():
    for name in ("sm_75", "sm_90", "gfx942"):
        made = [case for case in shipped(known(name)) if isinstance(case, Case)]
        kernels = {case.name: case.kernel.__name__ for case in made}
        assert kernels["nm_linear/2of4-fp16-rows1"] == "nm_gather_kernel"
        many = "nm_gather_kernel" if name == "sm_75" else "nm_spread_kernel"
        assert kernels["nm_linear/2of4-bf16-rows1024"] == many
