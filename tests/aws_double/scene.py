"""The control loop over the AWS double in compressed time: driver, loop and provider are the real
ones; the service is the loop's own plant, whose replicas stand on what EC2 says exists.

Every period what must never happen is counted: `Scene.wrong`.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscale.loop.drive import Driver
from autoscale.loop.step import Loop
from autoscale.providers.provider import Machine, MachineState
from autoscale.spot.hedge import HedgePolicy, Placer
from cluster.settings.autoscale import DecodeScale
from tests.autoscale.loop.plant import PERIOD_S, Kept, Pool, Served
from tests.autoscale.loop.plant import settings as loop_settings
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.site import BEGIN_S, AwsSite

NEED, ON_DEMAND, OVER = 3, 1, 1
WARM = 12  # periods until all that is needed answers, and up delays are over


class OfEc2:
    """What the plant reads of a cloud, from EC2's own books."""

    def __init__(self, site: AwsSite) -> None:
        self.site = site

    @property
    def clock(self) -> "OfEc2":
        return self

    @property
    def time_s(self) -> float:
        return self.site.now_s()

    @property
    def sale(self) -> list[Any]:
        return [mix.offer for mix in self.site.aws.sale.mixes.values()]

    @property
    def rented(self) -> Mapping[str, Machine]:
        return {one.id: self._machine(one) for one in self.site.market.alive()}

    def _machine(self, one: Any) -> Machine:
        tags = {tag["key"]: tag["value"] for tag in one.get_tags()}
        launched_s = self.site.market.made[one.id] - BEGIN_S
        state: MachineState = "pending" if one.state == "pending" else "running"
        offer, token = tags["sanderling/offer"], tags["sanderling/token"]
        return Machine(one.id, offer, state, launched_s, None, None, token)


@dataclass
class Scene:
    """answering: of each period after the warm-up. wrong: rules that were broken, with the period.
    done: what became of things, in order: (seconds, "launch" | "ready" | "drain" | "end", id)."""

    site: AwsSite
    name: str = "first"
    wrong: list[str] = field(default_factory=list)
    answering: list[int] = field(default_factory=list)
    done: list[tuple[float, str, str]] = field(default_factory=list)
    periods: int = 0

    def begin(self) -> "Scene":
        self.cloud = OfEc2(self.site)
        load: Callable[[float], float] = lambda _: 100.0  # noqa: E731
        self.service = Served(self.cloud, {"decode": Pool(load)})  # type: ignore[arg-type]
        self.drive()
        return self

    def drive(self) -> None:
        """A controller as it starts: it knows nothing."""
        settings = loop_settings(
            policy="spothedge",
            decode=DecodeScale(floor=NEED, cap=8, on_demand=ON_DEMAND, tokens_per_s=100.0),
        )
        pools = tuple(mix.offer.name for mix in self.site.aws.sale.mixes.values())
        memory = Placer(tuple(name for name in pools if name.startswith("spot")))
        loop = Loop(settings, HedgePolicy(over=OVER), memory, self.name)
        self.kept = Kept()
        self.driver = Driver(self.site.provider, self.service, loop, self.site.clock, self.kept)

    async def crash(self) -> None:
        """Nothing is left of the controller but its folder; the next one has another name."""
        self.site.provider = self.site.again()
        await self.site.waits(self.site.aws.offers())
        self.name += "'"
        self.drive()

    async def runs(self, periods: int) -> None:
        for _ in range(periods):
            begun_s = self.site.now_s()
            before = self._alive()
            decision = await self.site.waits(self.driver.once())
            for act in decision.actions if decision else ():
                if act.act == "drain":
                    self.done.append((begun_s, "drain", act.machine))
            self._changes(begun_s, before)
            await self.site.passes(max(0.1, begun_s + PERIOD_S - self.site.now_s()))
            self.service.advance(begun_s, self.site.now_s() - begun_s)
            self.periods += 1
            self._judge()

    def answers(self) -> int:
        return self.service.answering("decode")

    def spot(self) -> list[str]:
        """Spot machines that answer, oldest first."""
        ready = [name for name, at_s in self.service.ready_s.items() if at_s <= self.site.now_s()]
        rented = self.cloud.rented
        return [n for n in ready if n in rented and rented[n].offer.startswith("spot")]

    def _alive(self) -> set[str]:
        return {one.id for one in self.site.market.alive()}

    def _changes(self, at_s: float, before: set[str]) -> None:
        now = self._alive()
        self.done += [(at_s, "launch", name) for name in sorted(now - before)]
        self.done += [(at_s, "end", name) for name in sorted(before - now)]

    def _judge(self) -> None:
        """Never below the floor on demand once it was reached, never twice for one launch, never
        beyond the cap, and no answer short of the need."""
        rented = self.cloud.rented.values()
        tokens = Counter(machine.token for machine in rented)
        told = [
            (max(tokens.values(), default=0) > 1, "two machines of one launch"),
            (len(tokens) > 8 + NEED, "more machines than the cap and those that leave"),
        ]
        if self.periods > WARM:
            on_demand = sum(machine.offer.startswith("on-demand") for machine in rented)
            self.answering.append(self.answers())
            told.append((on_demand < ON_DEMAND, "below the floor on demand"))
        self.wrong += [f"period {self.periods}: {what}" for is_so, what in told if is_so]

    def orphans(self) -> set[str]:
        """What EC2 says is paid for and the loop does not see."""
        seen = {machine.id for machine in self.kept.steps[-1][0].machines}
        return self.site.alive() - seen


Trouble = Callable[[Scene], None]


def played_scene(cloud: AwsCloud, folder: Path, play: Callable[[Scene], Any], **more: Any) -> Scene:
    """A scene that has warmed up, and what `play` does with it; settles afterwards."""

    async def going() -> Scene:
        site = AwsSite(cloud, folder, **more)
        site.notice_s = 120.0  # as on EC2
        scene = Scene(await site.begin()).begin()
        await scene.runs(WARM)
        await play(scene)
        return scene

    return asyncio.run(going())


def duplicate(scene: Scene) -> None:
    """Every message once more, after those that there are."""
    sqs = scene.site.cloud.client("sqs", "oracle")
    url = scene.site.cloud.queue_url
    found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", ())
    for message in found:
        json.loads(message["Body"])
        scene.site.cloud.send(message["Body"])
