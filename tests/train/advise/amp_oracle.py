"""Every way to put single devices into stages, and every cut; and random small problems."""

from itertools import combinations, permutations
from math import inf

import numpy as np

from train.advise.amp import DeviceKind, LayerTable, Links, Shape


def best_step_s(layers: LayerTable, kinds: list[DeviceKind], links: Links, shape: Shape) -> float:
    """Over all of them; inf where none fits."""
    pool = [n for n, kind in enumerate(kinds) for _ in range(kind.count)]
    size, best = shape.stages * shape.replicas, inf
    for order in set(permutations(pool, size)):
        chain = [order[n : n + shape.replicas] for n in range(0, size, shape.replicas)]
        for inner in combinations(range(1, len(layers.seconds)), shape.stages - 1):
            ends = [0, *inner, len(layers.seconds)]
            best = min(best, _step_s(layers, kinds, links, shape, chain, ends))
    return best


def _step_s(
    layers: LayerTable,
    kinds: list[DeviceKind],
    links: Links,
    shape: Shape,
    chain: list[tuple[int, ...]],
    ends: list[int],
) -> float:
    times, sums = [], [0.0]
    for n, members in enumerate(chain):
        span = slice(ends[n], ends[n + 1])
        for device in members:
            kept = min(shape.micros, shape.stages - n) * sum(layers.kept_bytes[span])
            if kept + sum(layers.state_bytes[span]) > kinds[device].memory_bytes:
                return inf
        times.append(max(sum(layers.seconds[span]) / kinds[d].speed for d in members))
        if len(members) > 1:
            rate = _rate(kinds, links, members, members)
            part = sum(layers.gradient_bytes[span]) / len(members)
            sums.append((2 * len(members) - 2) * (links.latency_s + part / rate))
    for n in range(len(chain) - 1):
        rate = _rate(kinds, links, chain[n], chain[n + 1])
        times.append(2 * (links.latency_s + layers.sent_bytes[ends[n + 1] - 1] / rate))
    return sum(times) + (shape.micros - 1) * max(times) + max(sums)


def _rate(
    kinds: list[DeviceKind], links: Links, ones: tuple[int, ...], others: tuple[int, ...]
) -> float:
    """Of the slowest connection between any two of them."""
    pairs = [(a, b) for a in ones for b in others]
    if any(a != b for a, b in pairs):
        return links.network_bytes_per_s
    return kinds[pairs[0][0]].link_bytes_per_s


def random_problem(
    random: np.random.Generator,
) -> tuple[LayerTable, list[DeviceKind], Links, Shape]:
    """Up to five devices of up to three kinds, up to five layers; a network slower than links."""

    def drawn(low: float, high: float, count: int) -> tuple[float, ...]:
        return tuple(map(float, random.uniform(low, high, count)))

    count = int(random.integers(1, 6))
    layers = LayerTable(
        drawn(0.1, 2, count),
        drawn(0, 1, count),
        drawn(0, 3, count),
        drawn(0.1, 1, count),
        drawn(0, 4, count),
    )
    kinds = [
        DeviceKind(
            f"k{n}",
            int(random.integers(1, 3)),
            float(random.choice([0.4, 0.5, 1.0, 2.0])),
            float(random.uniform(0.8, 6)),
            float(random.uniform(4, 9)),
        )
        for n in range(int(random.integers(1, 4)))
    ]
    devices = sum(kind.count for kind in kinds)
    stages = int(random.integers(1, min(devices, count) + 1))
    replicas = int(random.integers(1, devices // stages + 1))
    links = Links(float(random.uniform(1, 4)), float(random.uniform(0, 0.2)))
    return layers, kinds, links, Shape(stages, replicas, int(random.integers(1, 7)))
