"""What EC2 costs: on demand by the Price List API, spot by its price history."""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from autoscale.providers.aws import marks
from autoscale.providers.aws.calls import Calls

LINUX = "Linux/UNIX"
TERMS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "preInstalledSw": "NA",
    "licenseModel": "No License required",
}


class SpotPrice(NamedTuple):
    """From at_s (a calendar time) on, a machine of the type costs so much in the zone."""

    at_s: float
    instance_type: str
    zone: str
    usd_per_h: float


async def on_demand(calls: Calls, region: str, types: Iterable[str]) -> Mapping[str, float]:
    """Dollars per hour by type; a type without a price is left out."""
    names = list(types)
    found = await asyncio.gather(*(_on_demand(calls, region, name) for name in names))
    return {name: usd for name, usd in zip(names, found, strict=True) if usd is not None}


async def _on_demand(calls: Calls, region: str, name: str) -> float | None:
    wanted = {"instanceType": name, "regionCode": region, **TERMS}
    products = await calls.every(
        "pricing",
        "get_products",
        "PriceList",
        ServiceCode="AmazonEC2",
        Filters=[
            {"Type": "TERM_MATCH", "Field": field, "Value": value}
            for field, value in wanted.items()
        ],
    )
    hourly = [usd for product in products for usd in _hourly(json.loads(product)) if usd > 0]
    return min(hourly, default=None)


def _hourly(product: Mapping[str, Any]) -> Iterable[float]:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            if dimension["unit"] == "Hrs":
                yield float(dimension["pricePerUnit"]["USD"])


async def spot(calls: Calls, types: Sequence[str], since_s: float) -> list[SpotPrice]:
    """Every change since a calendar time, and for each pool the price that held then; in the order
    of their times."""
    rows = await calls.every(
        "ec2",
        "describe_spot_price_history",
        "SpotPriceHistory",
        InstanceTypes=list(types),
        ProductDescriptions=[LINUX],
        StartTime=marks.written(since_s),
    )
    return sorted(
        SpotPrice(
            row["Timestamp"].timestamp(),
            row["InstanceType"],
            row["AvailabilityZone"],
            float(row["SpotPrice"]),
        )
        for row in rows
    )
