"""Every share, every cut, every order of devices and every split into workers tried; and random
small problems of training."""

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from math import inf

import numpy as np

from autoscale.placement.shares import Worker
from autoscale.placement.shares_pipeline import Device, LayerBytes


def least_step_s(workers: Sequence[Worker], samples: int) -> float:
    """Over all shares within memory; inf where there are none."""
    least = inf
    for shares in product(*(range(w.most_samples + 1) for w in workers)):
        if sum(shares) == samples:
            times = [
                w.fixed_s + n * w.sample_s if n else 0.0
                for w, n in zip(workers, shares, strict=True)
            ]
            least = min(least, max(times))
    return least


def best_rate(devices: Sequence[Device], layers: LayerBytes, most_in_flight: int) -> float:
    """Minibatches per second of the fastest pipeline; 0.0 where none fits."""
    pool = [n for n, device in enumerate(devices) for _ in range(device.count)]
    orders = {o for k in range(1, len(pool) + 1) for o in permutations(pool, k)}
    best = 0.0
    for order in orders:
        for cuts in _compositions(len(layers.state_bytes), len(order)):
            for in_flight in range(1, most_in_flight + 1):
                chain = [devices[n] for n in order]
                best = max(best, _rate(chain, layers, cuts, in_flight))
    return best


def _compositions(layers: int, parts: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations(range(1, layers), parts - 1):
        cuts = [0, *inner, layers]
        yield list(zip(cuts, cuts[1:], strict=False))


def _rate(
    chain: Sequence[Device], layers: LayerBytes, cuts: list[tuple[int, int]], in_flight: int
) -> float:
    seconds = []
    for position, (device, (start, stop)) in enumerate(zip(chain, cuts, strict=True)):
        kept = min(in_flight, len(chain) - position)
        need = sum(layers.state_bytes[n] + kept * layers.kept_bytes[n] for n in range(start, stop))
        if need > device.memory_bytes:
            return 0.0
        send = layers.send_s[stop - 1] if stop < len(layers.state_bytes) else 0.0
        seconds.append(sum(device.layer_s[start:stop]) + send)
    return min(1.0 / max(seconds), in_flight / sum(seconds))


def best_workers_rate(devices: Sequence[Device], layers: LayerBytes, most_in_flight: int) -> float:
    """The highest sum of rates over all ways to deal the accelerators out to workers."""
    pool = [n for n, device in enumerate(devices) for _ in range(device.count)]
    known: dict[tuple[int, ...], float] = {}
    best = 0.0
    for labels in product(range(len(pool)), repeat=len(pool)):
        total = 0.0
        for label in set(labels):
            part = tuple(sorted(pool[n] for n, own in enumerate(labels) if own == label))
            if part not in known:
                own = [
                    Device(d.name, d.layer_s, d.memory_bytes, part.count(n))
                    for n, d in enumerate(devices)
                    if n in part
                ]
                known[part] = best_rate(own, layers, most_in_flight)
            total += known[part]
        best = max(best, total)
    return best


def random_workers(random: np.random.Generator) -> tuple[list[Worker], int]:
    count = int(random.integers(2, 5))
    workers = [
        Worker(
            float(random.uniform(0.01, 0.1)),
            int(random.integers(0, 9)),
            float(random.choice([0.0, 0.05])),
        )
        for _ in range(count)
    ]
    return workers, int(random.integers(1, 14))


def random_pipeline(
    random: np.random.Generator, most_devices: int = 4, most_layers: int = 6
) -> tuple[list[Device], LayerBytes, int]:
    """Unlike layers over one to three kinds, memory tight in about half."""
    layers = int(random.integers(2, most_layers + 1))
    kinds = int(random.integers(1, 4))
    counts = random.multinomial(random.integers(1, most_devices + 1), np.ones(kinds) / kinds)
    work = random.uniform(0.5, 2.0, layers)
    devices = [
        Device(
            f"k{n}",
            tuple((work * random.uniform(0.1, 1.0)).tolist()),
            float(random.uniform(2.0, 14.0)),
            int(counts[n]),
        )
        for n in range(kinds)
    ]
    sizes = (random.uniform(0.5, 2.0, layers), random.uniform(0.1, 0.6, layers))
    sends = random.uniform(0.0, 0.2, layers)
    bytes_ = LayerBytes(tuple(sizes[0].tolist()), tuple(sizes[1].tolist()), tuple(sends.tolist()))
    return devices, bytes_, int(random.integers(1, 5))
