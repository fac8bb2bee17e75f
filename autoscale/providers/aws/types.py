"""Which EC2 instance types are machines of which kind of GPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoscale.catalog.kind import GpuKind

MIB = 1 << 20
# A kind's memory is as sold; EC2 counts what the device reports, or GB for GiB: 0.95 to 1.10 of it.
LEAST, MOST = 0.95, 1.10


@dataclass(frozen=True)
class Type:
    """An instance type. network_gb_per_s: what it always has, not its bursts."""

    name: str
    kind: str
    count: int
    spot: bool
    on_demand: bool
    network_gb_per_s: float


def read(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, GpuKind]) -> list[Type]:
    """Of DescribeInstanceTypes' entries, those whose GPUs are of a known kind."""
    found = ((row, _kind(row, kinds)) for row in rows)
    return [_type(row, kind) for row, kind in found if kind is not None]


def _type(row: Mapping[str, Any], kind: str) -> Type:
    usage = row.get("SupportedUsageClasses", ())
    return Type(
        row["InstanceType"],
        kind,
        sum(gpu["Count"] for gpu in row["GpuInfo"]["Gpus"]),
        "spot" in usage,
        "on-demand" in usage,
        _network_gb_per_s(row.get("NetworkInfo", {})),
    )


def _kind(row: Mapping[str, Any], kinds: Mapping[str, GpuKind]) -> str | None:
    """The kind of the same name (with the memory's size in it, where there are several) that has as
    much memory: a part of a GPU is none."""
    gpus = row.get("GpuInfo", {}).get("Gpus", ())
    if len(gpus) != 1 or not gpus[0].get("Name"):
        return None
    name = gpus[0]["Name"].lower().replace(" ", "-")
    memory_bytes = gpus[0]["MemoryInfo"]["SizeInMiB"] * MIB
    for kind in kinds.values():
        alike = kind.name == name or kind.name.startswith(f"{name}-")
        if alike and LEAST <= memory_bytes / kind.memory_bytes <= MOST:
            return kind.name
    return None


def _network_gb_per_s(info: Mapping[str, Any]) -> float:
    cards = info.get("NetworkCards", ())
    gigabits = sum(card.get("BaselineBandwidthInGbps", 0.0) for card in cards)
    return gigabits / 8 if gigabits else 1.25
