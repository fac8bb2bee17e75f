"""Processor time as the kernel shares it out: a cgroup for each worker, with a quota that may be
changed while the worker runs (`cpu.cfs_quota_us`, Turner, Rao and Rao, Linux Symposium 2010)."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CPU = Path("/sys/fs/cgroup/cpu")
LEAST_US = 1000
"""The shortest quota and period that the kernel takes."""
PATIENCE_S = 10.0


class NoQuota(Exception):
    """Nothing can be set here, and why."""


@contextmanager
def skipped_without() -> Iterator[None]:
    """A test that rests on quotas is skipped where the kernel gives none to whoever runs it (no
    root, or cgroups of the second version only); a proof has a missed row there instead."""
    try:
        yield
    except NoQuota as error:
        pytest.skip(f"needs a cgroup of the first version with a quota: {error}")


class Quotas:
    """A cgroup for each rank, with so many processors' worth of time; a context, which removes them
    once everybody in them has ended. processors: by rank, 0.5 is half of one; period_us: each
    quota is given anew after it, and the time that a worker has to wait for more is as long."""

    def __init__(self, processors: Sequence[float], period_us: int = 10_000) -> None:
        self._processors, self._period_us = list(processors), period_us
        self.group = f"sanderling{os.getpid()}-"
        """What `join` is told."""

    def __enter__(self) -> "Quotas":
        """NoQuota where the kernel, or who started this, gives no cgroup of the first version."""
        try:
            for rank, processors in enumerate(self._processors):
                place(self.group, rank).mkdir()
                (place(self.group, rank) / "cpu.cfs_period_us").write_text(str(self._period_us))
                self.give(rank, processors)
        except OSError as error:
            self.__exit__()
            raise NoQuota(f"no quota of processor time can be set here: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        for rank in range(len(self._processors)):
            while place(self.group, rank).exists():
                try:
                    place(self.group, rank).rmdir()
                except OSError:  # of who was killed, the kernel still tidies up
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.02)

    def give(self, rank: int, processors: float) -> None:
        """From now on. ValueError for less than the kernel can give."""
        quota_us = round(processors * self._period_us)
        if quota_us < LEAST_US:
            raise ValueError(f"{processors} of {self._period_us} us: {LEAST_US} us or more")
        (place(self.group, rank) / "cpu.cfs_quota_us").write_text(str(quota_us))


def place(group: str, rank: int) -> Path:
    """A rank's cgroup."""
    return CPU / f"{group}{rank}"


def join(group: str, rank: int) -> None:
    """By the worker: from now on it has what the rank has, with all of its threads."""
    (place(group, rank) / "cgroup.procs").write_text(str(os.getpid()))
