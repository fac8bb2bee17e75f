"""Every test here runs with the repaired interpreter, or on a GPU."""

from importlib.util import find_spec

import pytest

# Triton is made for some platforms only, and comes with the extra `test` there.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreter():
    """The repair lasts for one test. On a GPU there is nothing to repair."""
    from kernels.triton import launch
    from kernels.triton.verify.repair import repaired

    if not launch.interpreting():
        yield
        return
    with repaired():
        yield


@pytest.fixture
def only_interpreted():
    """For tests of the interpreter itself."""
    from kernels.triton import launch

    if not launch.interpreting():
        pytest.skip("there is a GPU, and kernels run on it")
