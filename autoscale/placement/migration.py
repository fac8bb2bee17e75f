"""From what runs now to a new layout, moving as few bytes as can be.

Every place of the new layout goes to the accelerator that already holds most of what it needs,
weights and the keys and values of live requests: an assignment of machines to groups of places, and
within each machine of accelerators to places (Miao et al., "SpotServe", ASPLOS 2024, section 3.3,
where both are Kuhn-Munkres). Roles hold no bytes, so a replica that only changes from prefill to
decode moves nothing (the light rescheduling of "ThunderServe", MLSys 2025). What has to move, and
when: `migration_moves`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from autoscale.placement.plan import ReplicaShape, Role


class Device(NamedTuple):
    """One accelerator of a machine."""

    machine: str
    number: int


@dataclass(frozen=True)
class Place:
    """What one accelerator of a layout holds: of layers start..stop-1 the share rank of
    `tensor`."""

    replica: int
    start: int
    stop: int
    rank: int = 0
    tensor: int = 1
    role: Role = "mixed"

    @property
    def low(self) -> float:
        return self.rank / self.tensor

    @property
    def high(self) -> float:
        return (self.rank + 1) / self.tensor


@dataclass(frozen=True)
class Sizes:
    """Bytes of one layer's weights, and of one token's keys and values in one layer."""

    layers: int
    layer_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Live:
    """Tokens that each old replica has in its cache, and which old replica's requests each new one
    goes on with."""

    tokens: Mapping[int, int] = field(default_factory=dict)
    inherits: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mapped:
    """Who takes which place, and the bytes that stay where they are."""

    places: Mapping[Device, Place]
    weight_bytes: float
    kv_bytes: float

    @property
    def reused_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


def layout(shape: ReplicaShape, replicas: int, layers: int, *, first: int = 0) -> list[Place]:
    """Places of so many copies, early stages first; stages differ by at most one layer, the deeper
    ones in front."""
    if shape.pipeline > layers:
        raise ValueError(f"pipeline is {shape.pipeline}; accepted is up to {layers} layers")
    deep, extra = divmod(layers, shape.pipeline)
    starts = [stage * deep + min(stage, extra) for stage in range(shape.pipeline + 1)]
    return [
        Place(replica, starts[stage], starts[stage + 1], rank, shape.tensor, shape.role)
        for replica in range(first, first + replicas)
        for stage in range(shape.pipeline)
        for rank in range(shape.tensor)
    ]


def inherit(old_tokens: Mapping[int, int], new_replicas: Sequence[int]) -> Live:
    """The fullest old replicas are gone on with, each by one new replica: equal new replicas are
    interchangeable, so any order of them is as good. What is over is computed anew."""
    fullest = sorted(old_tokens, key=lambda replica: (-old_tokens[replica], replica))
    return Live(dict(old_tokens), dict(zip(new_replicas, fullest, strict=False)))


def overlap(old: Place, new: Place) -> float:
    """Layers in common times the share of each in common."""
    layers = min(old.stop, new.stop) - max(old.start, new.start)
    share = min(old.high, new.high) - max(old.low, new.low)
    return max(0, layers) * max(0.0, share)


def reusable(old: Place | None, new: Place, sizes: Sizes, live: Live) -> tuple[float, float]:
    """Bytes of weights, and of keys and values, that a device of the old place need not fetch."""
    if old is None:
        return 0.0, 0.0
    common = overlap(old, new)
    tokens = live.tokens.get(old.replica, 0)
    goes_on = live.inherits.get(new.replica) == old.replica
    return common * sizes.layer_bytes, common * sizes.kv_bytes * tokens if goes_on else 0.0


def assign(
    old: Mapping[Device, Place],
    new: Sequence[Place],
    machines: Mapping[str, int],
    sizes: Sizes,
    live: Live | None = None,
) -> Mapped:
    """The mapping that reuses most. machines: those that stay or come, with their accelerators, all
    of them alike. Places are taken machine by machine in their order, so that the ranks of a layer
    sit together. ValueError where there are more places than accelerators."""
    live = live or Live()
    groups, devices = _groups(new, machines)
    names = list(devices)
    worth = np.zeros((len(names), len(groups)))
    for row, name in enumerate(names):
        for column, group in enumerate(groups):
            value = _worth(old, devices[name], group, sizes, live)
            worth[row, column] = value[linear_sum_assignment(value, maximize=True)].sum()
    taken: dict[Device, Place] = {}
    rows, columns = linear_sum_assignment(worth, maximize=True)
    for at, to in zip(rows.tolist(), columns.tolist(), strict=True):
        on, group = devices[names[at]], groups[to]
        value = _worth(old, on, group, sizes, live)
        for device, place in zip(*linear_sum_assignment(value, maximize=True), strict=True):
            taken[on[device]] = group[place]
    return _mapped(old, taken, sizes, live)


def identity(
    old: Mapping[Device, Place],
    new: Sequence[Place],
    machines: Mapping[str, int],
    sizes: Sizes,
    live: Live | None = None,
) -> Mapped:
    """Places in order on machines in order: what a system does that looks at nothing."""
    groups, devices = _groups(new, machines)
    taken = {
        device: place
        for group, on in zip(groups, devices.values(), strict=False)
        for device, place in zip(on, group, strict=False)
    }
    return _mapped(old, taken, sizes, live or Live())


def flips(old: Mapping[Device, Place], new: Mapping[Device, Place]) -> Iterator[Device]:
    """Devices that change their role and keep all of their weights."""
    for device, place in new.items():
        was = old.get(device)
        if was and was.role != place.role and overlap(was, place) == overlap(place, place):
            yield device


def _groups(
    new: Sequence[Place], machines: Mapping[str, int]
) -> tuple[list[list[Place]], dict[str, list[Device]]]:
    sizes = set(machines.values())
    if len(sizes) != 1:
        raise ValueError(f"machines have {sorted(sizes)} accelerators; accepted is one number")
    size = sizes.pop()
    groups = [list(new[at : at + size]) for at in range(0, len(new), size)]
    if len(groups) > len(machines):
        raise ValueError(
            f"{len(new)} places need {len(groups)} machines of {size} accelerators; "
            f"there are {len(machines)}"
        )
    return groups, {name: [Device(name, number) for number in range(size)] for name in machines}


def _worth(
    old: Mapping[Device, Place],
    devices: Sequence[Device],
    group: Sequence[Place],
    sizes: Sizes,
    live: Live,
) -> NDArray[np.float64]:
    return np.array(
        [[sum(reusable(old.get(d), place, sizes, live)) for place in group] for d in devices]
    )


def _mapped(
    old: Mapping[Device, Place], taken: Mapping[Device, Place], sizes: Sizes, live: Live
) -> Mapped:
    kept = [reusable(old.get(device), place, sizes, live) for device, place in taken.items()]
    return Mapped(dict(taken), sum(each[0] for each in kept), sum(each[1] for each in kept))
