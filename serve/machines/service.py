"""Controller and ingress in this process over replicas on machines; `ingress` is the Service."""

import asyncio
from pathlib import Path

from cluster.clock import WallClock
from cluster.settings import Settings
from serve.backlog import Backlog
from serve.controller import Controller, Patience
from serve.directory import Directory
from serve.follow import follow
from serve.ingress import Ingress
from serve.machines.launcher import MachineLauncher
from serve.meter import Meter
from serve.prefixes import placed_prefixes


class MachineService:
    """A service that has no replica until `controller.place` names machines. `folder`: as of
    MachineLauncher; keep strangers out of it. meter: the ingress, with what is asked of it counted;
    it is what requests go through."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        clock = WallClock()
        self.launcher = MachineLauncher(settings, folder)
        self.controller = Controller(
            self.launcher,
            {"prefill": 0, "decode": 0},
            Patience(**settings.controller.model_dump()),
            clock,
        )
        limits = settings.admission
        self.ingress = Ingress(
            "ingress-1",
            self.launcher.connect_decode,
            prefixes=placed_prefixes(settings),
            backlog=Backlog(limits.max_queued_tokens, limits.max_queued_requests, clock),
            patience_s=settings.controller.start_deadline_s,
            clock=clock,
        )
        self.meter = Meter(self.ingress, clock)
        self.clock = clock

    async def __aenter__(self) -> "MachineService":
        await self.controller.start()
        self._follower = asyncio.create_task(
            follow(self.controller.watch, self._update, self.clock)
        )
        return self

    def _update(self, directory: Directory) -> None:
        self.launcher.update(directory)
        self.ingress.update(directory)

    async def __aexit__(self, *_: object) -> None:
        self._follower.cancel()
        await self.ingress.stop()
        await self.controller.stop()
        await self.launcher.close()
