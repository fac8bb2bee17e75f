"""The loop's actuator over a served model whose replicas stand on named machines."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from autoscale.loop.actuator import Service
from autoscale.loop.signals import RoleLoad
from cluster.clock import Clock
from serve.backlog import Backlog
from serve.controller import Controller
from serve.directory import Entry
from serve.meter import Meter, p90
from serve.places import machine_of
from serve.state import Role

ROLES: Mapping[str, Role] = {"decode": "decode", "prefill": "prefill"}


class Served:
    """See autoscale.loop.actuator.Actuator. meter and backlog: of the service's one ingress.
    drain_s: what a replica that is wanted no more has to finish, unless a drain says less."""

    def __init__(
        self, controller: Controller, meter: Meter, backlog: Backlog, drain_s: float, clock: Clock
    ) -> None:
        self.controller = controller
        self.meter = meter
        self.backlog = backlog
        self.drain_s = drain_s
        self.clock = clock

    async def signals(self) -> Service:
        entries = [e for e in self.controller.directory().entries if machine_of(e.replica_id)]
        return Service(
            self._load(entries),
            {machine_of(entry.replica_id): entry.role for entry in entries},
            _machines(entry for entry in entries if entry.phase == "ready"),
            _machines(entry for entry in entries if entry.phase == "draining"),
            _machines(entry for entry in entries if _idle(entry)),
        )

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        await self.controller.place(_role(role), machine_ids, self.drain_s)

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        await self.controller.leave(machine_id, max(0.0, deadline_s - self.clock.now_s()))

    def occupied(self, machine_id: str) -> bool:
        """Whether a replica is on the machine: starting, ready or draining."""
        entries = self.controller.directory().entries
        return any(machine_of(entry.replica_id) == machine_id for entry in entries)

    async def yield_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"no training job {job!r} shares machines with this service")

    async def return_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"no training job {job!r} shares machines with this service")

    def _load(self, entries: Sequence[Entry]) -> Mapping[str, RoleLoad]:
        """Prompts are prefill's where there is such a replica; all else is decode's."""
        taken, queued = self.meter.take(), self.backlog.tokens
        first_s, token_s = p90(taken.ttft_s), p90(taken.tpot_s)
        if not any(entry.role == "prefill" for entry in entries):
            arrived = taken.prompt_tokens + taken.answer_tokens
            decode = RoleLoad(arrived, queued, *_work(entries, "decode"), first_s, token_s)
            return {"decode": decode}
        decode = RoleLoad(taken.answer_tokens, 0, *_work(entries, "decode"), None, token_s)
        running, used = _work(entries, "prefill")
        return {
            "decode": decode,
            "prefill": RoleLoad(taken.prompt_tokens, queued, running, used, first_s),
        }


def _role(name: str) -> Role:
    if name not in ROLES:
        raise ValueError(f"no role {name!r}; {' and '.join(ROLES)} are served")
    return ROLES[name]


def _machines(entries: Iterable[Entry]) -> frozenset[str]:
    return frozenset(machine_of(entry.replica_id) for entry in entries)


def _work(entries: Sequence[Entry], role: Role) -> tuple[int, float]:
    """Sequences under way, and the share of pages in use, over the replicas of a role."""
    stats = [e.state.stats for e in entries if e.role == role and e.state is not None]
    used = [1 - (s.free_pages + s.evictable_pages) / s.pages for s in stats]
    return sum(s.running for s in stats), fmean(used) if used else 0.0


def _idle(entry: Entry) -> bool:
    """Nothing ran there when it was last looked at. One that drains is idle when it is gone: what
    it got just before it was told may not have been seen."""
    if entry.state is None or entry.phase == "draining":
        return False
    stats = entry.state.stats
    return not (stats.running or stats.waiting or stats.reserved or stats.held)
