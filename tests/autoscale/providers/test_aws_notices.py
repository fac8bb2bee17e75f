"""Interruptions and recommendations over EventBridge and SQS: duplicates, any order, strangers,
junk, and calls that fail between hearing of a notice and having written it down."""

import asyncio
import json
from pathlib import Path

import pytest

from autoscale.providers.aws.notices import Notice, parse
from tests.autoscale.providers.suite import NOTICE_S, STARTUP_S, kinds, state
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.market import event_of
from tests.aws_double.site import BEGIN_S, AwsSite, played


def test_events_are_read_as_aws_documents_them():
    event = event_of("interruption", "i-1", BEGIN_S)
    assert parse(json.dumps(event)) == Notice("i-1", "interruption", BEGIN_S + 120)
    event = event_of("rebalance", "i-1", BEGIN_S)
    assert parse(json.dumps(event)) == Notice("i-1", "rebalance", BEGIN_S)
    event["detail-type"] = "EC2 Instance State-change Notification"
    assert parse(json.dumps(event)) is None
    for junk in ("", "no JSON", "[]", "{}", '{"detail-type": "x", "time": "yesterday"}'):
        with pytest.raises(ValueError):
            parse(junk)


def test_duplicates_and_late_messages_change_nothing(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        await site.passes(STARTUP_S * 1.1)
        told_s = site.wall()
        first = json.dumps(event_of("interruption", made.id, told_s))
        later = json.dumps(event_of("interruption", made.id, told_s + 9))
        for body in (later, first, first, later):
            aws_cloud.send(body)
        for _ in range(2):
            listed = await state(site.provider, made.id)
            assert listed is not None and listed.doomed_s == pytest.approx(
                site.now_s() + NOTICE_S, abs=1
            ), "the earliest word holds"
        notices = await kinds(site.provider, "notice")
        assert len(notices) == 1 and aws_cloud.waiting() == 0
        aws_cloud.send(first)
        site.provider = site.again()
        assert len(await kinds(site.provider, "notice")) == 1
        await site.passes(NOTICE_S)
        site.market.take(made.id)
        aws_cloud.send(later)  # after the end
        assert len(await kinds(site.provider, "preempt")) == 1
        assert len(await kinds(site.provider, "notice")) == 1 and aws_cloud.waiting() == 0

    played(aws_cloud, tmp_path, work)


def test_junk_and_strangers_are_thrown_away(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        stranger = event_of("interruption", "i-0123456789abcdef0", site.wall())
        old = event_of("interruption", "i-0123456789abcdef0", site.wall() - 500)
        for body in ("no JSON", "{}", json.dumps(old), json.dumps(stranger)):
            aws_cloud.send(body)
        assert await kinds(site.provider, "notice") == []
        assert aws_cloud.waiting() == 1, "a machine that may not be listed yet is waited for"
        await site.passes(NOTICE_S + 301)
        await site.provider.machines()
        assert aws_cloud.waiting() == 0 and site.alive() == {made.id}

    played(aws_cloud, tmp_path, work)


def test_a_notice_before_its_machine_is_listed_is_not_lost(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        site.market.lag_s = 10.0
        made = await site.provider.launch(site.spot, "a")
        site.provider = site.again()  # which knows nothing of it
        site.market.interrupt(made.id)
        assert await site.provider.machines() == [] and aws_cloud.waiting() == 1
        await site.passes(11.0)
        [machine] = await site.provider.machines()
        assert machine.doomed_s is not None and aws_cloud.waiting() == 0

    played(aws_cloud, tmp_path, work)


def test_a_notice_that_cannot_be_written_down_yet_holds_all_the_same(
    aws_cloud: AwsCloud, tmp_path: Path
):
    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        await site.passes(STARTUP_S * 1.1)
        site.market.interrupt(made.id)
        aws_cloud.faults["CreateTags"] = [" AccessDenied"]
        [machine] = await site.provider.machines()
        assert machine.state == "draining" and aws_cloud.waiting() == 1
        aws_cloud.faults["DeleteMessageBatch"] = [" AccessDenied"]
        assert [m.doomed_s for m in await site.provider.machines()] == [machine.doomed_s]
        assert aws_cloud.waiting() == 1
        assert len(await kinds(site.provider, "notice")) == 1 and aws_cloud.waiting() == 0
        again = [m.doomed_s for m in await site.again().machines()]
        assert again == [pytest.approx(machine.doomed_s, abs=0.01)], "read from its tag"

    played(aws_cloud, tmp_path, work)


def test_without_the_queue_machines_are_listed_and_events_are_not(
    aws_cloud: AwsCloud, tmp_path: Path
):
    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        aws_cloud.faults["ReceiveMessage"] = [" AccessDenied"] * 2
        assert [m.id for m in await site.provider.machines()] == [made.id]
        with pytest.raises(Exception, match="AccessDenied"):
            await site.provider.events(0)
        assert len(await kinds(site.provider, "launch_ok")) == 1

    played(aws_cloud, tmp_path, work)


@pytest.mark.parametrize("after_s", [0.0, 300.0])
def test_a_recommendation_is_a_notice_only_where_that_is_set(
    after_s: float, aws_cloud: AwsCloud, tmp_path: Path
):
    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        await site.passes(STARTUP_S * 1.1)
        site.market.publish("rebalance", made.id, site.wall())
        [machine] = await site.provider.machines()
        expected = None if not after_s else pytest.approx(site.now_s() + after_s, abs=1)
        assert machine.doomed_s == expected and aws_cloud.waiting() == 0
        site.market.interrupt(made.id)  # which always counts, and is earlier
        [machine] = await site.again().machines()
        assert machine.doomed_s == pytest.approx(site.now_s() + NOTICE_S, abs=1)

    played(aws_cloud, tmp_path, work, rebalance_s=after_s)


def test_a_loss_without_a_notice_is_a_loss(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        made = [await site.provider.launch(site.spot, token) for token in "ab"]
        await site.passes(STARTUP_S * 1.1)
        site.market.take(made[0].id)
        [loss] = await kinds(site.provider, "preempt")
        assert loss.value == 1.0 and loss.t_s == pytest.approx(site.now_s(), abs=1)
        again = [m.id for m in await site.again().machines() if m.state != "gone"]
        assert again == [made[1].id]

    played(aws_cloud, tmp_path, work)


def test_who_asks_while_somebody_looks_is_answered_whoever_gives_up(
    aws_cloud: AwsCloud, tmp_path: Path
):
    """The driver asks for machines and events at once: one look for both, also when the call that
    began it is cancelled at its deadline."""

    async def work(site: AwsSite) -> None:
        await site.provider.launch(site.spot, "a")
        before = aws_cloud.made("DescribeInstances")
        machines, _ = await asyncio.gather(site.provider.machines(), site.provider.events(0))
        assert len(machines) == 1 and aws_cloud.made("DescribeInstances") == before + 1
        first = asyncio.ensure_future(site.provider.machines())
        others = [asyncio.ensure_future(site.provider.machines()) for _ in range(2)]
        await asyncio.sleep(0)
        first.cancel()
        others[0].cancel()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in results] == [True, True, False]
        assert len(await site.provider.machines()) == 1

    played(aws_cloud, tmp_path, work)
