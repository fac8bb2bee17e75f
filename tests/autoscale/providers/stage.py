"""The controller over the API server's double, its cluster and a served model, in compressed time:
what happens is real HTTP and real decisions, only the clock is set forward."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from autoscale.loop.record import head_of, make_loop
from autoscale.providers.controller import Controller
from autoscale.providers.kubernetes.api import Api, connect
from autoscale.providers.kubernetes.lease import Election
from autoscale.providers.kubernetes.ledger import KEY as LEDGER
from autoscale.providers.kubernetes.ledger import Ledger, read
from autoscale.providers.kubernetes.provider import KubernetesProvider
from autoscale.providers.remote import Remote
from cluster.clock import VirtualClock
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale, RoleScale
from cluster.settings.kubernetes import KubernetesSettings
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.rbac import account
from tests.kubernetes_double.served import KEY, Served
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import group, install
from tests.kubernetes_double.store import At, Store

EPOCH_S = 1_800_000_000.0
USER = account("default", "sanderling-controller")
GROUPS = (
    group("spot-a", "spot", 8, 0.2, replicas=1),
    group("spot-b", "spot", 8, 0.3, replicas=1),
    group("on-demand", "on_demand", 8, 0.5, replicas=1),
)
FLOOR, ON_DEMAND = 3, 1
SETTINGS = AutoscaleSettings(
    provider="kubernetes",
    policy="spothedge",
    over=0,
    period_s=10.0,
    up_delay_s=0.0,
    down_delay_s=60.0,
    give_up_s=300.0,
    drain_s=20.0,
    decode=DecodeScale(floor=FLOOR, cap=8, on_demand=ON_DEMAND, tokens_per_s=100.0),
    prefill=RoleScale(cap=0),
)


@dataclass
class Seen:
    """Of each step after all were there: answering: replicas that take work; on_demand: of them,
    those on machines bought on demand; existing: pods on machines."""

    answering: list[int] = field(default_factory=list)
    on_demand: list[int] = field(default_factory=list)
    existing: list[int] = field(default_factory=list)


class Stage:
    """controllers: of which the first is alone unless a test adds others."""

    def __init__(self, folder: Path, *, enforce: bool = False) -> None:
        self.folder, self.clock = folder, VirtualClock(start_s=1000.0)
        self.double = Double(Store(self.wall_s), enforce=enforce)
        self.cluster = Cluster(self.double.store, Cloud(notice_s=120.0, startup_s=60.0))
        self.cluster.grace_s = 5.0
        self.served = Served(self.cluster, tokens_per_s=150.0)
        self.controllers: list[Controller] = []
        self.elections: list[Election] = []
        self.seen = Seen()
        self.settings = SETTINGS
        self.stack = AsyncExitStack()
        self.awaited = ""  # a pod, and when it was first seen to be gone
        self.gone_s: float | None = None
        self.asleep: set[int] = set()  # controllers that hang: places in the list

    def wall_s(self) -> float:
        return EPOCH_S + self.clock.now_s()

    def api(self, user: str = USER) -> Api:
        config = self.double.kubeconfig(self.folder / "kubeconfig", user)
        return connect(KubernetesSettings(kubeconfig=str(config), namespace="default"))

    async def add(self, name: str) -> Controller:
        """One controller more, as its process makes it."""
        chosen = self.settings.kubernetes
        provider = KubernetesProvider(self.api(), chosen, self.clock, self.wall_s, lambda _: None)
        election = Election(self.api(), chosen.lease, name, chosen.lease_s, self.clock, self.wall_s)
        transport = httpx.ASGITransport(app=self.served.app())
        client = httpx.AsyncClient(transport=transport, base_url="http://served")
        await self.stack.enter_async_context(client)
        remote = Remote(
            client,
            KEY,
            self.settings.drain_s,
            self.clock,
            lambda machine: provider.pods.get(machine, ""),
        )
        pools = ("spot-a", "spot-b")
        controller = Controller(
            provider,
            remote,
            election,
            lambda loop: make_loop(head_of(self.settings, loop, pools=pools)),
            self.settings,
            self.clock,
        )
        remote.machines = lambda: [machine.id for machine in controller.provider.known]
        self.controllers.append(controller)
        self.elections.append(election)
        return controller

    async def step(self, watched: bool = True) -> None:
        """A period passes, in which the cluster is never late; then every controller has a turn."""
        for part in range(5):
            await self.clock.advance(self.settings.period_s / 5)
            self.cluster.tick()
            self._look(watched)
            if part % 2 == 0:
                await self._renew()
        pairs = list(zip(self.controllers, self.elections, strict=True))
        for place, (controller, election) in enumerate(pairs):
            if election.leads() and place not in self.asleep:
                await controller.once()
            self.cluster.tick()
            self._look(watched)

    async def _renew(self) -> None:
        for place, election in enumerate(self.elections):
            if place not in self.asleep:
                await election.once()

    async def steps(self, many: int, watched: bool = True) -> None:
        for _ in range(many):
            await self.step(watched)

    def _look(self, watched: bool) -> None:
        if not watched:
            return
        names = self.served.answering()
        self.seen.answering.append(len(names))
        self.seen.on_demand.append(sum("on-demand" in name for name in names))
        there = self.existing()
        self.seen.existing.append(len(there))
        if self.gone_s is None and self.awaited and self.awaited not in there:
            self.gone_s = self.clock.now_s()

    def existing(self) -> list[str]:
        """Pods of our groups that are on a machine: what is paid for. Read from the store."""
        groups = [each["groupName"] for each in GROUPS]
        pods = [pod for name in groups for pod in self.cluster.workers(name)]
        return [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName")]

    def ledger(self) -> Ledger:
        """As it is kept."""
        at = At("", "v1", "configmaps", "default", self.settings.kubernetes.lease)
        return read(self.double.store.get(at)["data"][LEDGER], "the test")

    def orphans(self) -> set[str]:
        """Pods on machines that no launch knows, and nodes of ours without a pod."""
        held = [entry for entry in self.ledger().entries if entry.gone_s is None]
        if not all(entry.pod for entry in held):
            return {"a launch without a pod"}
        known = {entry.pod for entry in held}
        dying = {
            pod["metadata"]["name"]
            for pod in self.cluster.workers()
            if pod["metadata"].get("deletionTimestamp")
        }
        nodes = self.double.store.list(At("", "v1", "nodes"))[0]
        mine = {n["metadata"]["name"] for n in nodes if "-ingress-" not in n["metadata"]["name"]}
        empty = mine - {f"node-of-{name}" for name in self.existing()} - {"system"}
        return (set(self.existing()) - known - dying) | empty

    def replicas(self) -> dict[str, int]:
        """What the RayCluster says."""
        [cluster] = self.double.store.list(At("ray.io", "v1", "rayclusters"))[0]
        return {g["groupName"]: g["replicas"] for g in cluster["spec"]["workerGroupSpecs"]}


@asynccontextmanager
async def stage(
    folder: Path, names: tuple[str, ...] = ("one",), **more: Any
) -> AsyncIterator[Stage]:
    """A stage whose cluster has a service on three machines, and controllers of these names, that
    have found it and placed its replicas."""
    made = Stage(folder, **more)
    async with made.stack as stack:
        stack.enter_context(made.double)
        install(made.double, *GROUPS)
        made.cluster.tick()
        await made.clock.advance(70.0)
        made.cluster.tick()
        for name in names:
            await made.add(name)
        await made.steps(4, watched=False)
        yield made
