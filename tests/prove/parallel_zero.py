"""Proof rows of ZeRO: what a rank holds against the table, what is sent, the curve of one process;
under a minute."""

import tempfile
from collections.abc import Iterator
from typing import Any

from tests.prove.row import Row
from tests.prove.suites import Suite, run
from tests.train.parallel.zero_ranks import measured
from tests.train.processes import on_ranks

RANKS = 4
TABLE = {1: 4 + 12 / RANKS, 2: 2 + 14 / RANKS, 3: 16 / RANKS}


def rows() -> Iterator[Row]:
    """All rows of this module."""
    yield from zero()
    check = "ZeRO: no stage is taken for another; refusals; sums in the order of ranks"
    yield run(Suite(check, ("tests/train/parallel/test_zero.py",)))


def zero() -> Iterator[Row]:
    """Four processes, each stage."""
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[dict[str, Any]] = on_ranks(RANKS, measured, folder)
    sizes = {
        stage: [rank["sizes"][stage]["live"] / wanted for rank in ranks]
        for stage, wanted in TABLE.items()
    }
    worst = max(abs(ratio - 1) for ratios in sizes.values() for ratio in ratios)
    told = ", ".join(f"{stage}: {max(ratios):.4f}" for stage, ratios in sizes.items())
    yield Row("ZeRO: live bytes a rank over the table's", "within 2 %", told, worst <= 0.02)
    sent = {stage: sum(r["sizes"][stage]["sent"] for r in ranks) / RANKS for stage in TABLE}
    ratio = sent[3] / sent[1]
    yield Row(
        "ZeRO: bytes on TCP, stage 3 over stage 1",
        "1.5 within 2 %",
        f"{ratio:.4f} ({', '.join(f'{stage}: {value:.3f}' for stage, value in sent.items())})",
        abs(ratio / 1.5 - 1) <= 0.02,
    )
    equal = max(value for rank in ranks for value in rank["equal"].values())
    yield Row(
        "ZeRO: 20 steps as one process's AdamW, fp64", "<= 1e-12", f"{equal:.1e}", equal <= 1e-12
    )
    moved = [value for rank in ranks[:-1] for value in rank["moved"].values()]
    yield Row(
        "ZeRO: saved by 4, loaded by 3 at another stage, 5 steps on",
        "<= 1e-12",
        f"{max(moved):.1e} ({len(moved)} comparisons)",
        max(moved) <= 1e-12 and len(moved) == 3 * (RANKS - 1),
    )
