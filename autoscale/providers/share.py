"""One machine shared by a served model and a training job, under the control loop.

Machines are worker processes of this computer; replicas live in them, and the job's workers beside
them, as its claim says. All of it ends with this process, or with the next one on the same folder.
"""

import asyncio
import contextlib
import fcntl
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Decision, Serve
from autoscale.loop.drive import Driver
from autoscale.loop.record import FileLog, head_of, make_loop
from autoscale.loop.signals import Signals
from autoscale.loop_view import said
from autoscale.providers.local.ledger import Ledger
from autoscale.providers.local.local import LocalProvider
from autoscale.providers.local.market import LocalMarket
from autoscale.providers.local.workers import worker_bodies
from autoscale.providers.served import Served
from autoscale.providers.shared import Job, Shared
from cluster.clock import WallClock
from cluster.settings import Settings
from cluster.settings.losses import quality_cost
from models.load import load_text
from serve.app import context_tokens, model_name, traces
from serve.http import EdgeSettings, build_app
from serve.keys import load_keys
from serve.machines.service import MachineService

STARTUP_S = 5.0  # of a machine, as the loop reckons
LOOK_S = 0.2


class Trained(Job, Protocol):
    """A job that is started on machines, and ends by itself or when it is asked to."""

    name: str
    wanted: int
    usd_per_machine_h: float
    failure: str

    @property
    def over(self) -> bool: ...
    def start(self, machines: tuple[str, ...]) -> None: ...
    def ask_to_stop(self) -> None: ...
    def said(self) -> str: ...


class Sharing:
    """`run` until SIGINT or SIGTERM. say: tells a person what happens."""

    def __init__(self, settings: Settings, job: Trained, say: Callable[[str], None]) -> None:
        self.settings = for_machines(settings)
        self.job, self.say = job, say
        self.folder = Path(settings.data_dir) / "share"
        self.log = self.folder / "loop.jsonl"
        self.clock = WallClock()
        floor = max(1, self.settings.autoscale.decode.floor)
        price = job.usd_per_machine_h
        quota = job.wanted + floor
        self.offer = Offer(
            "here", "cpu", 1, "here", "here", "on_demand", price, startup_s=STARTUP_S, quota=quota
        )

    async def run(self) -> None:
        """ValueError when another one has the folder."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(_alone(self.folder))
            provider = await held.enter_async_context(self._machines())
            folder = self.folder / "machines"
            service = await held.enter_async_context(MachineService(self.settings, folder))
            await self._begun(provider, stop)
            jobs: dict[str, Job] = {self.job.name: self.job}
            driver = await held.enter_async_context(self._driven(provider, service, jobs))
            await held.enter_async_context(self._http(service, stop))
            self.say(f"What the loop decides: sanderling plan {self.log}")
            await self._watched(provider, driver, jobs, stop)

    @contextlib.asynccontextmanager
    async def _machines(self) -> AsyncIterator[LocalProvider]:
        """A provider whose machines end with it; what a killed one left ends first."""
        bodies = worker_bodies(self.folder / "machines")
        for machine in bodies.alive():
            bodies.kill(machine)
        shutil.rmtree(self.folder / "market", ignore_errors=True)
        market = LocalMarket((self.offer,), (), 0.0)
        provider = LocalProvider(Ledger(self.folder / "market"), market, bodies, self.clock)
        watch = asyncio.create_task(provider.watch())
        try:
            yield provider
        finally:
            watch.cancel()
            provider.close()

    @contextlib.asynccontextmanager
    async def _driven(
        self, provider: LocalProvider, service: MachineService, jobs: dict[str, Job]
    ) -> AsyncIterator[Driver]:
        scaled = self.settings.autoscale
        meter, backlog = service.meter, service.ingress.backlog
        served = Served(service.controller, meter, backlog, scaled.drain_s, self.clock)
        actuator = Shared(served, jobs, scaled.drain_s, self.clock, provider)
        head = head_of(scaled, f"share-{secrets.token_hex(4)}")
        stop = asyncio.Event()
        with self.log.open("wb") as file:
            log = _Told(FileLog(file, head), self.say)
            driver = Driver(provider, actuator, make_loop(head), self.clock, log)
            driving = asyncio.create_task(driver.run(stop))
            try:
                yield driver
            finally:
                stop.set()
                await driving

    async def _begun(self, provider: LocalProvider, stop: asyncio.Event) -> None:
        """The job on machines of its own, and those that serving begins with."""
        floor = self.settings.autoscale.decode.floor
        tokens = [f"train/{self.job.name}/{number}" for number in range(self.job.wanted)]
        tokens += [f"decode/begun/{number}" for number in range(floor)]
        made = [await provider.launch(self.offer, token) for token in tokens]
        ids = [machine.id for machine in made]
        there = provider.ledger.machines
        while not stop.is_set() and any(there[name].state == "pending" for name in ids):
            await self.clock.sleep(LOOK_S)
        self.job.start(tuple(ids[: self.job.wanted]))
        self.say(f"Training {self.job.name} on {self.job.wanted} machines")

    @contextlib.asynccontextmanager
    async def _http(self, service: MachineService, stop: asyncio.Event) -> AsyncIterator[None]:
        """OpenAI's routes over the service."""
        http, app = self.settings.http, await asyncio.to_thread(self._app, service)
        config = uvicorn.Config(
            app,
            host=http.host,
            port=http.port,
            log_level="warning",
            timeout_graceful_shutdown=int(http.drain_s),
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve())
        serving.add_done_callback(lambda _: stop.set())
        self.say(f"Serving {self.settings.model} at http://{http.host}:{http.port}/v1")
        try:
            yield
        finally:
            server.should_exit = True
            await serving

    def _app(self, service: MachineService) -> Any:
        settings = self.settings
        edge = EdgeSettings(
            model=model_name(settings),
            context_tokens=context_tokens(settings),
            max_body_bytes=settings.http.max_body_bytes,
            keys=load_keys(settings.http),
            quality_cost=quality_cost(settings),
        )
        text = load_text(settings.model)
        return build_app(service.meter, text, edge, traces=traces(settings))

    async def _watched(
        self, provider: LocalProvider, driver: Driver, jobs: dict[str, Job], stop: asyncio.Event
    ) -> None:
        """Until told to stop. A job that is over gives back the machines that it has not lent."""
        while not stop.is_set():
            await self.clock.sleep(LOOK_S)
            if not (jobs and self.job.over):
                continue
            jobs.clear()
            self.say(f"{self.job.name}: {self.job.said()}")
            for machine in await provider.machines():
                if machine.token.startswith("train/") and machine.id not in driver.state.lent:
                    await provider.terminate(machine.id)
        self.job.ask_to_stop()
        while not self.job.over:
            await self.clock.sleep(LOOK_S)


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Told:
    """A log of which a person hears what was done, but for what only follows from it."""

    def __init__(self, inner: FileLog, say: Callable[[str], None]) -> None:
        self._inner, self._say = inner, say

    def note(self, signals: Signals, decision: Decision) -> None:
        self._inner.note(signals, decision)
        for action in decision.actions:
            if not isinstance(action, Serve):
                self._say(f"{decision.number}: {said(action)}")


def for_machines(settings: Settings) -> Settings:
    """As they are for replicas on machines without Ray: decode computes prompts as well."""
    prefill = settings.prefill.model_copy(update={"replicas": 0})
    none = settings.autoscale.prefill.model_copy(update={"floor": 0, "cap": 0, "on_demand": 0})
    scaled = settings.autoscale.model_copy(update={"prefill": none})
    return settings.model_copy(update={"prefill": prefill, "autoscale": scaled})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another `sanderling share` has {folder}; another data_dir is accepted"
            ) from None
        yield
