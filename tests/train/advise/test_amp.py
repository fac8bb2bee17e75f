"""The search over unlike devices against every way there is."""

from dataclasses import replace

import numpy as np
import pytest

from tests.train.advise.amp_oracle import best_step_s, random_problem
from train.advise import amp
from train.advise.amp import DeviceKind, LayerTable, Links, Shape, assign

SEED = int(np.random.SeedSequence().generate_state(1)[0])
PROBLEMS = 300


def wrong(seed: int) -> int:
    """How many of some random problems are not solved as well as by trying all."""
    missed = fits = 0
    for number in range(PROBLEMS):
        layers, kinds, links, shape = random_problem(np.random.default_rng([seed, number]))
        wanted = best_step_s(layers, kinds, links, shape)
        found = assign(layers, kinds, links, shape)
        step_s = float("inf") if found is None else found.step_s(shape.micros)
        fits += wanted < float("inf")
        missed += step_s != pytest.approx(wanted, rel=1e-9)
    assert fits > PROBLEMS / 3
    return missed


def test_the_assignment_is_the_fastest_of_all() -> None:
    assert wrong(SEED) == 0, SEED


def test_keeping_one_way_to_each_place_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: of the ways to a state only the one with the fastest slowest stage."""

    def keep(into: list[amp.Assignment], new: amp.Assignment) -> None:
        into[:] = [min([*into, new], key=lambda made: made.slowest_s)]

    monkeypatch.setattr(amp, "_keep", keep)
    assert wrong(0) > 0


def alike(count: int) -> LayerTable:
    return LayerTable(
        (1.0,) * count, (0.0,) * count, (0.0,) * count, (1.0,) * count, (0.0,) * count
    )


def test_a_fast_device_gets_more_layers_and_memory_sets_limits() -> None:
    fast, slow = DeviceKind("fast", 1, 3.0, 9.0, 1.0), DeviceKind("slow", 1, 1.0, 9.0, 1.0)
    for memory, sizes in ((9.0, [3, 1]), (2.0, [2, 2])):
        kinds = [replace(fast, memory_bytes=memory), slow]
        found = assign(alike(4), kinds, Links(1.0), Shape(2, 1, 8))
        assert found is not None
        assert [s.stop - s.start for s in sorted(found.stages, key=lambda s: -s.group[0])] == sizes
    tight = [replace(fast, memory_bytes=1.0), replace(slow, memory_bytes=1.0)]
    assert assign(alike(4), tight, Links(1.0), Shape(2, 1, 8)) is None


def test_replicas_of_a_stage_stay_within_a_machine_where_the_network_is_slow() -> None:
    """Two machines of two: gradients are large and what is sent on is small, or the reverse."""
    kinds = [DeviceKind(f"m{n}", 2, 1.0, 99.0, 100.0) for n in range(2)]
    large = replace(alike(4), gradient_bytes=(10.0,) * 4)
    found = assign(large, kinds, Links(1.0), Shape(2, 2, 4))
    assert found is not None
    assert sorted(stage.group for stage in found.stages) == [(0, 2), (2, 0)]
    sending = replace(alike(4), sent_bytes=(50.0,) * 4)
    found = assign(sending, kinds, Links(1.0), Shape(2, 1, 4))
    assert found is not None and found.stages[0].group == found.stages[1].group


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="3 stages of 1 devices: there are 2 devices and 4 layers"):
        assign(alike(4), [DeviceKind("k", 2, 1.0, 9.0, 1.0)], Links(1.0), Shape(3, 1, 1))
