"""Proof rows of checkpoints and ZeRO: crashes, full disks, S3, CheckFreq's budget, ZeRO's table.

`python -m tests.prove.train_checkpoint` prints them; about four minutes on two quiet cores.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.prove.parallel_zero import zero
from tests.prove.row import Row, print_rows
from tests.train.checkpoint.crashes import NEW, OLD, crash, fine
from tests.train.resilience.slowdown import measure

ROOT = Path(__file__).parents[2]
KILLS = 20
BUDGET = 0.05
ROUNDS = 5
LIMIT_S = 900
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


if __name__ == "__main__":
    sys.exit(0 if print_rows(list(rows())) else 1)
