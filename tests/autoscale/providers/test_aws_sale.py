"""Offers out of EC2's types, zones and prices: kinds by GPU and memory, mixes, scores, history, and
settings that cannot work."""

import asyncio
import json
import re
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscale.catalog.kinds import read_kinds
from autoscale.providers.aws import types
from autoscale.providers.aws.build import from_settings
from autoscale.providers.aws.calls import boto_clients
from cluster.clock import VirtualClock, WallClock
from cluster.settings import Settings
from tests.aws_double.cloud import AwsCloud, documented
from tests.aws_double.site import SPOT, ZONE, AwsSite, played, settings

# By AWS's pages of instance types, read by hand.
GPUS = {
    "g4dn.xlarge": ("t4", 1),
    "g5.xlarge": ("a10g", 1),
    "g5.48xlarge": ("a10g", 8),
    "g6.12xlarge": ("l4", 4),
    "p4d.24xlarge": ("a100-40g", 8),
    "p4de.24xlarge": ("a100-80g", 8),
    "p5.48xlarge": ("h100", 8),
    "p5en.48xlarge": ("h200", 8),
    "p6-b200.48xlarge": ("b200", 8),
}
UNKNOWN = ("g6f.xlarge", "g5g.xlarge", "p3dn.24xlarge", "p6-b300.48xlarge", "m5.large")


def test_kinds_are_known_by_gpu_and_memory(aws_cloud: AwsCloud):
    """A part of an L4 is no L4, and a V100 of 32 GB none of 16."""
    aws_cloud.begin(lambda: 0.0)
    ec2 = aws_cloud.client("ec2", "oracle")
    names = [*GPUS, *UNKNOWN]
    rows: list[Any] = ec2.describe_instance_types(InstanceTypes=names)["InstanceTypes"]
    assert len(rows) == len(names)
    found = types.read(rows, read_kinds())
    assert {one.name: (one.kind, one.count) for one in found} == GPUS
    assert {one.name for one in found if one.spot and one.on_demand} == set(GPUS)
    network = {one.name: one.network_gb_per_s for one in found}
    assert network["g5.xlarge"] == 2.5 / 8 and network["p5.48xlarge"] == 3200 / 8


def test_offers_have_the_price_of_the_dearest_in_their_mix(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        offers = {offer.name: offer for offer in await site.provider.offers()}
        assert offers[SPOT].usd_per_h == pytest.approx(0.4 * 1.212, abs=1e-4)
        assert offers[SPOT].quota == 4 and offers[SPOT].startup_s == 60.0
        assert offers[f"on-demand-a10gx1-{ZONE}"].usd_per_h == 1.212
        site.market.spot = {("g5.2xlarge", ZONE): [(0.0, 2.0)]}
        assert (await site.provider.offers())[0].usd_per_h == offers[SPOT].usd_per_h, "for a while"
        await site.passes(301.0)
        again = {offer.name: offer for offer in await site.provider.offers()}
        assert again[SPOT].usd_per_h == pytest.approx(0.4 * 1.006, abs=1e-4), "the dear one is out"
        assert "g5.2xlarge" not in again[SPOT].source and "g5.xlarge" in again[SPOT].source
        assert aws_cloud.made("GetProducts") == 2, "prices on demand are read once a day"
        await site.passes(86_400.0)
        await site.provider.offers()
        assert aws_cloud.made("GetProducts") == 4 and aws_cloud.made("GetSpotPlacementScores") == 0

    played(aws_cloud, tmp_path, work)


def test_one_offer_of_all_zones(aws_cloud: AwsCloud, tmp_path: Path):
    """The cheapest zone's price decides who is in; the launch may land in any of them."""

    async def work(site: AwsSite) -> None:
        offers = await site.aws.offers()
        assert [offer.name for offer in offers] == [
            "spot-a10gx1-us-east-1",
            "on-demand-a10gx1-us-east-1",
        ]
        pools = site.aws.sale.mixes[offers[0].name].pools
        assert len({pool.zone for pool in pools}) == 5 and len(pools) == 10
        site.market.room = {("g5.xlarge", "us-east-1d"): 10}
        await site.aws.launch(offers[0], "a")
        [made] = aws_cloud.described()
        assert made["Placement"]["AvailabilityZone"] == "us-east-1d"

    async def begun() -> None:
        site = AwsSite(aws_cloud, tmp_path, mix="region")
        site.provider = site.again()
        await work(site)

    asyncio.run(begun())


def test_zones_with_a_low_score_are_not_offered(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        site.market.scores = {"us-east-1b": 2, "us-east-1c": 9, ZONE: 3}
        await site.passes(301.0)
        zones = {o.zone: o for o in await site.provider.offers() if o.market == "spot"}
        assert "us-east-1b" not in zones and ZONE in zones
        assert "placement score 9" in zones["us-east-1c"].source
        everywhere = {o.zone for o in await site.provider.offers() if o.market == "on_demand"}
        assert "us-east-1b" in everywhere, "a score is of the spot market alone"

    played(aws_cloud, tmp_path, work, least_score=3)


def test_the_catalog_has_prices_over_time(aws_cloud: AwsCloud, tmp_path: Path):
    """Of a mix the dearest pool's, from each change on."""

    async def work(site: AwsSite) -> None:
        now_s = site.wall()
        site.market.spot = {
            ("g5.xlarge", ZONE): [(0.0, 0.40), (now_s - 3000, 0.50), (now_s - 1000, 0.42)],
            ("g5.2xlarge", ZONE): [(0.0, 0.45), (now_s - 2000, 0.48)],
        }
        await site.passes(301.0)
        catalog = await site.aws.catalog(2.0)
        at = {ago: now_s - ago - site.wall() + site.now_s() for ago in (3000, 2000, 1000)}
        told = [
            (round(p.at_s - at[3000]), p.usd_per_h)
            for p in catalog.prices[SPOT]
            if p.at_s >= at[3000] - 1
        ]
        assert told == [(0, 0.50), (2000, 0.48)]
        assert catalog.kind("a10g").memory_bytes == 24e9
        [before] = [o for o in catalog.offers(at_s=at[3000] - 1) if o.name == SPOT]
        [later] = [o for o in catalog.offers(at_s=at[2000]) if o.name == SPOT]
        assert (before.usd_per_h, later.usd_per_h) == (0.45, 0.50)

    played(aws_cloud, tmp_path, work)


def test_an_offer_that_left_the_sale_can_still_be_asked_for(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        site.market.scores = {ZONE: 1}
        await site.passes(301.0)
        assert SPOT not in {offer.name for offer in await site.provider.offers()}
        made = await site.provider.launch(replace(site.spot), "a")
        assert site.alive() == {made.id}

    played(aws_cloud, tmp_path, work, least_score=3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"launch_template": ""}, "autoscale.aws.launch_template is empty"),
        ({"kinds": "a10g,h1000"}, "autoscale.aws.kinds names 'h1000'; known kinds are"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    more: dict[str, str], says: str, tmp_path: Path, aws_cloud: AwsCloud
):
    made: dict[str, Any] = {"folder": tmp_path, "clients": aws_cloud.client}
    with pytest.raises(ValueError, match=says):
        from_settings(settings(**more), VirtualClock(), **made)


def test_types_without_gpus_are_refused_when_they_are_read(aws_cloud: AwsCloud, tmp_path: Path):
    async def work(site: AwsSite) -> None:
        with pytest.raises(ValueError, match="autoscale.aws.types = 'm5.large' has no type"):
            await from_settings(
                settings(types="m5.large"),
                site.clock,
                folder=tmp_path,
                clients=aws_cloud.client,
            ).offers()

    played(aws_cloud, tmp_path, work)


def test_boto3_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ValueError, match=r"pip install sanderling\[aws\]"):
        from_settings(settings(), WallClock())


def test_boto3s_own_clients_find_region_and_endpoint_in_the_environment(
    aws_cloud: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The way the controller makes it: nothing is handed in."""
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="autoscale.aws.region is empty"):
        boto_clients("")
    monkeypatch.setattr("autoscale.providers.aws.calls.READ_S", 240.0)  # on a busy machine
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_cloud.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tested")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    aws_cloud.begin(time.time)
    given = {"launch_template": "sanderling", "types": "g5.xlarge", "startup_s": 1.0}
    given["queue_url"] = aws_cloud.queue_url
    resolved = Settings.model_validate({"data_dir": str(tmp_path), "autoscale": {"aws": given}})
    provider = from_settings(resolved, WallClock())

    async def going() -> None:
        offers = await provider.offers()
        made = await provider.launch(offers[0], "decode/a/1")
        assert aws_cloud.alive() == {made.id}
        assert abs(made.launched_s - WallClock().now_s()) < 60
        assert (await provider.events(0))[1] == 1
        await provider.terminate(made.id)
        assert aws_cloud.alive() == set()

    asyncio.run(going())
    assert (tmp_path / "aws" / "events.jsonl").exists()


def test_the_policy_allows_what_is_called_and_nothing_else(aws_cloud: AwsCloud, tmp_path: Path):
    """All calls there are, under the documented policy; each of its actions was needed, and without
    any one of them something is refused."""

    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        await site.passes(301.0)
        await site.provider.offers()
        site.market.interrupt(made.id)
        await site.provider.machines()
        await site.provider.terminate(made.id)
        assert site.alive() == set() and aws_cloud.waiting() == 0
        policy = aws_cloud.overlay.policy
        assert policy is not None and policy.used == policy.actions
        called = {
            f"{c.service}:{c.operation.removesuffix('Batch')}" for c in aws_cloud.overlay.calls
        }
        implied = {"ec2:RunInstances", "iam:PassRole"}
        assert called | implied == policy.actions

    played(aws_cloud, tmp_path, work, least_score=1)


def test_the_policy_stops_at_the_cluster(aws_cloud: AwsCloud, tmp_path: Path):
    """Under another cluster's name nothing can be bought, and nothing of ours be ended."""

    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        policy = aws_cloud.overlay.policy
        assert policy is not None
        text = json.dumps(documented("controller policy"))
        policy.document = json.loads(text.replace('"sanderling"', '"another"'))
        with pytest.raises(Exception, match="UnauthorizedOperation"):
            await site.provider.terminate(made.id)
        with pytest.raises(Exception, match="UnauthorizedOperation"):
            await site.provider.launch(site.spot, "b")
        assert site.alive() == {made.id}

    played(aws_cloud, tmp_path, work)


def test_the_documented_settings_are_settings():
    text = (Path(__file__).parents[3] / "docs" / "aws.md").read_text(encoding="utf-8")
    [written] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    aws = Settings.model_validate(tomllib.loads(written)).autoscale.aws
    assert aws.cluster == "chat" and aws.queue_url.endswith("/sanderling-notices")
