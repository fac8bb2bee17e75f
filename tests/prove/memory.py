"""What the processes of a running service hold, sampled, and how it grew from early to late.

Processes are told by what they run, survivors by process id and start. A `Use` counts resident
memory, memory with shared pages divided among their users (PSS), and open files. Used by the soak.
"""

from collections import Counter
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from serve.runfiles import RunFiles
from tests.live.service import LiveService
from tests.prove.kills import title

MIB = 1 << 20
RAYS_OWN = ("gcs_server", "raylet", "dashboard", "monitor", "Agent", "Serve", "Proxy", "IDLE")


class Use(NamedTuple):
    """What one process holds."""

    name: str
    rss_bytes: int
    pss_bytes: int
    files: int


class Sample(NamedTuple):
    """What all processes of the service hold, by process id and start; its shared segments."""

    at_s: float
    uses: dict[tuple[int, float], Use]
    segments: int

    def total(self, what: str) -> int:
        """The sum of "rss_bytes", "pss_bytes" or "files"."""
        return sum(getattr(use, what) for use in self.uses.values())


class Growth(NamedTuple):
    """A process that was there all the time, and what it held early and late (medians)."""

    name: str
    rss_bytes: float
    grown_bytes: float
    files: float
    grown_files: float

    @property
    def ours(self) -> bool:
        return not any(word in self.name for word in RAYS_OWN) or "ServeReplica" in self.name


def sample(live: LiveService, at_s: float) -> Sample:
    """What is held now; processes that end meanwhile are left out."""
    uses = {}
    for pid in live.processes():
        try:
            process = psutil.Process(pid)
            memory = process.memory_full_info()
            held = Use(_name(process), memory.rss, memory.pss, process.num_fds())
            uses[(pid, process.create_time())] = held
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    run_id = RunFiles(live.data_dir).run_id
    return Sample(at_s, uses, len(list(Path("/dev/shm").glob(f"sanderling-{run_id}-*"))))


def ratio(early: list[Sample], late: list[Sample], what: str) -> float:
    """The median of the sum of all processes late, over that early."""
    return median(s.total(what) for s in late) / median(s.total(what) for s in early)


def grown_kinds(early: list[Sample], late: list[Sample]) -> list[tuple[str, float]]:
    """Bytes of resident memory by which each kind of process grew as a whole, most first."""
    names = {use.name for part in (early, late) for s in part for use in s.uses.values()}
    grown = {name: _of_kind(late, name) - _of_kind(early, name) for name in names}
    return sorted(grown.items(), key=lambda item: -abs(item[1]))


def survivors(samples: list[Sample], early: list[Sample], late: list[Sample]) -> list[Growth]:
    """Every process that is in all samples, by what it grew, most first."""
    keys = set.intersection(*(set(s.uses) for s in samples))
    found = [_growth([s.uses[key] for s in early], [s.uses[key] for s in late]) for key in keys]
    return sorted(found, key=lambda growth: -growth.grown_bytes)


def _growth(early: list[Use], late: list[Use]) -> Growth:
    rss, late_rss = (median(use.rss_bytes for use in part) for part in (early, late))
    files, late_files = (median(use.files for use in part) for part in (early, late))
    return Growth(early[0].name, rss, late_rss - rss, files, late_files - files)


def _of_kind(samples: list[Sample], name: str) -> float:
    sums = [Counter[str]() for _ in samples]
    for one, total in zip(samples, sums, strict=True):
        for use in one.uses.values():
            total[use.name] += use.rss_bytes
    return median(total[name] for total in sums)


def _name(process: psutil.Process) -> str:
    """An actor's class, else the program."""
    first = title(process.pid)
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    words = [Path(word).name for word in process.cmdline()]
    scripts = [word for word in words[1:4] if word.endswith(".py") or word == "serve.host"]
    return (scripts or words or ["gone"])[0]
