"""Proof rows of the kernels that are suites of their own."""

import sys
from collections.abc import Iterator

from tests.prove import table
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

SUITES = (
    Suite(
        "CPU ops: float64 tolerances, exact integers, instruction sets and threads agree, opcheck",
        ("tests/kernels/test_cpu_ops.py", "tests/kernels/test_cpu_attention.py"),
    ),
    Suite(
        "keys and values in every format: round trips, pages in any order, NaN that never leaks",
        ("tests/kernels/test_cpu_kv.py", "tests/kv/test_storage.py"),
    ),
    Suite(
        "every op: float64 oracles, opcheck, gradients, properties, a change that must be noticed",
        ("tests/kernels/ops",),
    ),
    Suite(
        "Triton: numbers, guard, broken kernels caught; what ships is what is committed",
        ("tests/kernels/triton",),
    ),
    Suite(
        "integers: bounds of each operation, no float in the graph, the bits of a NumPy model",
        ("tests/kernels/test_integer.py", "tests/models/test_integer.py"),
    ),
    Suite(
        "thread pool under stress and under the thread sanitizer",
        ("tests/kernels/test_cpu_pool.py", "tests/kernels/test_build.py"),
    ),
    Suite(
        "a range of layers = the reference decoder, through pages, chunks and batches",
        ("tests/models/test_packed.py", "tests/models/test_decoded_memory.py"),
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


if __name__ == "__main__":
    sys.exit(table.main("kernel_suites", ("kernel_suites",)))
