"""Who leads: of several controllers only the one that holds the Lease decides anything.

As client-go has it: a lease that has not changed for its length, by the watcher's own clock, may be
taken over; a leader that could not renew for two thirds of it steps down before anybody else may
begin. Clocks of machines are never compared.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from autoscale.providers.kubernetes.api import Api, ApiFailed, Conflict, Missing
from autoscale.providers.kubernetes.notices import stamp
from cluster.clock import Clock

LOG = logging.getLogger(__name__)
Body = dict[str, Any]
STEP_DOWN, RENEW = 2 / 3, 1 / 5  # of the lease's length


class Election:
    """name: of the lease; me: never the same for two processes. wall_s: seconds since 1970, only
    written for people to read."""

    def __init__(
        self,
        api: Api,
        name: str,
        me: str,
        lease_s: float,
        clock: Clock,
        wall_s: Callable[[], float],
    ) -> None:
        self.api, self.name, self.me, self.lease_s = api, name, me, lease_s
        self.clock, self.wall_s = clock, wall_s
        self.term = 0  # counts the leaders, over all processes
        self._renewed_s: float | None = None
        self._seen: tuple[str, float] = ("", 0.0)  # the lease's version, and since when it is so

    def leads(self) -> bool:
        """Whether nobody else can have begun to lead."""
        if self._renewed_s is None:
            return False
        return self.clock.now_s() - self._renewed_s < self.lease_s * STEP_DOWN

    async def run(self, stop: asyncio.Event) -> None:
        """Try, or renew, until `stop` is set; then give the lease back."""
        while not stop.is_set():
            await self.once()
            await self.clock.sleep(self.lease_s * RENEW)
        await self.resign()

    async def once(self) -> bool:
        """One try, or one renewal. Returns whether we lead."""
        asked_s = self.clock.now_s()
        try:
            held = await asyncio.to_thread(self._try)
        except Conflict:
            held = False  # somebody else wrote: what they wrote is read next time
        except ApiFailed as error:
            LOG.warning("the lease %s: %s", self.name, error)
            return self.leads()
        if held:
            self._renewed_s = asked_s
        elif self._renewed_s is not None:
            LOG.warning("%s leads no more", self.me)
            self._renewed_s = None
        return self.leads()

    async def resign(self) -> None:
        """Let the next one begin at once."""
        if self._renewed_s is None:
            return
        self._renewed_s = None
        try:
            await asyncio.to_thread(self._give_back)
        except ApiFailed as error:
            LOG.warning("the lease %s was not given back: %s", self.name, error)

    def _try(self) -> bool:
        try:
            lease = self.api.get("leases", self.name)
        except Missing:
            self.api.create("leases", self._lease({}, self._taken(0)))
            self.term = 0
            return True
        spec, version = lease.get("spec") or {}, lease["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, self.clock.now_s())
        holder = spec.get("holderIdentity")
        if holder == self.me:
            spec = {**spec, "renewTime": stamp(self.wall_s())}
        elif not holder or self.clock.now_s() - self._seen[1] >= self._length_s(spec):
            spec = self._taken(int(spec.get("leaseTransitions") or 0) + 1)
        else:
            return False
        self.api.replace("leases", self._lease(lease["metadata"], spec))
        self.term = int(spec.get("leaseTransitions") or 0)
        return True

    def _length_s(self, spec: Body) -> float:
        """What its holder promised, or what we would."""
        return max(self.lease_s, float(spec.get("leaseDurationSeconds") or 0))

    def _taken(self, term: int) -> Body:
        now = stamp(self.wall_s())
        whole_s = max(1, round(self.lease_s))
        return {
            "holderIdentity": self.me,
            "leaseDurationSeconds": whole_s,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": term,
        }

    def _lease(self, metadata: Body, spec: Body) -> Body:
        version = metadata.get("resourceVersion")
        kept: Body = {"name": self.name, **({"resourceVersion": version} if version else {})}
        kept |= {k: metadata[k] for k in ("labels", "annotations") if metadata.get(k)}
        about = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        return {**about, "metadata": kept, "spec": spec}

    def _give_back(self) -> None:
        lease = self.api.get("leases", self.name)
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") == self.me:
            spec = {**spec, "holderIdentity": "", "renewTime": stamp(self.wall_s())}
            self.api.replace("leases", self._lease(lease["metadata"], spec))
