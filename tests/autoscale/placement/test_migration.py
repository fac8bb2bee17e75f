"""Mapping and moving: against brute force, networkx and a replay of the moves."""

import itertools
from collections import defaultdict
from dataclasses import replace

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import pytest

from autoscale.placement.migration import (
    Device,
    Live,
    Mapped,
    Place,
    Sizes,
    assign,
    flips,
    identity,
    inherit,
    layout,
    reusable,
)
from autoscale.placement.migration_moves import Migration, migrate
from autoscale.placement.plan import ReplicaShape

SIZES = Sizes(layers=12, layer_bytes=1000, kv_bytes=3)


def a_layout(rng: np.random.Generator, devices: int) -> list[Place]:
    fits = [(t, p) for t in (1, 2, 4) for p in (1, 2, 3, 4) if t * p <= devices]
    tensor, pipeline = fits[int(rng.integers(len(fits)))]
    shape = ReplicaShape("T4", tensor, pipeline)
    return layout(shape, int(rng.integers(1, devices // (tensor * pipeline) + 1)), SIZES.layers)


def on_machines(places: list[Place], machines: dict[str, int]) -> dict[Device, Place]:
    devices = [Device(name, index) for name, n in machines.items() for index in range(n)]
    return dict(zip(devices, places, strict=False))


def a_change(rng: np.random.Generator, size: int, count: int):
    """Old places on some machines; the machines that are there afterwards; a new layout; live
    requests."""
    machines = {f"m{n}": size for n in range(count)}
    old = on_machines(a_layout(rng, size * count), machines)
    after = {name: n for name, n in machines.items() if rng.random() < 0.8 or name == "m0"}
    after |= {f"new{n}": size for n in range(int(rng.integers(0, 2)))}
    new = a_layout(rng, sum(after.values()))
    tokens = {place.replica: int(rng.integers(0, 2000)) for place in old.values()}
    return old, after, new, inherit(tokens, sorted({place.replica for place in new}))


def value(old: dict[Device, Place], device: Device, place: Place, live: Live) -> float:
    return sum(reusable(old.get(device), place, SIZES, live))


@pytest.mark.parametrize("seed", range(20))
def test_single_accelerators_reuse_as_much_as_a_matching_by_networkx(seed: int):
    old, after, new, live = a_change(np.random.default_rng(seed), 1, 6)
    mapped = assign(old, new, after, SIZES, live)
    graph = nx.Graph()
    for name, (number, place) in itertools.product(after, enumerate(new)):
        worth = value(old, Device(name, 0), place, live)
        graph.add_edge(name, number, weight=worth)
    pairs = nx.max_weight_matching(graph, maxcardinality=True)
    best = sum(graph.edges[pair]["weight"] for pair in pairs)
    assert mapped.reused_bytes == pytest.approx(best)
    assert sorted(mapped.places.values(), key=repr) == sorted(new, key=repr)


@pytest.mark.parametrize("seed", range(12))
def test_machines_of_two_reuse_as_much_as_every_permutation(seed: int):
    old, after, new, live = a_change(np.random.default_rng(100 + seed), 2, 3)
    groups = [new[at : at + 2] for at in range(0, len(new), 2)]
    best = 0.0
    for names in itertools.permutations(after, len(groups)):
        total = 0.0
        for name, group in zip(names, groups, strict=True):
            orders = itertools.permutations(range(2), len(group))
            total += max(
                sum(
                    value(old, Device(name, index), place, live)
                    for index, place in zip(order, group, strict=True)
                )
                for order in orders
            )
        best = max(best, total)
    assert assign(old, new, after, SIZES, live).reused_bytes == pytest.approx(best)


def test_never_below_identity_and_mostly_above():
    gained = 0
    for seed in range(60):
        old, after, new, live = a_change(np.random.default_rng(seed), 4, 4)
        ours = assign(old, new, after, SIZES, live).reused_bytes
        plain = identity(old, new, after, SIZES, live).reused_bytes
        assert ours >= plain - 1e-6
        gained += ours > plain + 1e-6
    assert gained > 30


def test_ranks_of_a_layer_stay_on_one_machine():
    old = on_machines(layout(ReplicaShape("T4", 4, 3), 1, 12), {"a": 4, "b": 4, "c": 4})
    new = layout(ReplicaShape("T4", 4, 2), 1, 12)
    mapped = assign(old, new, {"b": 4, "c": 4}, SIZES)
    stages = defaultdict(set)
    for device, place in mapped.places.items():
        stages[place.start].add(device.machine)
    assert all(len(machines) == 1 for machines in stages.values())
    assert mapped.weight_bytes == 6 * 1000  # b keeps layers 4, 5 or 6, 7; c 8 to 11


def replay(
    migration: Migration, old: dict[Device, Place], new: dict[Device, Place], live: Live
) -> None:
    """Makes every move on cells of a layer: its source holds them, its target does not, and
    afterwards everybody has what it needs."""
    cells = 24
    held: dict[Device, set[tuple[int, int]]] = defaultdict(set)
    for device, place in old.items():
        held[device] = cells_of(place, cells)
    before = {device: set(parts) for device, parts in held.items()}
    for step in migration.steps:
        for move in step:
            low, high = round(move.low * cells), round(move.high * cells)
            part = {(move.layer, cell) for cell in range(low, high)}
            assert move.bytes > 0
            if move.source is not None:
                assert part <= before[move.source]
            if move.what == "weights":
                assert not part & held[move.target]
                held[move.target] |= part
            else:
                assert move.source is not None
                replica = live.inherits[new[move.target].replica]
                assert old[move.source].replica == replica
    for device, place in new.items():
        assert cells_of(place, cells) <= held[device]


def cells_of(place: Place, cells: int) -> set[tuple[int, int]]:
    low, high = round(place.low * cells), round(place.high * cells)
    return {(layer, c) for layer in range(place.start, place.stop) for c in range(low, high)}


@pytest.mark.parametrize("seed", range(30))
def test_moves_bring_everything_from_who_has_it(seed: int):
    old, after, new, live = a_change(np.random.default_rng(seed), 4, 4)
    mapped = assign(old, new, after, SIZES, live)
    migration = migrate(old, mapped, SIZES, limit_bytes=1e12, live=live)
    replay(migration, old, dict(mapped.places), live)
    needed = sum((place.stop - place.start) / place.tensor * 1000 for place in new)
    moved = migration.moved_bytes("weights")
    assert moved == pytest.approx(needed - mapped.weight_bytes)
    anywhere = {layer for place in old.values() for layer in range(place.start, place.stop)}
    stored = [m for step in migration.steps for m in step if m.source is None]
    assert anywhere != set(range(12)) or not stored


def peak_by_hand(migration: Migration, old: dict[Device, Place], new: dict[Device, Place]) -> float:
    """Weights alone: what a device holds, layer by layer, when each step has arrived."""
    layers = range(SIZES.layers)
    width = {
        (device, layer): (place.high - place.low) * SIZES.layer_bytes
        for device, place in old.items()
        for layer in layers
        if place.start <= layer < place.stop
    }
    order = [step[0].layer for step in migration.steps]
    devices = set(old) | set(new)
    peak = 0.0
    for number in range(-1, len(order)):
        for device in devices:
            total = 0.0
            for layer in layers:
                done = layer not in order or order.index(layer) < number
                arriving = layer in order and order.index(layer) == number
                target = new.get(device)
                wanted = target is not None and target.start <= layer < target.stop
                has = width.get((device, layer), 0.0)
                want = (target.high - target.low) * SIZES.layer_bytes if target and wanted else 0.0
                place = old.get(device)
                both = 0.0
                if has and want and place and target:
                    share = min(place.high, target.high) - max(place.low, target.low)
                    both = max(0.0, share) * SIZES.layer_bytes
                untouched = layer in order and not done and not arriving
                total += has if untouched else has + want - both if arriving else want
            peak = max(peak, total)
    return peak


def test_a_limit_holds_back_layers_until_there_is_room():
    """a gives its back half to b, which gives its front half to a: with little room, front and back
    layers have to take turns."""
    machines = {"a": 1, "b": 1}
    old = on_machines(list(reversed(layout(ReplicaShape("T4", 1, 2), 1, 12))), machines)
    places = dict(on_machines(layout(ReplicaShape("T4", 1, 2), 1, 12), machines))
    mapped = Mapped(places, 0, 0)
    free = migrate(old, mapped, SIZES, limit_bytes=1e12)
    assert [step[0].layer for step in free.steps] == list(range(12))
    assert free.peak_bytes == peak_by_hand(free, old, places) == 12_000
    tight = migrate(old, mapped, SIZES, limit_bytes=8000)
    assert tight.peak_bytes == peak_by_hand(tight, old, places) <= 8000
    assert tight.moved_bytes() == free.moved_bytes() == 12_000
    with pytest.raises(ValueError, match="limit_bytes"):
        migrate(old, mapped, SIZES, limit_bytes=6500)


def test_early_stages_start_first():
    old = on_machines(layout(ReplicaShape("T4", 2, 1), 2, 12), {"a": 4})
    new = layout(ReplicaShape("T4", 1, 4), 1, 12)
    mapped = assign(old, new, {"b": 4}, SIZES)
    migration = migrate(old, mapped, SIZES, limit_bytes=1e12)
    ready = [migration.ready_after[0, start] for start in (0, 3, 6, 9)]
    assert ready == [2, 5, 8, 11]
    assert migration.duration_s(1e-9) == pytest.approx(12_000)


def test_more_copies_come_from_peers_not_from_storage():
    old = on_machines(layout(ReplicaShape("T4", 2, 1), 1, 12), {"a": 2})
    new = layout(ReplicaShape("T4", 2, 1), 2, 12)
    mapped = assign(old, new, {"a": 2, "b": 2}, SIZES)
    migration = migrate(old, mapped, SIZES, limit_bytes=1e12)
    assert migration.moved_bytes() == 12_000
    assert all(m.source is not None for step in migration.steps for m in step)


def test_requests_go_on_where_their_keys_are():
    """Two full replicas shrink to one: the fuller one's accelerators are kept, the other's tokens
    are lost. Without a look at the caches any of them would do."""
    old = on_machines(layout(ReplicaShape("T4", 2, 1), 2, 12), {"a": 2, "b": 2})
    live = inherit({0: 100, 1: 900}, [0])
    mapped = assign(old, layout(ReplicaShape("T4", 2, 1), 1, 12), {"a": 2, "b": 2}, SIZES, live)
    assert {device.machine for device in mapped.places} == {"b"}
    migration = migrate(old, mapped, SIZES, limit_bytes=1e12, live=live)
    assert (migration.moved_bytes(), migration.lost_kv_tokens) == (0, 100)


def test_a_role_flips_without_a_byte():
    shape = ReplicaShape("T4", 2, 2, "prefill")
    old = on_machines(layout(shape, 2, 12), {"a": 4, "b": 4})
    new = [replace(place, role="decode") if place.replica == 0 else place for place in old.values()]
    mapped = assign(old, new, {"a": 4, "b": 4}, SIZES)
    migration = migrate(old, mapped, SIZES, limit_bytes=1e12)
    assert migration.moved_bytes("weights") == 0 and migration.steps == ()
    assert set(migration.ready_after.values()) == {-1}
    assert len(list(flips(old, mapped.places))) == 4
    moved = migrate(old, identity(old, new[::-1], {"a": 4, "b": 4}, SIZES), SIZES, limit_bytes=1e12)
    assert moved.moved_bytes("weights") > 0  # the order alone would have cost a reload


def test_what_does_not_fit_is_refused():
    places = layout(ReplicaShape("T4", 4, 2), 1, 12)
    with pytest.raises(ValueError, match="8 places need 2 machines of 4"):
        assign({}, places, {"a": 4}, SIZES)
    with pytest.raises(ValueError, match="accepted is one number"):
        assign({}, places, {"a": 4, "b": 8}, SIZES)
    with pytest.raises(ValueError, match="pipeline is 13"):
        layout(ReplicaShape("T4", 1, 13), 1, 12)
