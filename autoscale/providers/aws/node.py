"""What runs beside the replica on a machine from EC2: it watches the metadata service and writes
each notice as a tag on its own machine, where the controller reads it even without a queue.

    python -m autoscale.providers.aws.node          in the launch template's user data
"""

import asyncio
import random

from autoscale.providers.aws import imds, marks
from autoscale.providers.aws.calls import Calls, boto_clients
from autoscale.providers.aws.notices import Notice
from cluster.clock import WallClock


class OwnTags:
    """Tells a notice by a tag."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    async def tell(self, notice: Notice) -> None:
        tag = {"Key": notice.tag, "Value": marks.written(notice.at_s)}
        await self.calls.one("ec2", "create_tags", Resources=[notice.instance], Tags=[tag])


async def run() -> None:
    """Until the machine ends."""
    clock, draw = WallClock(), random.Random()
    async with imds.client() as client:
        service = imds.Imds(client, clock)
        region = await _region(service, clock, draw)
        tags = OwnTags(Calls(boto_clients(region), clock, draw))
        await imds.watch(service, tags.tell, clock, draw)


async def _region(service: imds.Imds, clock: WallClock, draw: random.Random) -> str:
    """The machine's own, as soon as the metadata service answers."""
    failed = 0
    while True:
        try:
            return await service.get("placement/region") or ""
        except imds.ImdsError as error:
            failed = min(failed + 1, 16)
            imds.LOG.warning("instance metadata: %s", error)
            await clock.sleep(imds.PATIENCE.wait_s(failed, draw))


if __name__ == "__main__":
    asyncio.run(run())
