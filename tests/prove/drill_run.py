"""A drill: the control loop drives a served model over local machines that a trace takes away,
under load. What came of it is a value, for the proof and for its smaller sibling in the tests."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoscale.loop.drive import Driver
from autoscale.loop.record import FileLog, Head, head_of, make_loop, repeat
from autoscale.providers.local.ledger import Ledger
from autoscale.providers.local.local import LocalProvider
from autoscale.providers.local.market import LocalMarket
from autoscale.providers.local.workers import worker_bodies
from autoscale.providers.served import Served
from cluster.clock import WallClock
from cluster.settings import Settings
from cluster.settings.autoscale import AutoscaleSettings
from serve.engine.sequence import Request
from serve.machines.service import MachineService
from serve.state import ReplicaState

READY_S = 120.0
RETRY_S = 1.0


@dataclass(frozen=True)
class Scene:
    """What a drill is played with. requests: the n-th of an endless list. streams: requests under
    way at once. lasts_s: how long new ones are begun."""

    settings: Settings
    autoscale: AutoscaleSettings
    market: LocalMarket
    requests: Callable[[int], Request]
    streams: int
    lasts_s: float
    begin_with: int = 2
    quiet_machines: int = 2

    def head(self) -> Head:
        """What the loop is made of."""
        spot = [offer.name for offer in self.market.offers if offer.market == "spot"]
        return head_of(self.autoscale, "drill", pools=spot)


class Stays(LocalProvider):
    """A machine that was told is not given back early: the market's SIGKILL has to end it, with
    whatever is on it then."""

    async def terminate(self, machine_id: str) -> None:
        self.advance()
        machine = self.ledger.machines.get(machine_id)
        if machine is None or machine.doomed_s is None:
            await super().terminate(machine_id)


@dataclass
class Outcome:
    """tokens: by request's number. lost: what went wrong, by number. seen: the last state of every
    replica. log: the loop's. killed: machines that the market took. moved: requests that went on
    elsewhere. left_over: machines that live on after all of it."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    seen: dict[str, ReplicaState] = field(default_factory=dict)
    log: list[bytes] = field(default_factory=list)
    launched: int = 0
    noticed: int = 0
    killed: int = 0
    moved: int = 0
    left_over: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Computed as prompts, by all replicas."""
        return sum(state.stats.prompt_tokens for state in self.seen.values())

    @property
    def recomputed_tokens(self) -> int:
        """Of them, what another replica had computed before, by their own count."""
        return sum(state.stats.recomputed_tokens for state in self.seen.values())

    @property
    def with_pages(self) -> int:
        """Requests that were taken over with their KV."""
        return sum(state.migrated.requests for state in self.seen.values())

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens + sum(s.stats.generated_tokens for s in self.seen.values())


async def disturbed(scene: Scene, folder: Path) -> Outcome:
    """The service as the loop drives it, while the market gives and takes."""
    outcome, log, clock = Outcome(), io.BytesIO(), WallClock()
    market = scene.market
    first = replace(market, steps=tuple(step for step in market.steps if step.t_s <= 0))
    async with rented(first, folder) as provider, served(scene, folder) as service:
        actuator = Served(
            service.controller,
            service.meter,
            service.ingress.backlog,
            scene.autoscale.drain_s,
            clock,
        )
        head = scene.head()
        driver = Driver(provider, actuator, make_loop(head), clock, FileLog(log, head))
        stop = asyncio.Event()
        driving = asyncio.create_task(driver.run(stop))
        try:
            ingress = service.ingress
            await until(lambda: len(ingress.directory.ready("decode")) >= scene.begin_with)
            provider.market = market.later(clock.now_s() - provider.opened_s)
            await _load(scene, service, outcome, clock.now_s() + scene.lasts_s)
        finally:
            stop.set()
            await driving
        events, _ = await provider.events(0)
        outcome.moved = service.ingress.resumed
        outcome.seen = dict(service.launcher.seen)
    kinds = [event.kind for event in events]
    outcome.launched, outcome.noticed = kinds.count("launch_ok"), kinds.count("notice")
    outcome.killed, outcome.log = kinds.count("preempt"), log.getvalue().splitlines()
    outcome.left_over = len(worker_bodies(folder / "machines").alive())
    return outcome


async def undisturbed(scene: Scene, folder: Path, numbers: Sequence[int]) -> Outcome:
    """The same requests on machines that nobody takes."""
    outcome = Outcome()
    calm = LocalMarket(scene.market.offers, (), scene.market.notice_s)
    offer = calm.offers[0]
    async with rented(calm, folder) as provider, served(scene, folder) as service:
        made = [await provider.launch(offer, f"{n}") for n in range(scene.quiet_machines)]
        await until(lambda: all(m.state == "running" for m in provider.ledger.machines.values()))
        await service.controller.place("decode", [machine.id for machine in made])
        await until(lambda: len(service.ingress.directory.ready("decode")) == scene.quiet_machines)
        waiting = iter(numbers)
        await asyncio.gather(
            *(stream(scene, service, outcome, waiting) for _ in range(scene.streams))
        )
        for replica_id in list(service.launcher.seen):
            await service.launcher.ping(replica_id)
        outcome.seen = dict(service.launcher.seen)
    return outcome


def replayed(log: Sequence[bytes]) -> tuple[int, int]:
    """Steps of a log that are decided alike again, byte for byte; and all of its steps."""
    steps = [step.same for step in repeat(log)]
    return sum(steps), len(steps)


@contextlib.asynccontextmanager
async def rented(market: LocalMarket, folder: Path) -> AsyncIterator[LocalProvider]:
    """A provider of worker processes that does what is due, and that nothing outlives."""
    bodies = worker_bodies(folder / "machines")
    ledger = Ledger(folder / "market")
    provider = Stays(ledger, market, bodies, WallClock(), retry_s=RETRY_S)
    watch = asyncio.create_task(provider.watch())
    try:
        yield provider
    finally:
        watch.cancel()
        provider.close()


@contextlib.asynccontextmanager
async def served(scene: Scene, folder: Path) -> AsyncIterator[MachineService]:
    """The service over machines of the same folder."""
    async with MachineService(scene.settings, folder / "machines") as service:
        yield service


async def _load(scene: Scene, service: MachineService, outcome: Outcome, end_s: float) -> None:
    """A closed loop; what is under way in the end is waited for."""

    def numbers() -> Any:
        number = 0
        while service.clock.now_s() < end_s:
            yield number
            number += 1

    waiting = numbers()
    await asyncio.gather(*(stream(scene, service, outcome, waiting) for _ in range(scene.streams)))
    for entry in service.ingress.directory.entries:
        with contextlib.suppress(Exception):
            await service.launcher.ping(entry.replica_id)


async def stream(scene: Scene, service: MachineService, outcome: Outcome, waiting: Any) -> None:
    """One client: a request after the other, as long as there are numbers."""
    for number in waiting:
        tokens: list[int] = []
        finish = None
        try:
            async with contextlib.aclosing(service.meter.generate(scene.requests(number))) as made:
                async for delta in made:
                    tokens += delta.token_ids
                    finish = delta.finish
        except Exception as error:  # whatever it is, the request is lost
            outcome.lost[number] = f"{type(error).__name__}: {error}"
            continue
        outcome.tokens[number] = tokens
        if finish not in ("stop", "length"):
            outcome.lost[number] = f"it ended with {finish}"


async def until(condition: Callable[[], bool]) -> None:
    """TimeoutError when it has not come true in READY_S."""
    async with asyncio.timeout(READY_S):
        while not condition():
            await asyncio.sleep(0.05)
