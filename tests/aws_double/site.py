"""The provider contract's `Site` over the double: A10Gs in us-east-1a (spot, two types) and on
demand elsewhere."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from autoscale.catalog.offer import Offer
from autoscale.providers.aws.build import from_settings
from autoscale.providers.aws.calls import Calls
from autoscale.providers.aws.provider import AwsProvider
from autoscale.providers.provider import Provider
from cluster.clock import VirtualClock
from cluster.settings import Settings
from tests.autoscale.providers.suite import NOTICE_S, STARTUP_S
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.market import Step

BEGIN_S = 1_767_225_600.0  # 2026-01-01
SPOT, OTHER = "spot-a10gx1-us-east-1a", "on-demand-a10gx1-us-east-1b"
ZONE = "us-east-1a"
T = TypeVar("T")


def settings(**more: Any) -> Settings:
    """Of a cluster that buys A10Gs of one GPU."""
    aws: dict[str, Any] = {
        "launch_template": "sanderling",
        "region": "us-east-1",
        "types": "g5.xlarge,g5.2xlarge",
        "quota": 4,
        "startup_s": STARTUP_S,
        **more,
    }
    return Settings.model_validate({"autoscale": {"aws": aws}})


class AwsSite:
    """See Site. Use it after `await begin()`. more: of [autoscale.aws]."""

    spot: Offer
    other: Offer
    provider: Provider

    def __init__(self, cloud: AwsCloud, folder: Path, **more: Any) -> None:
        self.cloud, self.folder, self.more = cloud, folder, more
        self.clock = VirtualClock(start_s=1000.0)
        self.market = cloud.begin(self.wall)
        self.market.startup_s = STARTUP_S
        self.notice_s = NOTICE_S
        self.wrap: Callable[[Provider], Provider] = lambda provider: provider
        self.made: list[AwsProvider] = []
        self.busy = 0

    async def begin(self) -> "AwsSite":
        self.market.notice_s = self.notice_s
        self.provider = self.again()
        offers = {offer.name: offer for offer in await self.provider.offers()}
        self.spot, self.other = offers[SPOT], offers[OTHER]
        return self

    def wall(self) -> float:
        """The calendar runs with the clock."""
        return BEGIN_S + self.clock.now_s()

    def again(self) -> Provider:
        self.made.append(
            from_settings(
                settings(**{"queue_url": self.cloud.queue_url, **self.more}),
                self.clock,
                folder=self.folder,
                wall=self.wall,
                draw=random.Random(1),
                clients=self.cloud.client,
                notice_s=self.notice_s,
            )
        )
        self._count(self.made[-1].calls)
        return self.wrap(self.made[-1])

    def _count(self, calls: Calls) -> None:
        """So that time does not pass while a call is under way."""
        real = calls._in_thread

        async def counted(*given: Any) -> dict[str, Any]:
            self.busy += 1
            try:
                return await real(*given)
            finally:
                self.busy -= 1

        calls._in_thread = counted  # type: ignore[method-assign, assignment]

    @property
    def aws(self) -> AwsProvider:
        """The provider itself, whatever is around it."""
        return self.made[-1]

    async def waits(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call returns or raises, with time passing for as long as it sleeps."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await others_rest()
            if self.busy:
                await asyncio.sleep(0.001)
            elif self.clock._sleepers and not task.done():
                await self.clock.advance(self.clock._sleepers[0][0] - self.clock.now_s())
        return task.result()

    async def passes(self, duration_s: float) -> None:
        """In small steps, at each of which the cloud does what is due."""
        for _ in range(10):
            await self.clock.advance(duration_s / 10)
            self.market.tick()

    def limit(self, machines: int, in_s: float = 0.0) -> None:
        self.market.steps.append(Step(self.wall() + in_s, ZONE, machines))

    def alive(self) -> set[str]:
        return self.cloud.alive()

    def now_s(self) -> float:
        return self.clock.now_s()


async def others_rest() -> None:
    """Until every other task waits for time or for a thread. A count of turns would not do: who is
    on its way from one call to the next would find that its deadline has passed."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    while ready:
        await asyncio.sleep(0)


def played(
    cloud: AwsCloud, folder: Path, work: Callable[[AwsSite], Awaitable[None]], **more: Any
) -> None:
    """A piece of work on a fresh site."""

    async def going() -> None:
        await work(await AwsSite(cloud, folder, **more).begin())

    asyncio.run(going())
