"""Proof rows of checkpoints and ZeRO: crashes, full disks, S3, CheckFreq's budget, ZeRO's table.

`python -m tests.prove.train_checkpoint` prints them; about four minutes on two quiet cores.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.prove.row import Row, print_rows
from tests.train.checkpoint.crashes import NEW, OLD, crash, fine
from tests.train.parallel.zero_ranks import measured
from tests.train.processes import on_ranks
from tests.train.resilience.slowdown import measure

ROOT = Path(__file__).parents[2]
KILLS = 20
BUDGET = 0.05
ROUNDS = 9
RANKS = 4
LIMIT_S = 900
TABLE = {1: 4 + 12 / RANKS, 2: 2 + 14 / RANKS, 3: 16 / RANKS}
SUITES = {
    "power lost at any system call of a write": ("test_crashes.py", "power or sync"),
    "full disk (a real one, too), read-only folder": ("test_crashes.py", "disk or folder"),
    "S3 throttled, failing, cut off": ("test_s3.py", ""),
    "bits flipped, files cut, parts missing": ("test_checkpoint.py", ""),
}


def rows() -> Iterator[Row]:
    """All rows of this module."""
    yield kills()
    for check, (file, words) in SUITES.items():
        yield suite(check, file, words)
    yield from budget()
    yield from zero()


def kills() -> Row:
    """SIGKILL at seeded moments, over all kinds of system calls that a write makes."""
    with tempfile.TemporaryDirectory() as folder:
        found = [crash(Path(folder) / str(seed), seed) for seed in range(KILLS)]
    good = sum(map(fine, found))
    calls = Counter(after.crash.call for after in found)
    steps = Counter(after.step for after in found)
    met = ", ".join(f"{count} {call}" for call, count in sorted(calls.items()))
    measured_ = f"{good} of {KILLS} (at {met}; the old one {steps[OLD]}, the new one {steps[NEW]})"
    ok = good == KILLS and {"rename", "sync", "sync_folder", "write"} <= calls.keys()
    return Row(
        "SIGKILL within a write: newest whole one loads", f"{KILLS} of {KILLS}", measured_, ok
    )


def suite(check: str, file: str, words: str) -> Row:
    """Tests of this name, none skipped."""
    path = f"tests/train/checkpoint/{file}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    done = subprocess.run(
        [*command, *(["-k", words] if words else [])],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    summary = done.stdout.strip().rpartition("\n")[2].strip("= ")
    return Row(check, "tests green", summary, done.returncode == 0 and "skipped" not in summary)


def budget() -> Iterator[Row]:
    """A real loop, in turns with one that writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), BUDGET, ROUNDS)
    about = (
        f"k = {found.interval}; T_iter {found.iteration_s * 1e3:.0f} ms, persist "
        f"{found.persist_s * 1e3:.0f} ms, overhead {found.overhead_s * 1e3:.0f} ms a checkpoint"
    )
    yield Row(
        "CheckFreq: slowdown at its interval",
        f"<= {BUDGET:.1%}",
        f"{found.chosen:.1%} ({about})",
        found.chosen <= BUDGET,
    )
    yield Row(
        "CheckFreq: slowdown at a quarter of it (mutation)",
        f"> {BUDGET:.1%}",
        f"{found.quarter:.1%}",
        found.quarter > BUDGET,
    )


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


if __name__ == "__main__":
    sys.exit(0 if print_rows(list(rows())) else 1)
