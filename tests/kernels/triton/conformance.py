"""Cases of the ops' table through launchers: which target, dtypes and rows, guarded or not.

For the tests of ops 9 to 17, which have a file for each module. In the interpreter a program takes
10 ms and more, so that the whole grid of targets, dtypes and rows is a slow test, and a part of it
is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch

from kernels.triton import launch
from kernels.triton.verify.guard import guarded
from tests.kernels.ops.cases import Case, check
from tests.kernels.ops.table import CASES
from tests.kernels.triton.ways import launcher, module

DEVICE = "cpu" if launch.interpreting() else "cuda"
# Matrix units; none; matrix units, but not for float32.
TARGETS = ("sm_80", "sm_75", "gfx1100")


def cases_of(name: str) -> list[Case]:
    """The cases of the ops whose launchers are in kernels/triton/<name>.py."""
    found = [case for case in CASES if module(case) == name and case.op_name != "grouped_outer"]
    assert found, name
    return found


def every(name: str) -> list[Any]:
    """(case, target, rows, dtype) of a module, for parametrize: the whole grid, most of it slow.

    Not slow is, for each case, one target and one dtype for each number of rows up to 5.
    """
    grid = []
    for number, case in enumerate(cases_of(name)):
        for target, (place, rows) in product(TARGETS, enumerate((0, 1, 5, 17))):
            for dtype in case.dtypes:
                chosen = case.dtypes[(number + place) % len(case.dtypes)]
                quick = target == TARGETS[number % len(TARGETS)] and dtype == chosen and rows < 17
                marks = [] if quick else [pytest.mark.slow]
                name = f"{case.name}-{target}-{rows}-{str(dtype).removeprefix('torch.')}"
                grid.append(pytest.param(case, target, rows, dtype, marks=marks, id=name))
    return grid


def conforms(case: Case, target: str, rows: int, dtype: torch.dtype) -> None:
    """AssertionError unless the launcher gives what the oracle does, and does nothing wrong on the
    way, as it would run on the target."""
    with watched(target):
        check(case, rows, dtype, op=launcher(case), device=DEVICE)


@contextmanager
def watched(target: str = "sm_80") -> Iterator[None]:
    """Launchers run as on the target; accesses are guarded where there is no GPU."""
    with launch.interpreted_as(target), guarded() if launch.interpreting() else nullcontext():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Random numbers on the device."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance).to(dtype).to(DEVICE)


def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64, seed: int = 1):
    """Random integers on the device, below high."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=chance, dtype=dtype).to(DEVICE)
