"""Training jobs beside a served model on the same machines: one actuator over both.

A machine is never in two hands. A replica is started on it only once no worker of a job is left
there, and a job gets it only once no replica is. Jobs are objects, so that this file knows nothing
of how they train (`train.elastic.yielding.Yielding` is one).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from autoscale.loop.actuator import Actuator, Service
from autoscale.loop.signals import TrainingClaim
from autoscale.providers.provider import Machine, Provider
from cluster.clock import Clock

LOG = logging.getLogger(__name__)
LOOK_S = 0.02  # how often it is looked whether a machine was left


class Claim(Protocol):
    """What a job holds and wants; the fields of autoscale.loop.signals.TrainingClaim."""

    @property
    def machines(self) -> tuple[str, ...]: ...
    @property
    def wanted(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def shrink_usd(self) -> float: ...
    @property
    def value_usd_per_h(self) -> float: ...


class Job(Protocol):
    """A training job that can do with more or fewer machines. All calls return at once."""

    def claim(self) -> Claim:
        """As it is now. A machine is among its machines until nothing of the job is left there."""
        ...

    def give(self, machine: str, notice_s: float) -> None:
        """Begin to leave a machine, within notice_s. Idempotent. ValueError if the job can't do
        without it."""
        ...

    def take(self, machine: str) -> None:
        """Use a machine. Idempotent."""
        ...


class Serving(Actuator, Protocol):
    """The served model's part; see providers.served."""

    def occupied(self, machine_id: str) -> bool:
        """Whether a replica is on the machine, also one that drains."""
        ...


class Shared:
    """See autoscale.loop.actuator.Actuator. jobs: by name; whoever owns the mapping may change it.
    notice_s: how long a job has to end its step, and a replica to drain before a job may have its
    machine. provider: whose machines they are; jobs are told of those that it takes."""

    def __init__(
        self,
        serving: Serving,
        jobs: Mapping[str, Job],
        notice_s: float,
        clock: Clock,
        provider: Provider,
    ) -> None:
        self.serving = serving
        self.jobs = jobs
        self.notice_s = notice_s
        self.clock = clock
        self.provider = provider

    async def signals(self) -> Service:
        if self.jobs:
            self._tell(await self.provider.machines())
        service = await self.serving.signals()
        return replace(service, training=tuple(self._claims()))

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        """A machine that a job has not left yet is left out, and named again by the next step."""
        trained_on = self._trained_on()
        free = [machine for machine in machine_ids if machine not in trained_on]
        await self.serving.set_replicas(role, free)

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        await self.serving.drain(machine_id, deadline_s)

    async def yield_machine(self, job: str, machine_id: str) -> None:
        """ValueError for an unknown job, or one that keeps its machine."""
        giver = self._job(job)
        if machine_id in giver.claim().machines:
            giver.give(machine_id, self.notice_s)
        while machine_id in giver.claim().machines:
            await self.clock.sleep(LOOK_S)

    async def return_machine(self, job: str, machine_id: str) -> None:
        """ValueError for an unknown job."""
        taker = self._job(job)
        if self.serving.occupied(machine_id):
            await self.serving.drain(machine_id, self.clock.now_s() + self.notice_s)
        while self.serving.occupied(machine_id):
            await self.clock.sleep(LOOK_S)
        taker.take(machine_id)

    def _job(self, name: str) -> Job:
        if name not in self.jobs:
            known = ", ".join(sorted(self.jobs)) or "none"
            raise ValueError(
                f"no training job {name!r} shares machines with this service; there are {known}"
            )
        return self.jobs[name]

    def _claims(self) -> list[TrainingClaim]:
        found = {name: job.claim() for name, job in sorted(self.jobs.items())}
        return [
            TrainingClaim(
                name,
                tuple(claim.machines),
                claim.wanted,
                claim.least,
                claim.shrink_usd,
                claim.value_usd_per_h,
            )
            for name, claim in found.items()
        ]

    def _trained_on(self) -> set[str]:
        return {machine for job in self.jobs.values() for machine in job.claim().machines}

    def _tell(self, machines: Sequence[Machine]) -> None:
        """Jobs leave what the provider takes back, by its deadline, and what is gone, now."""
        known = {machine.id: machine for machine in machines}
        for name, job in self.jobs.items():
            for machine_id in job.claim().machines:
                left_s = _left_s(known.get(machine_id), self.clock.now_s())
                if left_s is None:
                    continue
                try:
                    job.give(machine_id, left_s)
                except ValueError as refused:  # it has none to spare: it goes on as long as it can
                    LOG.warning("%s will lose %s: %s", name, machine_id, refused)


def _left_s(machine: Machine | None, now_s: float) -> float | None:
    """Until the machine goes; None for one that stays."""
    if machine is None or machine.state == "gone":
        return 0.0
    return None if machine.doomed_s is None else max(0.0, machine.doomed_s - now_s)
