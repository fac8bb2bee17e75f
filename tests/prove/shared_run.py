"""A drill of one allocator: the control loop serves a model and lends machines from a training job
and back, all of them worker processes of this machine. What came of it is a value."""

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Return, Yield
from autoscale.loop.drive import Driver
from autoscale.loop.record import STEP, FileLog, Step, head_of, make_loop
from autoscale.providers.local.local import LocalProvider
from autoscale.providers.local.market import LocalMarket
from autoscale.providers.local.workers import worker_bodies
from autoscale.providers.served import Served
from autoscale.providers.shared import Shared
from cluster.clock import WallClock
from cluster.settings.autoscale import AutoscaleSettings
from serve.machines.service import MachineService
from tests.prove.drill_run import Outcome, Scene, rented, served, stream, until
from tests.train.elastic.runs import PRELOAD, hellos
from tests.train.elastic.tiny import Tiny, build
from train.elastic.membership import Policy
from train.elastic.messages import Finished
from train.elastic.process import ProcessLauncher
from train.elastic.supervisor import Report, Supervisor
from train.elastic.yielding import Yielding

JOB = "tiny"
USD_PER_H = 36.0  # a machine; one cent a second
OFFER = Offer("here", "cpu", 1, "here", "a", "on_demand", USD_PER_H, startup_s=6.0, quota=3)
MARKET = LocalMarket((OFFER,), (), 0.0)
JOB_DEADLINE_S = 400.0
TRIAL = 8  # requests that measure what one replica serves, before the loop begins
REST = 2.0  # of a request's time, until the next one in a quiet time


@dataclass(frozen=True)
class Drill:
    """scene: the service and its requests; its `streams` are a spike's. job: what is trained on two
    machines, or on `least`. spikes: how many; each lasts until serving has what it needs and
    held_s longer, or patience_s."""

    scene: Scene
    job: Tiny
    least: int = 1
    spikes: int = 2
    held_s: float = 5.0
    patience_s: float = 60.0


@dataclass
class Shares:
    """What came of it. served: of the requests. report: the job's. steps: of the loop. alive: of
    the job's processes, afterwards. rate: tokens/s of one replica, as measured before."""

    served: Outcome = field(default_factory=Outcome)
    report: Report = field(default_factory=lambda: Report(0))
    alive: int = 0
    rate: float = 0.0

    @property
    def steps(self) -> list[Step]:
        """Of the loop, from its log."""
        return [STEP.validate_json(line) for line in self.served.log[1:]]

    def asked(self, act: type[Yield] | type[Return]) -> list[tuple[Step, Yield | Return]]:
        """Each machine's handing over, where the loop first asked for it."""
        found: list[tuple[Step, Yield | Return]] = []
        before: set[str] = set()
        for step in self.steps:
            now = [a for a in step.decision.actions if isinstance(a, act)]
            found += [(step, a) for a in now if a.machine not in before]
            before = {a.machine for a in now}
        return found


def play(drill: Drill, folder: Path) -> Shares:
    """The whole of it; about two minutes for the proof."""
    return asyncio.run(_play(drill, folder))


async def _play(drill: Drill, folder: Path) -> Shares:
    shares = Shares()
    async with rented(MARKET, folder) as provider, served(drill.scene, folder) as service:
        machines = await _begun(provider, service)
        shares.rate = await _trial(drill.scene, service, shares.served)
        async with (
            _training(drill, machines[:2], shares) as (yielding, thread),
            _driven(drill.scene, provider, service, yielding, shares),
        ):
            await _spikes(drill, service, shares.served, yielding)
            await asyncio.to_thread(thread.join)
        shares.served.seen = dict(service.launcher.seen)
    shares.served.left_over = len(worker_bodies(folder / "machines").alive())
    shares.alive = sum(_lives(pid) for pid in hellos(shares.report).values())
    return shares


async def _begun(provider: LocalProvider, service: MachineService) -> list[str]:
    """Two machines for the job, then one with a replica."""
    tokens = (f"{JOB}/0", f"{JOB}/1", "decode/before/1")
    made = [await provider.launch(OFFER, token) for token in tokens]
    await until(lambda: all(m.state == "running" for m in provider.ledger.machines.values()))
    await service.controller.place("decode", [made[-1].id])
    await until(lambda: len(service.ingress.directory.ready("decode")) == 1)
    return [machine.id for machine in made]


async def _trial(scene: Scene, service: MachineService, outcome: Outcome) -> float:
    """Tokens/s of one replica that has always something to do."""
    begun_s, waiting = service.clock.now_s(), iter(range(TRIAL))
    await asyncio.gather(
        *(stream(scene, service, outcome, waiting) for _ in range(min(scene.streams, TRIAL)))
    )
    made = sum(len(tokens) for tokens in outcome.tokens.values())
    asked = sum(len(scene.requests(n).prompt) for n in range(TRIAL))
    service.meter.take()
    return (made + asked) / (service.clock.now_s() - begun_s)


@asynccontextmanager
async def _training(
    drill: Drill, machines: list[str], shares: Shares
) -> AsyncIterator[tuple[Yielding, threading.Thread]]:
    """The job in a thread of its own; its end is waited for, by its own deadline."""
    launcher = ProcessLauncher(partial(build, drill.job), preload=PRELOAD)
    policy = Policy(2, least=drill.least)
    supervisor = Supervisor(policy, launcher, machines=tuple(machines))
    yielding = Yielding(
        JOB,
        supervisor,
        wanted=2,
        machine_usd_per_h=USD_PER_H,
        value_usd_per_h=2 * USD_PER_H,
        guess_s=2.0,
    )
    shares.report = supervisor.report
    thread = threading.Thread(target=supervisor.run, args=(JOB_DEADLINE_S,), name="supervisor")
    thread.start()
    try:
        await until(lambda: len(_finished(shares.report)) >= 5)
        yield yielding, thread
    finally:
        await asyncio.to_thread(thread.join)


@asynccontextmanager
async def _driven(
    scene: Scene,
    provider: LocalProvider,
    service: MachineService,
    yielding: Yielding,
    shares: Shares,
) -> AsyncIterator[None]:
    """The loop over both, as `scene` has it but for the measured rate."""
    clock, log = service.clock, io.BytesIO()
    settings = scene.autoscale.model_dump()
    settings["decode"]["tokens_per_s"] = shares.rate
    scaled = AutoscaleSettings.model_validate(settings)
    serving = Served(
        service.controller, service.meter, service.ingress.backlog, scaled.drain_s, clock
    )
    actuator = Shared(serving, {JOB: yielding}, scaled.drain_s, clock, provider)
    head = head_of(scaled, "shared")
    driver = Driver(provider, actuator, make_loop(head), clock, FileLog(log, head))
    stop = asyncio.Event()
    driving = asyncio.create_task(driver.run(stop))
    try:
        # What the first step sees is what the forecast begins with: an idle service.
        await asyncio.sleep(2 * scaled.period_s)
        yield
    finally:
        stop.set()
        await driving
        shares.served.log = log.getvalue().splitlines()


async def _spikes(
    drill: Drill, service: MachineService, outcome: Outcome, yielding: Yielding
) -> None:
    """Quiet and spikes in turns, the last one followed by quiet until all is as before."""
    numbers = iter(range(TRIAL, 1_000_000))

    def second() -> bool:
        return len(service.ingress.directory.ready("decode")) == 2 or not yielding.claim().wanted

    for _ in range(drill.spikes):
        await _quiet(drill, service, outcome, numbers, 2.0)
        spike = _Spike(numbers)
        streams = [stream(drill.scene, service, outcome, spike) for _ in range(drill.scene.streams)]
        loaded = asyncio.gather(*streams)
        await _at_most(drill.patience_s, second)
        await asyncio.sleep(drill.held_s)
        spike.over = True
        await loaded
        await _quiet(
            drill,
            service,
            outcome,
            numbers,
            drill.patience_s,
            lambda: yielding.claim().wanted == 0 or len(yielding.claim().machines) == 2,
        )


class _Spike:
    """Numbers, until it is over."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.over, self._numbers = False, numbers

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.over:
            raise StopIteration
        return next(self._numbers)


async def _quiet(
    drill: Drill,
    service: MachineService,
    outcome: Outcome,
    numbers: Iterator[int],
    lasts_s: float,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """One request now and then, for so long or until it is enough."""
    end_s = service.clock.now_s() + lasts_s
    while service.clock.now_s() < end_s and not enough():
        begun_s = service.clock.now_s()
        await stream(drill.scene, service, outcome, iter([next(numbers)]))
        await asyncio.sleep(max(0.5, REST * (service.clock.now_s() - begun_s)))


async def _at_most(patience_s: float, condition: Callable[[], bool]) -> None:
    end_s = WallClock().now_s() + patience_s
    while not condition() and WallClock().now_s() < end_s:
        await asyncio.sleep(0.05)


def _finished(report: Report) -> list[Finished]:
    return [entry.what for entry in list(report.journal) if isinstance(entry.what, Finished)]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def quietly(drill: Drill) -> Scene:
    """The scene of the run that nobody disturbs: the same requests on one machine that stays."""
    return replace(drill.scene, market=MARKET, quiet_machines=1)
