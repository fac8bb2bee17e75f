"""Every test here runs with the repaired interpreter, or on a GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install sanderling[gpu]")

from kernels.triton import launch
from kernels.triton.verify.repair import repaired


@pytest.fixture(autouse=True)
def interpreter():
    """The repair lasts for one test. On a GPU there is nothing to repair."""
    if not launch.interpreting():
        yield
        return
    with repaired():
        yield


@pytest.fixture
def only_interpreted():
    """For tests of the interpreter itself."""
    if not launch.interpreting():
        pytest.skip("there is a GPU, and kernels run on it")
