"""Requests on rented machines as a service for the loop: the contract of autoscale/loop/actuator in
virtual time. Decode computes prompts itself, as a service without prefill replicas does."""

from collections.abc import Sequence
from dataclasses import dataclass

from autoscale.loop.actuator import Service
from autoscale.loop.signals import RoleLoad
from autoscale.simulate.rented import MarketProvider, SteppedClock
from autoscale.simulate.requests import Quantiles, RequestLoad
from autoscale.spot.fleet import Node


@dataclass(frozen=True)
class Replica:
    """On a machine, answering from ready_s on. node: the number that the requests know it by."""

    node: Node
    machine: str


class SimulatedService:
    """Replicas that start with their machines and serve a stream of requests. Implements
    `Actuator`."""

    def __init__(self, provider: MarketProvider, load: RequestLoad, clock: SteppedClock) -> None:
        self.provider, self.load, self.clock = provider, load, clock
        self.replicas: dict[str, Replica] = {}
        self._leave_s: dict[str, float] = {}  # draining machine -> deadline
        self._count = 0
        self._offers = {offer.name: offer for offer in provider.market.offers}

    async def signals(self) -> Service:
        load, now_s = self.load, self.clock.now_s()
        ready = {name for name, one in self.replicas.items() if one.node.ready_s <= now_s}
        running = {name: load.running(one.node.id) for name, one in self.replicas.items()}
        slots = load.speed.slots * len(ready)
        p90_s = load.recent_first_s.at(0.9) if load.recent_first_s.total else None
        decode = RoleLoad(
            load.arrived_tokens,
            load.queued_tokens,
            sum(running.values()),
            min(1.0, sum(running.values()) / slots) if slots else 0.0,
            p90_s,
        )
        load.arrived_tokens, load.recent_first_s = 0, Quantiles()
        draining = self._leave_s.keys()
        return Service(
            {"decode": decode},
            dict.fromkeys(self.replicas, "decode"),
            frozenset(ready - draining),
            frozenset(draining),
            frozenset(name for name in draining if not running[name]),
        )

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        now_s = self.clock.now_s()
        for name in machine_ids:
            machine = self.provider.rented.get(name)
            if name in self.replicas or machine is None:
                continue
            offer = self._offers[machine.offer]
            self._count += 1
            ready_s = max(now_s, machine.launched_s + offer.startup_s)
            node = Node(self._count, offer, machine.launched_s, ready_s)
            self.replicas[name] = Replica(node, name)
        for name in set(self.replicas) - set(machine_ids) - self._leave_s.keys():
            self._remove([name])

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        replica = self.replicas.get(machine_id)
        if replica is not None:
            self._leave_s[machine_id] = deadline_s
            self.load.draining.add(replica.node.id)

    async def yield_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"{job}: no training is simulated")

    async def return_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"{job}: no training is simulated")

    def gone(self, machines: Sequence[str]) -> None:
        """What ran on these machines goes on elsewhere, or begins again."""
        self._remove([name for name in machines if name in self.replicas])

    def advance(self, from_s: float, until_s: float) -> None:
        """Serve the requests of this time; what was given back meanwhile is no more."""
        self.gone([name for name in self.replicas if name not in self.provider.rented])
        self.load.advance(from_s, until_s, [one.node for one in self.replicas.values()])

    def answering(self) -> int:
        """Replicas that take work now."""
        now_s = self.clock.now_s()
        ready = [name for name, one in self.replicas.items() if one.node.ready_s <= now_s]
        return len(set(ready) - self._leave_s.keys())

    def _remove(self, names: Sequence[str]) -> None:
        nodes = [self.replicas.pop(name).node for name in names]
        for name in names:
            self._leave_s.pop(name, None)
        self.load.draining -= {node.id for node in nodes}
        self.load.lost(self.clock.now_s(), nodes)
