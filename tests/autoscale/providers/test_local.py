"""The local provider passes the suite over real processes and virtual time, and the suite notices
every broken one."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.local.bodies import MARK_VARIABLE, ProcessBodies, Start
from autoscale.providers.local.ledger import Ledger
from autoscale.providers.local.local import LocalProvider
from autoscale.providers.local.market import LocalMarket, Step, read_spotserve, scaled
from autoscale.providers.provider import Provider
from cluster.clock import VirtualClock
from tests.autoscale.providers.broken import BROKEN, must_be_noticed
from tests.autoscale.providers.suite import CHECKS, NOTICE_S, STARTUP_S, Check, holds

SPOT = Offer("spot-a", "t4", 1, "here", "a", "spot", 0.2, quota=4, startup_s=STARTUP_S)
ON_DEMAND = Offer("on-demand", "t4", 1, "here", "a", "on_demand", 0.5, startup_s=STARTUP_S)
SLEEPER = (sys.executable, "-S", "-c", "import signal; signal.pause()")


class LocalSite:
    """See Site: a market whose steps a test writes as it goes, and sleeping processes."""

    spot, other = SPOT, ON_DEMAND

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = VirtualClock(start_s=1000.0)
        self.market = LocalMarket((SPOT, ON_DEMAND), (), NOTICE_S)
        self.made: list[LocalProvider] = []
        self.wrap: Callable[[Provider], Provider] = lambda provider: provider
        self.provider = self.again()

    def again(self) -> Provider:
        bodies = ProcessBodies(self.folder / "bodies", lambda *_: Start(SLEEPER))
        self.made.append(LocalProvider(Ledger(self.folder), self.market, bodies, self.clock))
        return self.wrap(self.made[-1])

    async def passes(self, duration_s: float) -> None:
        """In small steps, as a watch would see it."""
        for _ in range(10):
            await self.clock.advance(duration_s / 10)
            self.made[-1].advance()

    def limit(self, machines: int, in_s: float = 0.0) -> None:
        step = Step(self.now_s() - self.made[-1].opened_s + in_s, SPOT.name, machines)
        self.market = replace(self.market, steps=(*self.market.steps, step))
        self.made[-1].market = self.market

    def alive(self) -> set[str]:
        """Read from /proc, without the provider's code."""
        prefix = f"{MARK_VARIABLE}={self.folder.resolve()}/bodies/".encode()
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {w.removeprefix(prefix).decode() for w in words if w.startswith(prefix)}
        return found

    def now_s(self) -> float:
        return self.clock.now_s()


@contextmanager
def local_site(folder: Path) -> Iterator[LocalSite]:
    site = LocalSite(folder)
    try:
        yield site
    finally:
        for provider in site.made:
            provider.close()
        assert site.alive() == set()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, tmp_path: Path):
    with local_site(tmp_path) as site:
        asyncio.run(holds(check, site))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_suite_notices(broken: Callable[[Provider], Provider], tmp_path: Path):
    with local_site(tmp_path) as site:
        asyncio.run(must_be_noticed(broken, site))


def test_a_machine_that_dies_of_its_own_is_gone(tmp_path: Path):
    """All of it: what its first process started goes with it."""
    parent = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    command = (sys.executable, "-S", "-c", parent, *SLEEPER)

    async def work(site: LocalSite) -> None:
        provider = site.made[-1]
        provider.bodies = ProcessBodies(tmp_path / "bodies", lambda *_: Start(command))
        made = await provider.launch(SPOT, "a")
        bodies = provider.bodies
        while len(bodies._processes()) < 2:
            await asyncio.sleep(0.01)
        os.kill(bodies._children[made.id].pid, signal.SIGKILL)
        while made.id in bodies.alive():
            await asyncio.sleep(0.01)
        assert [m.state for m in await provider.machines()] == ["gone"]
        assert [e.kind for e in (await provider.events(0))[0]] == ["launch_ok", "preempt"]
        assert site.alive() == set()

    with local_site(tmp_path) as site:
        asyncio.run(work(site))


def test_a_launch_that_a_crash_cut_short_costs_nothing_and_can_be_asked_again(tmp_path: Path):
    async def work(site: LocalSite) -> None:
        class Crash(BaseException):
            pass

        def crash(*_: object) -> Start:
            raise Crash

        site.made[-1].bodies = ProcessBodies(tmp_path / "bodies", crash)
        with pytest.raises(Crash):
            await site.made[-1].launch(SPOT, "a")
        site.provider = site.again()
        assert await site.provider.machines() == ()
        made = await site.provider.launch(SPOT, "a")
        assert site.alive() == {made.id}

    with local_site(tmp_path) as site:
        asyncio.run(work(site))


def test_losses_that_nobody_watched_come_in_their_order(tmp_path: Path):
    """A caller that asks an hour later hears of each notice and each loss at its own time."""

    async def work(site: LocalSite) -> None:
        for token in "abc":
            await site.provider.launch(SPOT, token)
        begun_s = site.now_s()
        site.limit(1, in_s=600)
        site.limit(0, in_s=900)
        await site.clock.advance(3600)
        events, _ = await site.provider.events(0)
        told = [(e.t_s - begun_s, e.kind) for e in events if e.kind != "launch_ok"]
        both = [(600.0 - NOTICE_S, "notice")] * 2 + [(600.0, "preempt")] * 2
        assert told == [*both, (900.0 - NOTICE_S, "notice"), (900.0, "preempt")]

    with local_site(tmp_path) as site:
        asyncio.run(work(site))


def test_spotserve_traces_are_read_and_scaled(tmp_path: Path):
    lines = (
        '[0, "add", {"nodes": ["a", "b", "c"]}]',
        '[60000, "add", {"nodes": ["d", "e"]}]',
        '[120000, "remove", {"nodes": ["a"]}]',
        '[180000, "remove", {"nodes": ["b", "e"]}]',
        '[240000, "DONE", {"nodes": []}]',
    )
    file = tmp_path / "trace.txt"
    file.write_text("\n".join(lines))
    counts = read_spotserve(file)
    assert counts == [(0, 3), (60, 5), (120, 4), (180, 2), (240, 2)]
    some = read_spotserve(file, lambda node: node in "ae")
    assert some == [(0, 1), (60, 2), (120, 1), (180, 0), (240, 0)]
    assert scaled(counts, "p", most=5, compress=10) == [
        Step(0, "p", 3),
        Step(6, "p", 5),
        Step(12, "p", 4),
        Step(18, "p", 2),
    ]
    assert [s.machines for s in scaled(counts, "p", most=2, compress=1)] == [1, 2, 1, 0]
    file.write_text('[0, "add", {"nodes": ["a"]}]\n[1, "burn", {"nodes": []}]')
    with pytest.raises(ValueError, match="line 2"):
        read_spotserve(file)
