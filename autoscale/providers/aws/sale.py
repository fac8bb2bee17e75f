"""What can be bought: instance types by GPU, in the zones that have them, at today's prices.

Types of one kind and number of GPUs, on one market and in one place, are one offer: EC2 is told all
of them and takes the one with the most room. Its price is that of the dearest in it, so that a
plan never says less than the bill.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from autoscale.catalog.catalog import PricedCatalog
from autoscale.catalog.kind import GpuKind
from autoscale.catalog.offer import Market, Offer
from autoscale.catalog.offers import Price
from autoscale.providers.aws import prices, types
from autoscale.providers.aws.calls import Calls
from autoscale.providers.aws.fleet import Mix, Pool
from autoscale.providers.aws.types import Type
from cluster.settings.aws import AwsSettings

LOG = logging.getLogger(__name__)
DAY_S = 86_400.0


@dataclass(frozen=True)
class Shelf:
    """What changes seldom. zones: type -> where it is. subnets: by zone; zone_ids: the names by
    which scores know zones. on_demand: $/h by type."""

    region: str
    read_s: float
    types: Sequence[Type]
    zones: Mapping[str, frozenset[str]]
    subnets: Mapping[str, str]
    zone_ids: Mapping[str, str]
    on_demand: Mapping[str, float]


class Sale:
    """wall: the calendar's time in seconds."""

    def __init__(
        self,
        calls: Calls,
        settings: AwsSettings,
        region: str,
        kinds: Mapping[str, GpuKind],
        wall: Callable[[], float],
    ) -> None:
        self.calls, self.settings, self.region, self.wall = calls, settings, region, wall
        wanted = split(settings.kinds)
        unknown = [kind for kind in wanted if kind not in kinds]
        if unknown:
            raise ValueError(
                f"autoscale.aws.kinds names {unknown[0]!r}; known kinds are {', '.join(kinds)}"
            )
        self.kinds = {name: kind for name, kind in kinds.items() if name in (wanted or kinds)}
        self.mixes: dict[str, Mix] = {}  # all that were ever on sale
        self._shelf: Shelf | None = None
        self._offers: tuple[Offer, ...] = ()
        self._read_s: float | None = None

    async def offers(self) -> Sequence[Offer]:
        """As of at most refresh_s ago."""
        now_s = self.wall()
        if self._read_s is None or now_s - self._read_s >= self.settings.refresh_s:
            mixes = await self._mixes()
            self.mixes |= {mix.offer.name: mix for mix in mixes}
            self._offers, self._read_s = tuple(mix.offer for mix in mixes), now_s
        return self._offers

    async def catalog(self, hours: float, offset_s: float = 0.0) -> PricedCatalog:
        """The offers, and their prices over the last hours; times plus offset_s."""
        offers = await self.offers()
        spot = [self.mixes[offer.name] for offer in offers if offer.market == "spot"]
        names = sorted({pool.instance_type for mix in spot for pool in mix.pools})
        told = await prices.spot(self.calls, names, self.wall() - hours * 3600) if names else []
        history = {mix.offer.name: _history(mix, told, offset_s) for mix in spot}
        return PricedCatalog(self.kinds, offers, history)

    async def _mixes(self) -> list[Mix]:
        shelf = await self._stocked()
        names = [one.name for one in shelf.types if one.spot]
        now_s = self.wall()
        told = await prices.spot(self.calls, names, now_s) if names else []
        latest = {(one.instance_type, one.zone): one.usd_per_h for one in told}
        mixes: list[Mix] = []
        for _, group in groupby(sorted(shelf.types, key=_group), key=_group):
            alike = list(group)
            scores = await self._scores(shelf, alike)
            mixes += self._of_group(shelf, alike, latest, scores)
        return mixes

    def _of_group(
        self,
        shelf: Shelf,
        alike: Sequence[Type],
        spot: Mapping[tuple[str, str], float],
        scores: Mapping[str, int],
    ) -> Iterable[Mix]:
        """The mixes of one kind and number of GPUs."""
        markets: tuple[Market, ...] = ("spot", "on_demand")
        for market in markets:
            pools = [
                Pool(one.name, zone, shelf.subnets[zone], usd)
                for one in alike
                for zone in sorted(shelf.zones.get(one.name, frozenset()) & shelf.subnets.keys())
                if (usd := _price(one, zone, market, spot, shelf.on_demand)) is not None
                and (market != "spot" or scores.get(zone, 10) >= self.settings.least_score)
            ]
            if self.settings.mix == "region":
                yield from self._mix(alike, market, "", pools, scores)
                continue
            for zone in sorted({pool.zone for pool in pools}):
                here = [pool for pool in pools if pool.zone == zone]
                yield from self._mix(alike, market, zone, here, scores)

    def _mix(
        self,
        alike: Sequence[Type],
        market: Market,
        zone: str,
        pools: Sequence[Pool],
        scores: Mapping[str, int],
    ) -> Iterable[Mix]:
        if not pools:
            return
        most = min(pool.usd_per_h for pool in pools) * (1 + self.settings.mix_within)
        within = tuple(
            sorted((pool for pool in pools if pool.usd_per_h <= most), key=lambda p: p.usd_per_h)
        )
        names = list(dict.fromkeys(pool.instance_type for pool in within))
        kind, count, place = alike[0].kind, alike[0].count, zone or self.region
        network = min(one.network_gb_per_s for one in alike if one.name in names)
        yield Mix(
            Offer(
                f"{market.replace('_', '-')}-{kind}x{count}-{place}",
                kind,
                count,
                self.region,
                place,
                market,
                within[-1].usd_per_h,
                self.settings.quota,
                self.settings.startup_s,
                network,
                _source(market, names, scores.get(zone)),
            ),
            within,
        )

    async def _scores(self, shelf: Shelf, alike: Sequence[Type]) -> Mapping[str, int]:
        """Placement scores by zone; none where they are not wanted, or not told."""
        names = [one.name for one in alike if one.spot]
        if not self.settings.least_score or not names:
            return {}
        rows = await self.calls.every(
            "ec2",
            "get_spot_placement_scores",
            "SpotPlacementScores",
            InstanceTypes=names,
            TargetCapacity=max(1, self.settings.quota),
            SingleAvailabilityZone=True,
            RegionNames=[self.region],
        )
        by_id = {row["AvailabilityZoneId"]: int(row["Score"]) for row in rows}
        return {zone: by_id[name] for zone, name in shelf.zone_ids.items() if name in by_id}

    async def _stocked(self) -> Shelf:
        now_s = self.wall()
        if self._shelf is None or now_s - self._shelf.read_s >= DAY_S:
            self._shelf = await self._read_shelf(now_s)
        return self._shelf

    async def _read_shelf(self, now_s: float) -> Shelf:
        patterns = [{"Name": "instance-type", "Values": list(split(self.settings.types))}]
        rows, subnets = await asyncio.gather(
            self.calls.every("ec2", "describe_instance_types", "InstanceTypes", Filters=patterns),
            self.calls.every("ec2", "describe_subnets", "Subnets", **self._which_subnets()),
        )
        count = self.settings.accelerators
        found = [one for one in types.read(rows, self.kinds) if count in (0, one.count)]
        if not found:
            raise ValueError(
                f"autoscale.aws.types = {self.settings.types!r} has no type with {count or 'any'} "
                f"GPUs of {', '.join(self.kinds)}; other types, kinds or accelerators are accepted"
            )
        names = [one.name for one in found]
        offerings, on_demand = await asyncio.gather(
            self.calls.every(
                "ec2",
                "describe_instance_type_offerings",
                "InstanceTypeOfferings",
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": names}],
            ),
            prices.on_demand(self.calls, self.region, names),
        )
        return Shelf(
            self.region,
            now_s,
            found,
            _zones(offerings),
            {row["AvailabilityZone"]: row["SubnetId"] for row in subnets},
            {row["AvailabilityZone"]: row["AvailabilityZoneId"] for row in subnets},
            on_demand,
        )

    def _which_subnets(self) -> dict[str, Any]:
        named = split(self.settings.subnets)
        if named:
            return {"SubnetIds": list(named)}
        return {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]}


def split(text: str) -> tuple[str, ...]:
    """The parts of a text with commas."""
    return tuple(part for part in map(str.strip, text.split(",")) if part)


def _group(one: Type) -> tuple[str, int]:
    return one.kind, one.count


def _zones(offerings: Iterable[Mapping[str, str]]) -> dict[str, frozenset[str]]:
    rows = sorted((row["InstanceType"], row["Location"]) for row in offerings)
    return {
        name: frozenset(zone for _, zone in group)
        for name, group in groupby(rows, key=lambda row: row[0])
    }


def _price(
    one: Type,
    zone: str,
    market: Market,
    spot: Mapping[tuple[str, str], float],
    on_demand: Mapping[str, float],
) -> float | None:
    """None where it isn't for sale."""
    if market == "spot":
        return spot.get((one.name, zone)) if one.spot else None
    return on_demand.get(one.name) if one.on_demand else None


def _source(market: str, names: Sequence[str], score: int | None) -> str:
    where = "EC2 spot price history" if market == "spot" else "AWS Price List"
    scored = "" if score is None or market != "spot" else f", placement score {score}"
    return f"{where}, the dearest of {', '.join(names)}{scored}"


def _history(mix: Mix, told: Sequence[prices.SpotPrice], offset_s: float) -> list[Price]:
    """The dearest of a mix's pools, from each change on."""
    pools = {(pool.instance_type, pool.zone) for pool in mix.pools}
    latest: dict[tuple[str, str], float] = {}
    history: list[Price] = []
    for one in told:
        pool = (one.instance_type, one.zone)
        if pool not in pools:
            continue
        latest[pool] = one.usd_per_h
        price = Price(
            offer=mix.offer.name, at_s=one.at_s + offset_s, usd_per_h=max(latest.values())
        )
        if history and history[-1].at_s == price.at_s:
            history.pop()
        if not history or history[-1].usd_per_h != price.usd_per_h:
            history.append(price)
    return history
