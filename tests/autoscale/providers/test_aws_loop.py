"""The control loop over EC2's double, end to end in compressed time: a notice, its replacement, the
drain, the end; then the same with one fault each. Machines are counted by DescribeInstances."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from autoscale.providers.aws.provider import AwsProvider
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.overlay import LOST
from tests.aws_double.scene import NEED, OVER, Scene, duplicate, played_scene

THROTTLED = "503 RequestLimitExceeded"
Play = Callable[[Scene], Awaitable[None]]


async def noticed(scene: Scene, before: Callable[[Scene], None] = lambda _: None) -> str:
    """A spot machine gets its notice, and two minutes and more pass."""
    doomed = scene.spot()[0]
    scene.site.market.interrupt(doomed)
    before(scene)
    await scene.runs(10)
    return doomed


def settled(scene: Scene) -> None:
    """What holds after every fault."""
    assert scene.wrong == []
    assert scene.orphans() == set()
    assert scene.answers() == NEED + OVER == len(scene.site.alive())


def test_notice_replacement_drain_end(aws_cloud: AwsCloud, tmp_path: Path):
    doomed: list[str] = []

    async def play(scene: Scene) -> None:
        doomed.append(await noticed(scene))

    scene = played_scene(aws_cloud, tmp_path, play)
    settled(scene)
    assert min(scene.answering) >= NEED, "nobody waits while a machine is replaced"
    times = {(what, name): at_s for at_s, what, name in scene.done}
    drained_s, ended_s = times["drain", doomed[0]], times["end", doomed[0]]
    told_s = scene.site.now_s() - 200.0
    launched = [n for at_s, what, n in scene.done if what == "launch" and at_s > told_s - 1]
    assert launched and all(times["launch", name] < told_s + 1 for name in launched), "at once"
    ready_s = max(scene.service.ready_s[name] for name in launched if name in scene.service.ready_s)
    assert told_s < ready_s <= drained_s < ended_s < told_s + 120.0
    reasons = {one["InstanceId"]: one.get("StateReason", {}) for one in aws_cloud.described()}
    assert reasons[doomed[0]]["Code"] == "Client.UserInitiatedShutdown", "given back in time"


def no_room(scene: Scene) -> None:
    """No spot machine anywhere."""
    pools = {p for mix in scene.site.aws.sale.mixes.values() for p in mix.pools}
    code = "InsufficientInstanceCapacity"
    scene.site.market.refuse = {(p.instance_type, p.zone, "spot"): code for p in pools}


def spot_quota(scene: Scene) -> None:
    no_room(scene)
    told = scene.site.market.refuse
    scene.site.market.refuse = dict.fromkeys(told, "MaxSpotInstanceCountExceeded")


def fail(operation: str, fault: str, times: int) -> Callable[[Scene], None]:
    return lambda scene: scene.site.cloud.faults.update({operation: [fault] * times})


def lag(scene: Scene) -> None:
    scene.site.market.lag_s = 45.0
    fail("CreateFleet", LOST, 4)(scene)


FAULTS: dict[str, Callable[[Scene], None]] = {
    "no spot machine anywhere": no_room,
    "the quota of spot machines": spot_quota,
    "CreateFleet throttled": fail("CreateFleet", THROTTLED, 9),
    "CreateFleet's answers lost": fail("CreateFleet", LOST, 6),
    "answers lost and a late listing": lag,
    "a listing that fails": fail("DescribeInstances", "503 Unavailable", 9),
    "a queue that is closed": fail("ReceiveMessage", " AccessDenied", 3),
    "every message twice": duplicate,
    "notices that cannot be written": fail("CreateTags", THROTTLED, 6),
    "an end whose answer is lost": fail("TerminateInstances", LOST, 5),
    "an end that is throttled": fail("TerminateInstances", THROTTLED, 5),
    "no prices": fail("DescribeSpotPriceHistory", "503 Unavailable", 40),
}
QUICK = ("answers lost and a late listing", "the quota of spot machines")


def with_fault(aws_cloud: AwsCloud, folder: Path, name: str) -> Scene:
    """The scene of the notice with one fault in it, and a quiet while afterwards."""

    async def play(scene: Scene) -> None:
        await noticed(scene, FAULTS[name])
        scene.site.cloud.faults.clear()
        scene.site.market.refuse.clear()
        await scene.runs(15)

    return played_scene(aws_cloud, folder, play)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAULTS]
)
def test_one_fault(name: str, aws_cloud: AwsCloud, tmp_path: Path):
    scene = with_fault(aws_cloud, tmp_path, name)
    settled(scene)
    assert min(scene.answering) >= NEED


def test_a_controller_that_dies_under_a_notice(aws_cloud: AwsCloud, tmp_path: Path):
    """Its successor finds machines, tokens and the notice, and ends what nobody needs."""

    async def play(scene: Scene) -> None:
        doomed = scene.spot()[0]
        scene.site.market.interrupt(doomed)
        await scene.runs(1)
        scene.site.cloud.faults["CreateFleet"] = [LOST] * 4
        await scene.runs(1)
        scene.site.cloud.faults.clear()
        await scene.crash()
        await scene.runs(20)
        assert doomed not in scene.site.alive()

    scene = played_scene(aws_cloud, tmp_path, play)
    settled(scene)
    assert min(scene.answering) >= NEED


@pytest.mark.slow
def test_a_loss_without_a_word(aws_cloud: AwsCloud, tmp_path: Path):
    async def play(scene: Scene) -> None:
        for name in scene.spot()[:2]:
            scene.site.market.take(name)
        await scene.runs(20)

    scene = played_scene(aws_cloud, tmp_path, play)
    settled(scene)
    assert min(scene.answering) == NEED + OVER - 2, "what was lost without a word is missed"


@pytest.mark.slow
def test_without_notices_a_machine_is_lost_before_it_is_replaced(
    aws_cloud: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the scene of the notice rests on: deaf, the provider's loop is late."""

    async def deaf(*_: object) -> bool:
        return True

    async def play(scene: Scene) -> None:
        monkeypatch.setattr(AwsProvider, "_hear", deaf)
        for name in scene.spot()[:2]:
            scene.site.market.interrupt(name)
        await scene.runs(10)

    assert min(played_scene(aws_cloud, tmp_path, play).answering) < NEED
