"""Controller and ingress in this process, over replicas wherever a launcher starts them: what the
services without Ray (`local.py`, `machines/service.py`) have in common."""

import asyncio
from collections.abc import Mapping
from typing import Protocol, Self

from cluster.clock import Clock
from cluster.settings import Settings
from serve.backlog import Backlog
from serve.clients import DecodeClient
from serve.controller import Controller, Launcher, Patience
from serve.directory import Directory
from serve.follow import follow
from serve.ingress import Ingress
from serve.prefixes import placed_prefixes
from serve.state import Role


class Replicas(Launcher, Protocol):
    """A launcher that also says how its replicas are reached, and tells them of each other."""

    def connect_decode(self, replica_id: str) -> DecodeClient: ...

    def update(self, directory: Directory) -> None: ...


class InProcessService:
    """On the running event loop while it is entered; `ingress` is the Service.

    wanted: replicas of each role at the start. patience_s: how long the ingress waits for one.
    """

    def __init__(
        self,
        settings: Settings,
        replicas: Replicas,
        wanted: Mapping[Role, int],
        patience_s: float,
        clock: Clock,
    ) -> None:
        self._replicas, self.clock = replicas, clock
        patience = Patience(**settings.controller.model_dump())
        self.controller = Controller(replicas, wanted, patience, clock)
        limits = settings.admission
        self.ingress = Ingress(
            "ingress-1",
            replicas.connect_decode,
            prefixes=placed_prefixes(settings),
            backlog=Backlog(limits.max_queued_tokens, limits.max_queued_requests, clock),
            patience_s=patience_s,
            clock=clock,
        )

    async def __aenter__(self) -> Self:
        await self.controller.start()
        self._follower = asyncio.create_task(
            follow(self.controller.watch, self._update, self.clock)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._follower.cancel()
        await self.ingress.stop()
        await self.controller.stop()

    def _update(self, directory: Directory) -> None:
        self._replicas.update(directory)
        self.ingress.update(directory)
