"""Proof rows of the CPU kernels that are suites of their own."""

from collections.abc import Iterator

from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

SUITES = (
    Suite(
        "ops: float64 tolerances, exact integers, instruction sets and threads agree, opcheck",
        ("tests/kernels/test_cpu_ops.py",),
    ),
    Suite(
        "thread pool under stress and under the thread sanitizer",
        ("tests/kernels/test_cpu_pool.py", "tests/kernels/test_build.py"),
    ),
    Suite(
        "a range of layers = the reference decoder, through pages, chunks and batches",
        ("tests/models/test_packed.py",),
    ),
    Suite(
        "the service over these kernels: hand-offs and kills change no token",
        ("tests/serving/test_cpu_kernels.py", "tests/serving/test_perplexity.py"),
    ),
)


def rows() -> Iterator[Row]:
    """One row for each suite, as it ends."""
    for suite in SUITES:
        yield from attempt(suite.shows, lambda suite=suite: run(suite))  # type: ignore[misc]
