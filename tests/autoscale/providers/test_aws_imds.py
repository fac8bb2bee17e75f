"""Notices on the machine itself, by IMDSv2: tokens, 401, 404, 500, and a tag for the controller."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.utils import IMDSFetcher

from autoscale.providers.aws import imds as service
from autoscale.providers.aws.imds import Imds, ImdsError, watch
from autoscale.providers.aws.node import OwnTags
from autoscale.providers.aws.notices import Notice
from cluster.clock import VirtualClock
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.imds import ImdsDouble, imds_double
from tests.aws_double.site import BEGIN_S, AwsSite

Work = Callable[[Imds, ImdsDouble, VirtualClock], Awaitable[None]]


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def double(clock: VirtualClock) -> Iterator[ImdsDouble]:
    with imds_double("i-1", lambda: BEGIN_S + clock.now_s()) as made:
        yield made


def run(double: ImdsDouble, clock: VirtualClock, work: Work, token_s: int = 100) -> None:
    async def going() -> None:
        async with httpx.AsyncClient(base_url=double.url, timeout=120.0) as client:
            await work(Imds(client, clock, token_s=token_s), double, clock)

    asyncio.run(going())


async def until(true: Callable[[], bool]) -> None:
    """HTTP takes real time; at most two minutes of it."""
    for _ in range(24_000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it has not come true")


def test_the_double_speaks_to_botocore_as_well(double: ImdsDouble):
    """AWS's own client reads it, and a request without a token is refused."""
    fetcher: Any = IMDSFetcher(num_attempts=1, base_url=f"{double.url}/")
    token = fetcher._fetch_metadata_token()
    path = "latest/meta-data/instance-id"
    assert fetcher._get_request(path, lambda _: False, token=token).text == "i-1"
    assert httpx.get(f"{double.url}/{path}").status_code == 401
    forwarded = {"X-Forwarded-For": "1.2.3.4", "X-aws-ec2-metadata-token-ttl-seconds": "60"}
    assert httpx.put(f"{double.url}/latest/api/token", headers=forwarded).status_code == 403


def test_nothing_then_a_recommendation_then_the_notice(double: ImdsDouble, clock: VirtualClock):
    async def work(imds: Imds, double: ImdsDouble, clock: VirtualClock) -> None:
        assert await imds.notices() == []
        double.rebalance()
        assert await imds.notices() == [Notice("i-1", "rebalance", BEGIN_S)]
        double.interrupt(120.0)
        assert Notice("i-1", "interruption", BEGIN_S + 120.0) in await imds.notices()
        assert double.tokens == 1

    run(double, clock, work)


def test_tokens_are_renewed_before_they_end_and_when_they_are_forgotten(
    double: ImdsDouble, clock: VirtualClock
):
    async def work(imds: Imds, double: ImdsDouble, clock: VirtualClock) -> None:
        for _ in range(40):
            assert await imds.get("instance-id") == "i-1"
            await clock.advance(10.0)
        assert double.tokens == 8  # 400 s, each of 100 s renewed at half its time
        double.forget_tokens()
        assert await imds.get("instance-id") == "i-1" and double.tokens == 9
        double.fails = 1
        with pytest.raises(ImdsError, match="500"):
            await imds.get("instance-id")

    run(double, clock, work)


def test_a_token_is_renewed_only_once_a_question(double: ImdsDouble, clock: VirtualClock):
    """A service that takes no token is an error, not a loop."""

    async def work(imds: Imds, double: ImdsDouble, clock: VirtualClock) -> None:
        double.wall = lambda: BEGIN_S + 1e9  # whatever it hands out has ended already
        double.token = lambda *_: (200, "old")  # type: ignore[method-assign]
        with pytest.raises(ImdsError, match="401"):
            await imds.get("instance-id")

    run(double, clock, work)


def test_a_broken_document_is_no_notice(double: ImdsDouble, clock: VirtualClock):
    async def work(imds: Imds, double: ImdsDouble, clock: VirtualClock) -> None:
        double.documents["spot/instance-action"] = "<html>"
        with pytest.raises(ImdsError, match="no time"):
            await imds.notices()

    run(double, clock, work)


@asynccontextmanager
async def watched(imds: Imds, tell: Any, clock: VirtualClock) -> AsyncIterator[None]:
    going = asyncio.ensure_future(watch(imds, tell, clock, random.Random(1)))
    try:
        yield
    finally:
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)


def test_the_watch_tells_once_whatever_fails(double: ImdsDouble, clock: VirtualClock):
    async def work(imds: Imds, double: ImdsDouble, clock: VirtualClock) -> None:
        told: list[Notice] = []
        fails = [ConnectionError("not now"), ConnectionError("nor now")]

        async def tell(notice: Notice) -> None:
            if fails:
                raise fails.pop()
            told.append(notice)

        async def rounds(count: int) -> None:
            for _ in range(count):
                await until(lambda: bool(clock._sleepers))
                await clock.advance(30.0)

        double.fails = 3
        async with watched(imds, tell, clock):
            await rounds(4)
            assert double.fails == 0 and told == []
            double.interrupt()
            at_s = clock.now_s() + BEGIN_S + 120.0
            await rounds(5)
            assert [(one.instance, one.kind) for one in told] == [("i-1", "interruption")]
            assert told[0].at_s == pytest.approx(at_s, abs=1.0)

    run(double, clock, work)


def test_the_environment_says_where_the_service_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(service.ADDRESS_VARIABLE, "http://127.0.0.1:1")
    assert str(service.client().base_url) == "http://127.0.0.1:1"
    monkeypatch.delenv(service.ADDRESS_VARIABLE)
    assert str(service.client().base_url) == "http://169.254.169.254"


def test_a_notice_reaches_the_controller_by_the_machines_tag(aws_cloud: AwsCloud, tmp_path: Path):
    """No queue at all: machine, its metadata service, its tag, the provider's listing."""

    async def work() -> None:
        site = await AwsSite(aws_cloud, tmp_path, queue_url="").begin()
        made = await site.provider.launch(site.spot, "a")
        with imds_double(made.id, site.wall) as double:
            async with httpx.AsyncClient(base_url=double.url, timeout=120.0) as client:
                imds = Imds(client, site.clock)
                double.interrupt(30.0)
                double.rebalance()
                for notice in await imds.notices():
                    await OwnTags(site.aws.calls).tell(notice)
        [machine] = await site.provider.machines()
        assert machine.doomed_s == pytest.approx(site.now_s() + 30.0, abs=1.0)
        again = [m.doomed_s for m in await site.again().machines()]
        assert again == [machine.doomed_s]

    asyncio.run(work())
