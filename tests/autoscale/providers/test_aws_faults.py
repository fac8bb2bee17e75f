"""Faults of EC2's API, one by one: what each means for a launch, and that none buys twice, leaves a
machine behind or loses one. Machines are counted by DescribeInstances, with other credentials."""

import asyncio
import math
import random
from pathlib import Path
from uuid import uuid4

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from autoscale.providers.aws import errors, fleet
from autoscale.providers.aws.calls import Backoff
from autoscale.providers.provider import LaunchRefused
from tests.autoscale.providers.suite import held, kinds
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.overlay import LOST
from tests.aws_double.site import SPOT, ZONE, AwsSite, played

# By EC2's own words for each code (API reference, "Error codes").
MEANING = {
    "InsufficientInstanceCapacity": "capacity",
    "InsufficientHostCapacity": "capacity",
    "InsufficientFreeAddressesInSubnet": "capacity",
    "SpotMaxPriceTooLow": "capacity",
    "UnfulfillableCapacity": "capacity",
    "MaxSpotInstanceCountExceeded": "quota",
    "VcpuLimitExceeded": "quota",
    "InstanceLimitExceeded": "quota",
    "RequestLimitExceeded": "throttled",
    "Throttling": "throttled",
    "InvalidParameterValue": "invalid",
    "InvalidAMIID.NotFound": "invalid",
    "InvalidSubnetID.NotFound": "invalid",
    "Unsupported": "invalid",
    "UnauthorizedOperation": "invalid",
    "OptInRequired": "invalid",
}
POOLS = [("g5.xlarge", ZONE, "spot"), ("g5.2xlarge", ZONE, "spot")]


def test_what_a_fleets_error_means(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        for code, kind in MEANING.items():
            site.market.refuse = dict.fromkeys(POOLS, code)
            with pytest.raises(LaunchRefused, match=code) as refused:
                await site.provider.launch(site.spot, "a")
            assert refused.value.kind == kind, code
            forever = code == "Unsupported" or code.startswith("Invalid")
            assert math.isinf(refused.value.retry_s) == forever, code
        assert site.alive() == set()
        fails = await kinds(site.provider, "launch_fail")
        assert len(fails) == list(MEANING.values()).count("capacity")
        site.market.refuse.clear()
        await site.provider.launch(site.spot, "a")
        assert len(site.alive()) == 1

    played(aws_cloud, tmp_path, work)


def test_an_error_of_the_call_itself_is_a_refusal_as_well(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        for code in ("VcpuLimitExceeded", "UnauthorizedOperation", "InvalidParameter"):
            aws_cloud.faults["CreateFleet"] = [f" {code}"]
            with pytest.raises(LaunchRefused, match=code):
                await site.provider.launch(site.spot, "a")
        assert site.alive() == set() and aws_cloud.made("CreateFleet") == 3

    played(aws_cloud, tmp_path, work)


def test_errors_of_unknown_effect_are_no_refusals():
    assert errors.refusal([("InternalError", "")]) is None
    assert errors.refusal([("IdempotentParameterMismatch", "")]) is None
    assert errors.refusal([("InsufficientInstanceCapacity", ""), ("Mystery", "")]) is None
    both = errors.refusal([("VcpuLimitExceeded", ""), ("InsufficientInstanceCapacity", "")])
    assert both is not None and both.kind == "capacity", "room may come where the quota allows it"


def test_throttling_is_waited_out_and_then_told(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        aws_cloud.faults["CreateFleet"] = ["503 RequestLimitExceeded"] * 2
        begun_s = site.now_s()
        await site.waits(site.provider.launch(site.spot, "a"))
        assert aws_cloud.made("CreateFleet") == 3 and len(site.alive()) == 1
        assert 0.0 < site.now_s() - begun_s <= 0.5 + 1.0
        aws_cloud.faults["CreateFleet"] = ["503 RequestLimitExceeded"] * 9
        with pytest.raises(LaunchRefused) as refused:
            await site.waits(site.provider.launch(site.spot, "b"))
        assert refused.value.kind == "throttled" and len(site.alive()) == 1
        assert aws_cloud.made("CreateFleet") == 3 + Backoff().attempts
        for fault in ("503 RequestLimitExceeded", "400 Throttling", "503 Unavailable", LOST):
            aws_cloud.faults.update(CreateFleet=[], DescribeInstances=[fault])
            assert len(await site.waits(site.provider.machines())) == 1, fault

    played(aws_cloud, tmp_path, work)


def test_waits_are_uniform_below_a_bound_that_doubles_up_to_the_most():
    backoff, draw = Backoff(first_s=0.5, most_s=8.0), random.Random(3)
    for failed, bound_s in [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (9, 8.0)]:
        waits = [backoff.wait_s(failed, draw) for _ in range(2000)]
        assert 0 <= min(waits) < 0.02 * bound_s and 0.98 * bound_s < max(waits) <= bound_s
        assert sum(waits) / len(waits) == pytest.approx(bound_s / 2, rel=0.05)
    same = [[backoff.wait_s(n, random.Random(7)) for n in range(1, 5)] for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("fault", [LOST, "500 InternalError", "503 ServiceUnavailable"])
@pytest.mark.parametrize("times", [1, 9], ids=["once", "until it is given up"])
def test_a_lost_answer_buys_once(fault: str, times: int, aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        aws_cloud.faults["CreateFleet"] = [fault] * times
        if times == 1:
            made = await site.waits(site.provider.launch(site.spot, "a"))
        else:
            with pytest.raises((BotoCoreError, ClientError)):  # its effect is unknown
                await site.waits(site.provider.launch(site.spot, "a"))
            aws_cloud.faults.clear()
            made = await site.provider.launch(site.spot, "a")
        assert site.alive() == {made.id} == await held(site.provider)

    played(aws_cloud, tmp_path, work)


def test_a_refusal_after_a_lost_answer_is_none(aws_cloud: AwsCloud, tmp_path: Path):
    """The call that was not answered has made the machine, whatever the next ones are told."""
    throttled, denied = "503 RequestLimitExceeded", " UnauthorizedOperation"

    async def work(site: AwsSite) -> None:
        site.market.lag_s = 20.0
        told = ([LOST, *[throttled] * 3], [throttled] * 4, [denied])
        for faults in told:
            aws_cloud.faults["CreateFleet"] = list(faults)
            with pytest.raises((BotoCoreError, ClientError)):  # and no LaunchRefused
                await site.waits(site.provider.launch(site.spot, "a"))
        made = await site.provider.launch(site.spot, "a")
        assert site.alive() == {made.id}

    played(aws_cloud, tmp_path, work)


@pytest.mark.parametrize("crashes", [False, True])
def test_a_machine_that_is_not_listed_yet_is_not_bought_again(
    crashes: bool, aws_cloud: AwsCloud, tmp_path: Path
):
    async def work(site: AwsSite) -> None:
        site.market.lag_s = 20.0
        aws_cloud.faults["CreateFleet"] = [LOST] * 4
        with pytest.raises(Exception, match="closed|reset|abort"):
            await site.waits(site.provider.launch(site.spot, "a"))
        aws_cloud.faults.clear()
        if crashes:
            site.provider = site.again()
            await site.provider.offers()
        made = await site.provider.launch(site.spot, "a")
        assert site.alive() == {made.id}
        assert await held(site.provider) == {made.id}, "known, though EC2 does not list it"
        with pytest.raises(Exception, match="NotFound"):
            await site.provider.terminate(made.id)  # EC2 denies it: the caller must ask again
        assert site.alive() == {made.id}
        await site.passes(21.0)
        await site.provider.terminate(made.id)
        assert site.alive() == set() == await held(site.provider)

    played(aws_cloud, tmp_path, work)


def test_without_client_tokens_a_lost_answer_buys_twice(
    aws_cloud: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the test above rests on."""
    real = fleet.request

    def anew(*given: object) -> dict[str, object]:
        return {**real(*given), "ClientToken": str(uuid4())}  # type: ignore[arg-type]

    async def work(site: AwsSite) -> None:
        site.market.lag_s = 20.0
        aws_cloud.faults["CreateFleet"] = [LOST] * 4
        with pytest.raises(Exception, match="closed|reset|abort"):
            await site.waits(site.provider.launch(site.spot, "a"))
        aws_cloud.faults.clear()
        site.provider = site.again()
        await site.provider.offers()
        await site.provider.launch(site.spot, "a")
        assert len(site.alive()) == 2

    monkeypatch.setattr(fleet, "request", anew)
    played(aws_cloud, tmp_path, work)


def test_other_arguments_under_a_token_are_no_refusal(aws_cloud: AwsCloud, tmp_path: Path):
    """The price moved between a lost answer and the crash's successor: EC2 says mismatch, and the
    machine is found by its tag."""

    async def work(site: AwsSite) -> None:
        site.market.lag_s = 20.0
        aws_cloud.faults["CreateFleet"] = [LOST] * 4
        with pytest.raises(Exception, match="closed|reset|abort"):
            await site.waits(site.provider.launch(site.spot, "a"))
        site.market.spot[("g5.2xlarge", ZONE)] = [(0.0, 3.0)]  # out of the mix
        aws_cloud.faults.clear()
        site.provider = site.again()
        await site.provider.offers()
        with pytest.raises(Exception, match="IdempotentParameterMismatch"):
            await site.provider.launch(site.spot, "a")
        await site.passes(21.0)
        made = await site.provider.launch(site.spot, "a")
        assert site.alive() == {made.id} and made.token == "a"

    played(aws_cloud, tmp_path, work)


def test_of_a_mix_the_pool_with_room_is_taken(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        def types() -> list[str]:
            return sorted(one["InstanceType"] for one in aws_cloud.described())

        site.market.room = {("g5.xlarge", ZONE): 1, ("g5.2xlarge", ZONE): 9}
        await site.provider.launch(site.spot, "a")
        assert types() == ["g5.2xlarge"]
        site.market.refuse = {("g5.2xlarge", ZONE, "spot"): "InsufficientInstanceCapacity"}
        await site.provider.launch(site.spot, "b")
        assert types() == ["g5.2xlarge", "g5.xlarge"]
        asked = next(c for c in aws_cloud.overlay.calls if c.operation == "CreateFleet").params
        assert asked["SpotOptions.AllocationStrategy"] == "price-capacity-optimized"
        assert asked["Type"] == "instant"
        assert {one["InstanceLifecycle"] for one in aws_cloud.described()} == {"spot"}
        await site.provider.launch(site.other, "c")
        lifecycles = sorted(one.get("InstanceLifecycle", "") for one in aws_cloud.described())
        assert lifecycles == ["", "spot", "spot"]

    played(aws_cloud, tmp_path, work)


def test_launches_at_once_stay_within_the_quota(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        launches = [site.provider.launch(site.spot, f"{n}") for n in range(7)]
        answers = await asyncio.gather(*launches, return_exceptions=True)
        refused = [one for one in answers if isinstance(one, LaunchRefused)]
        assert [one.kind for one in refused] == ["quota"] * 3 and len(site.alive()) == 4

    played(aws_cloud, tmp_path, work)


def test_orphans_are_ended_and_others_machines_are_not(aws_cloud: AwsCloud, tmp_path: Path):
    """By hand: one with our tag and no launch, one of another cluster, one without tags, and one
    of ours that somebody stopped."""

    def by_hand(**tags: str) -> str:
        ec2 = aws_cloud.client("ec2", "oracle")
        made = ec2.run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1)
        name = str(made["Instances"][0]["InstanceId"])
        aws_cloud.market.born(name)
        pairs = [{"Key": f"sanderling/{k}", "Value": v} for k, v in tags.items()]
        if pairs:
            ec2.create_tags(Resources=[name], Tags=pairs)
        return name

    async def work(site: AwsSite) -> None:
        ours = (await site.provider.launch(site.spot, "a")).id
        stopped = (await site.provider.launch(site.spot, "b")).id
        orphan, foreign, plain = by_hand(cluster="sanderling"), by_hand(cluster="x"), by_hand()
        assert await held(site.provider) >= {ours, stopped, orphan}
        await site.passes(300.0)
        aws_cloud.client("ec2", "oracle").stop_instances(InstanceIds=[stopped])
        await site.provider.machines()
        assert site.alive() == {ours, orphan, foreign, plain}, "a young one may still get its tags"
        await site.passes(301.0)
        site.provider = site.again()
        await site.provider.machines()
        assert site.alive() == {ours, foreign, plain}
        assert await held(site.provider) == {ours}
        [adopted] = [m for m in await site.provider.machines() if m.state != "gone"]
        assert (adopted.offer, adopted.token, adopted.state) == (SPOT, "a", "running")
        await site.provider.terminate(foreign)  # not ours to end, and no error
        assert foreign in site.alive()

    played(aws_cloud, tmp_path, work)
