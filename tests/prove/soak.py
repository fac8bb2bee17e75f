"""Proof rows of half an hour under load, in which something is killed once a minute.

Two prefill and two decode replicas answer clients that never pause (mixed.py). Memory is sampled at
full strength only (memory.py). Since processes are replaced all the time, what has to be flat is
the sum over all of them, early (when caches are full) against late; what survivors grew is told
apart, Ray's own from ours.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from cluster.settings import Settings
from serve import build
from tests.live.service import MODEL, LiveService, kill, service, wait_for
from tests.prove.kills import (
    BACK_S,
    RESTORED_S,
    SETTINGS,
    actor_pids,
    free,
    full_strength,
    ready,
)
from tests.prove.memory import MIB, Growth, Sample, grown_kinds, ratio, sample, survivors
from tests.prove.mixed import Load
from tests.prove.row import Row

SOAK_S = 1800.0
KILL_EVERY_S = 60.0
SAMPLE_EVERY_S = 10.0
CLIENTS = 4
VICTIMS = {
    "decode": "DecodeActor",
    "prefill": "PrefillActor",
    "controller": "ControllerActor",
    "ingress": "ServeReplica",
}
KINDS = ("decode", "prefill", "controller", "hang")
INGRESS_EACH = 8  # kills
CACHE = "engine.kv_tokens=2048"  # the caches of a fresh replica are full within a minute
FLAT = 0.05
PREFILLS = 2
FILES = 2 * CLIENTS  # connections that come and go


@dataclass
class Soak:
    """One run: how long, how often something dies, and what happened so far."""

    live: LiveService
    load: Load
    duration_s: float
    every_s: float
    chance: random.Random = field(default_factory=lambda: random.Random(61))
    killed: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    back_s: float = float("inf")

    @property
    def next_kill_s(self) -> float:
        return (self.killed.total() + 1) * self.every_s

    def run(self) -> None:
        """Kill on the minute, sample in between, and wait for everything to be free at the end."""
        started_s = time.monotonic()
        with self.load.clients(CLIENTS):
            while (now_s := time.monotonic() - started_s) < self.duration_s:
                self._turn(now_s)
                now_s = time.monotonic() - started_s
                left_s = min(self.next_kill_s, self.duration_s) - now_s
                time.sleep(min(SAMPLE_EVERY_S, max(left_s, 0.5)))
        self.back_s = wait_for(lambda: free(self.live), "pages and leases", RESTORED_S)

    def _turn(self, now_s: float) -> None:
        """At full strength only: a kill that is due, else a sample."""
        if not full_strength(self.live):
            return
        if now_s < self.next_kill_s:
            self.samples.append(sample(self.live, now_s))
            return
        due = (self.killed.total() + 1) % INGRESS_EACH
        kind = self.chance.choice(KINDS) if due else "ingress"
        if not self._strike(kind):
            return
        self.killed[kind] += 1
        rss_bytes = self.samples[-1].total("rss_bytes") if self.samples else 0
        counts = f"{self.load.acts.total()} requests, {len(self.load.lost)} lost"
        print(f"   {now_s / 60:.1f} min: {kind}, {counts}, RSS {_mib(rss_bytes)}", flush=True)

    def _strike(self, kind: str) -> bool:
        """Kill or halt one process; False when none of its kind is there just now."""
        role = self.chance.choice(("decode", "prefill")) if kind == "hang" else kind
        victims = actor_pids(self.live.processes(), VICTIMS[role])
        if not victims:
            return False
        victim = self.chance.choice(victims)
        if kind == "hang":
            os.kill(victim, signal.SIGSTOP)
        elif kind == "ingress":
            with self.load.outage():
                kill(victim)
                wait_for(lambda: ready(self.live), "another ingress", RESTORED_S)
        else:
            kill(victim)
        return True


def rows(duration_s: float = SOAK_S, every_s: float = KILL_EVERY_S) -> Iterator[Row]:
    """Every row of this module; takes `duration_s` and a minute.

    The weights are decoded beforehand: a replica that does it keeps memory that later ones lack.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="soak-")))
        build.load(Settings.model_validate({"model": MODEL, "data_dir": str(folder)}))
        live = stack.enter_context(service(*SETTINGS, CACHE, data_dir=folder))
        wait_for(lambda: full_strength(live), "two replicas of each role", RESTORED_S)
        soak = Soak(live, Load(live), duration_s, every_s)
        soak.run()
    yield from _answers(soak)
    yield from _memory(soak)
    text = f"{soak.back_s:.1f} s"
    yield Row("pages and leases back after it", f"<= {BACK_S:g} s", text, soak.back_s <= BACK_S)


def _answers(soak: Soak) -> Iterator[Row]:
    load = soak.load
    acts = ", ".join(f"{n} {act}" for act, n in sorted(load.acts.items()))
    yield Row(
        f"{soak.duration_s / 60:g} minutes of mixed load ({acts})",
        "0 lost",
        f"{len(load.lost)} lost, {load.again} asked again of a new ingress{_first(load.lost)}",
        bool(load.acts) and not load.lost,
    )
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(soak.killed.items()))
    least, total = round(soak.duration_s / soak.every_s) - 1, soak.killed.total()
    yield Row("kills meanwhile", f">= {least}", f"{total} ({kinds})", 0 < least <= total)
    yield Row(
        "the same request again: the same answer",
        "0 different",
        f"{len(load.different)} of {load.compared} different{_first(load.different)}",
        load.compared > 0 and not load.different,
    )


def _memory(soak: Soak) -> Iterator[Row]:
    """Early begins after a tenth of the time, when caches are full; early and late are a sixth."""
    begin_s, long_s = soak.duration_s / 10, soak.duration_s / 6
    early = [s for s in soak.samples if begin_s <= s.at_s < begin_s + long_s]
    late = [s for s in soak.samples if s.at_s >= soak.duration_s - long_s]
    if not early or not late:
        text = f"{len(early)} early, {len(late)} late"
        yield Row("samples at full strength", ">= 1 early and late", text, False)
        return
    rss, pss = (ratio(early, late, what) for what in ("rss_bytes", "pss_bytes"))
    most = ", ".join(f"{name} {_mib(by, '+')}" for name, by in grown_kinds(early, late)[:3])
    yield Row(
        f"RSS of all processes, the last {long_s / 60:g} minutes over early ones",
        f"within {FLAT:.0%}",
        f"x {rss:.3f} of {_mib(median(s.total('rss_bytes') for s in early))} "
        f"(PSS x {pss:.3f}); most by {most}",
        abs(rss - 1) <= FLAT and abs(pss - 1) <= FLAT,
    )
    yield from _survivors(survivors(soak.samples, early, late))
    segments = max(s.segments for s in soak.samples)
    yield Row(
        "shared segments at full strength",
        f"{PREFILLS}",
        f"{segments} at most",
        segments == PREFILLS,
    )


def _survivors(found: list[Growth]) -> Iterator[Row]:
    """What lived through it all."""
    ours = [growth for growth in found if growth.ours]
    rays = [growth for growth in found if not growth.ours]
    worst = max(growth.grown_bytes / growth.rss_bytes for growth in ours)
    yield Row(
        f"{len(ours)} processes of ours that lived through it",
        f"RSS <= +{FLAT:.0%} each",
        f"{_told(ours)}; Ray's own {len(rays)}: {_told(rays)}",
        worst <= FLAT,
    )
    opened = max(growth.grown_files for growth in ours)
    yield Row(
        "their open files",
        f"<= +{FILES}, as connections come and go",
        f"{opened:+g} at most; Ray's own: {_opened(rays)}",
        opened <= FILES,
    )


def _opened(found: list[Growth]) -> str:
    most = sorted(found, key=lambda growth: -growth.grown_files)[:2]
    return ", ".join(f"{g.name} {g.files:g} {g.grown_files:+g}" for g in most)


def _told(found: list[Growth]) -> str:
    return ", ".join(f"{g.name} {_mib(g.grown_bytes, '+')}" for g in found[:4])


def _mib(amount_bytes: float, sign: str = "") -> str:
    return f"{amount_bytes / MIB:{sign}.0f} MiB"


def _first(texts: list[str]) -> str:
    return "".join(f"; {text}" for text in texts[:2])
