"""The contract between the loop and whatever runs replicas on machines: the served model, or a
simulated one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autoscale.loop.signals import RoleLoad, TrainingClaim


@dataclass(frozen=True)
class Service:
    """The service as it is. roles: machine id -> the role whose replica is on it, starting, ready
    or draining ("train/JOB": a training job's). ready: machines whose replica answers. draining:
    machines whose replica takes no new work; idle: machines where nothing runs or waits. Machines
    without a replica are in none of these."""

    load: Mapping[str, RoleLoad]
    roles: Mapping[str, str]
    ready: frozenset[str]
    draining: frozenset[str]
    idle: frozenset[str]
    training: tuple[TrainingClaim, ...] = ()


class Actuator(Protocol):
    """Each call is idempotent, and may fail or hang: then it is made again, if it is still wanted.
    Machine ids are the provider's."""

    async def signals(self) -> Service:
        """The service now; RoleLoad counts since the last call that returned."""
        ...

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        """The role has a replica on each of these machines (started where there is none) and gives
        new work to no other. A replica that is draining goes on draining, and one whose machine
        is in no list is stopped."""
        ...

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        """Returns at once. No new work for the machine; by deadline_s (of the shared clock) nothing
        may be left on it: what cannot end there by then is moved. `idle` tells that it is done."""
        ...

    async def yield_machine(self, job: str, machine_id: str) -> None:
        """The training job lets go of the machine. Returns when it has."""
        ...

    async def return_machine(self, job: str, machine_id: str) -> None:
        """The training job may use the machine."""
        ...
