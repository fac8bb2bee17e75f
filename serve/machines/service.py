"""Controller and ingress in this process over replicas on machines; `ingress` is the Service."""

from pathlib import Path

from cluster.clock import WallClock
from cluster.settings import Settings
from serve.in_process import InProcessService
from serve.machines.launcher import MachineLauncher
from serve.meter import Meter


class MachineService(InProcessService):
    """A service that has no replica until `controller.place` names machines. `folder`: as of
    MachineLauncher; keep strangers out of it. meter: the ingress, with what is asked of it counted;
    it is what requests go through."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        clock, patience_s = WallClock(), settings.controller.start_deadline_s
        self.launcher = MachineLauncher(settings, folder)
        super().__init__(settings, self.launcher, {"prefill": 0, "decode": 0}, patience_s, clock)
        self.meter = Meter(self.ingress, clock)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await self.launcher.close()
