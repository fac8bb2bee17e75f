"""Processes that die within a checkpoint's write, and what is there afterwards.

A crash is drawn by a seed: the kind of system call first, so that the rare ones (rename, sync of a
folder) are met as often as writes, then which of them, then before, half way (writes) or after.
"""

import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

import torch

from tests.train.checkpoint.disks import KillingDisk, counting
from tests.train.checkpoint.samples import is_state, save
from train.checkpoint.local import LocalStorage
from train.checkpoint.reader import CheckpointReader

RANKS, KEEP = 2, 2
OLD, NEW = 2, 3


class Crash(NamedTuple):
    """One seeded moment."""

    call: str
    number: int
    moment: str


class After(NamedTuple):
    """What was found: the step of the newest whole checkpoint, and whether it is that state."""

    crash: Crash
    signal: int
    step: int
    exact: bool
    reasons: list[str]


def prepare(root: Path) -> None:
    """Two whole checkpoints; writing a third then also removes the first."""
    for step in (OLD - 1, OLD):
        save(LocalStorage(root), step, "a", RANKS, KEEP)


def draw(root: Path, seed: int) -> Crash:
    """A moment within the third write, of which `root` is a place to rehearse."""
    disk = counting()
    prepare(root)
    save(LocalStorage(root, disk), NEW, "b", RANKS, KEEP)
    chance = random.Random(seed)
    kinds = sorted(set(disk.calls))
    call = kinds[seed % len(kinds)]
    number = chance.choice([i for i, name in enumerate(disk.calls) if name == call])
    moment = chance.choice(("before", "half", "after") if call == "write" else ("before", "after"))
    return Crash(call, number, moment)


def crash(root: Path, seed: int) -> After:
    """Runs a writer that is killed by SIGKILL at the seed's moment; what a reader then finds, and
    that the next write works as if nothing had been."""
    moment = draw(root / "rehearsal", seed)
    place = root / "real"
    prepare(place)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            storage = LocalStorage(place, KillingDisk(moment.number, moment.moment))
            save(storage, NEW, "b", RANKS, KEEP)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    reader = CheckpointReader(LocalStorage(place))
    found = reader.newest()
    step = -1 if found is None else found.step
    exact = found is not None and is_state({n: found.tensor(n) for n in found.names}, step)
    reasons = [passed.reason for passed in reader.passed_over]
    save(LocalStorage(place), NEW + 1, "c", RANKS, KEEP)
    after = CheckpointReader(LocalStorage(place))
    again = after.newest()
    tidy = not after.passed_over and len(list(place.iterdir())) == KEEP
    exact = exact and again is not None and again.step == NEW + 1 and tidy
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return After(moment, died, step, exact, reasons)


def fine(after: After) -> bool:
    """Killed, and the newest is the old or the new one, exactly; where it is the old one although
    something of the new one is there, a reason is given."""
    return after.signal == signal.SIGKILL and after.exact and after.step in (OLD, NEW)
