"""What holds of the loop whatever comes: bounds, calm, speed, and getting over a fault.

Checked on what the loop was told and what the cloud was asked, never on what it says of itself;
each check has a mutation that it must notice.
"""

import random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from autoscale.loop import answers, parting
from autoscale.loop.turn import Turn
from cluster.settings.autoscale import DecodeScale, RoleScale
from tests.autoscale.loop.plant import PERIOD_S, RATE, Kept, Plant, offer, turns, whole
from tests.autoscale.loop.plant import settings as made

CHECKED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(
        Phase.explicit,
        Phase.generate,
    ),
)
LEVELS = st.lists(st.sampled_from([0.0, 50.0, 300.0, 900.0, 2500.0]), min_size=2, max_size=4)


def steps_of(levels: list[float], each_s: float = 400.0) -> Any:
    """A load that jumps from level to level."""
    return lambda at_s: levels[min(int(at_s / each_s), len(levels) - 1)]


def out_of_bounds(plant: Plant, kept: Kept, floor: int, cap: int) -> list[str]:
    """What went wrong in a run, from signals and actions alone."""
    found = []
    if plant.cloud.beyond_quota:
        found.append(f"{plant.cloud.beyond_quota} launches beyond the quota")
    leaving: set[str] = set()
    for signals, decision in kept.steps:
        leaving |= {a.machine for a in decision.actions if a.act in ("drain", "terminate")}
        told = {m.id: m for m in signals.machines}
        staying = [m for m in signals.machines if m.id not in leaving and m.doomed_s is None]
        asked = {a.token for a in decision.actions if a.act == "launch"}
        count = len(staying) + len(asked - {m.token for m in signals.machines})
        need = decision.needs["decode"].need
        if not floor <= need <= cap:
            found.append(f"step {decision.number}: need {need}")
        if count > cap:
            found.append(f"step {decision.number}: {count} machines, cap {cap}")
        if count < floor and plant.cloud.sale and not plant.cloud.empty:
            found.append(f"step {decision.number}: {count} machines, floor {floor}")
        chosen = [
            a.machine
            for a in decision.actions
            if a.act == "drain" and told[a.machine].doomed_s is None
        ]
        answering = sum(m.phase == "ready" for m in staying)
        if any(told[name].phase == "ready" for name in chosen) and answering < max(floor, need):
            found.append(f"step {decision.number}: {answering} left of {need}, and it drained")
    return found


def bounded_run(levels: list[float], floor: int, cap: int, quota: int, lost: list[int]) -> Any:
    kept = Kept()
    offers = (offer("a", quota=quota, usd=1.0), offer("b", quota=cap, usd=2.0))
    scale = DecodeScale(floor=floor, cap=cap, tokens_per_s=RATE)
    plant = Plant(steps_of(levels), made(decode=scale), offers, log=kept)

    def breaks(plant: Plant) -> None:
        if len(plant.decisions) in lost and plant.cloud.rented:
            names = sorted(plant.cloud.rented)
            plant.cloud.lose(names[0])
            if len(names) > 1:
                plant.cloud.doom(names[1], 45.0)

    plant.run(80, breaks)
    return out_of_bounds(plant, kept, floor, cap)


@CHECKED
@given(
    LEVELS, st.integers(0, 3), st.integers(3, 12), st.integers(1, 4), st.sets(st.integers(2, 70))
)
def test_never_below_the_floor_nor_above_cap_or_quota(
    levels: list[float], floor: int, cap: int, quota: int, lost: set[int]
):
    assert bounded_run(levels, max(floor, 1), cap, quota, sorted(lost)) == []


def _no_guard(turn: Turn, role: str, wish: Any) -> None:
    for member in turn.members(role)[:1]:
        turn.part(member, "needed or not")


@pytest.mark.parametrize("mutation", ["quota", "cap", "floor"])
def test_the_bounds_are_what_holds_them(monkeypatch: pytest.MonkeyPatch, mutation: str):
    if mutation == "quota":
        monkeypatch.setattr(Turn, "is_open", lambda turn, offer: True)
    elif mutation == "cap":
        monkeypatch.setattr(
            Turn, "scale", lambda turn, role: RoleScale(cap=1000, tokens_per_s=RATE)
        )
    else:
        monkeypatch.setattr(parting, "part", _no_guard)
    assert bounded_run([900.0, 50.0], 2, 6, 3, [10, 20]) != []


@CHECKED
@given(st.floats(30.0, 1250.0), st.integers(0, 1000))
def test_a_steady_load_never_oscillates(rate: float, seed: int):
    draws = random.Random(seed)
    plant = Plant(lambda at_s: rate * draws.uniform(0.98, 1.02), made())
    plant.run(150)
    settled = plant.needs()[60:]
    assert turns(settled) == 0, settled
    assert len(set(settled)) <= 2 and settled == sorted(settled, reverse=True)
    assert settled[-1] >= whole(rate, plant.settings.filled)
    late = [act for decision in plant.decisions[110:] for act in decision.actions]
    assert late == []


def test_without_delays_and_band_it_would():
    """The same load, near an edge, with hysteresis off."""
    draws = random.Random(1)
    nervous = made(up_delay_s=0.0, down_delay_s=0.0, band=0.0)
    plant = Plant(lambda at_s: 400.0 * draws.uniform(0.98, 1.02), nervous).run(150)
    assert turns(plant.needs()[60:]) > 2


@CHECKED
@given(st.floats(30.0, 300.0))
def test_a_step_to_ten_times_the_load_is_met_in_bounded_time_and_measure(rate: float):
    wide = made(decode=DecodeScale(floor=1, cap=200, tokens_per_s=RATE))
    at_step = 60
    plant = Plant(lambda at_s: rate * (10 if at_s > at_step * PERIOD_S else 1), wide)
    plant.run(at_step + 30)
    enough = whole(10 * rate, 1.0)
    needs = plant.needs()
    reached = next(n for n, need in enumerate(needs) if n >= at_step and need >= enough)
    wait_steps = wide.up_delay_s / PERIOD_S + 4
    assert reached - at_step <= wait_steps, needs[at_step - 2 :]
    assert max(needs) <= 3 * whole(10 * rate, wide.filled)
    assert plant.service.answering("decode") >= enough


def test_an_up_delay_is_a_delay():
    """The bound above is that of the delay: a longer one is noticed."""
    slow = made(up_delay_s=300.0, decode=DecodeScale(floor=1, cap=200, tokens_per_s=RATE))
    plant = Plant(lambda at_s: 1000.0 if at_s > 1200 else 100.0, slow).run(90)
    assert plant.needs()[60 + 6] < 10 <= max(plant.needs())


FAULTS = [
    *((call, fault) for call in ("launch", "terminate") for fault in ("fails", "hangs")),
    *((call, "fails") for call in ("offers", "events", "signals", "machines")),
    ("machines", "hangs"),
    ("signals", "hangs"),
    ("launch", "lost answer"),
    ("terminate", "lost answer"),
    ("set_replicas", "fails"),
    ("set_replicas", "lost answer"),
    ("drain", "fails"),
    ("drain", "hangs"),
    ("machine", "lost"),
    ("machine", "doomed"),
    ("machine", "lost while starting"),
]


def after_fault(call: str, fault: str, at_step: int) -> Plant:
    plant = Plant(steps_of([250.0, 700.0, 250.0], 500.0), made())

    def breaks(plant: Plant) -> None:
        if len(plant.decisions) != at_step or not plant.cloud.rented:
            return
        newest = max(plant.cloud.rented, key=lambda name: int(name[1:]))
        if fault == "doomed":
            plant.cloud.doom(newest, 45.0)
        elif call == "machine":
            plant.cloud.lose(newest)
        elif call in ("signals", "set_replicas", "drain"):
            plant.service.faults.setdefault(call, [fault])  # type: ignore[list-item]
        else:
            plant.cloud.faults.setdefault(call, [fault])  # type: ignore[list-item]

    return plant.run(110, breaks)


def unsettled(plant: Plant) -> list[str]:
    """What a run that has got over everything would not leave behind."""
    need, there = plant.needs()[-1], set(plant.cloud.rented)
    found = [] if whole(250.0, plant.settings.filled) <= need <= 5 else [f"need {need}"]
    found += [] if len(there) == need else [f"{len(there)} machines for {need}"]
    found += [] if set(plant.service.roles) == there else [f"replicas on {plant.service.roles}"]
    found += [] if plant.service.answering("decode") == need else ["not all answer"]
    found += [] if plant.service.pools["decode"].queued == 0 else ["work waits"]
    pending = [str(act) for decision in plant.decisions[-5:] for act in decision.actions]
    return found + pending


@pytest.mark.parametrize(("call", "fault"), FAULTS)
@pytest.mark.parametrize("at_step", [1, 30, 62])
def test_it_gets_over_any_single_fault(call: str, fault: str, at_step: int):
    assert unsettled(after_fault(call, fault, at_step)) == []


def test_without_asking_again_a_lost_launch_would_stay(monkeypatch: pytest.MonkeyPatch):
    """A loop that trusts its launches: one that failed is counted for ever."""

    def trusting(turn: Turn, one: Any, answer: Any) -> None:
        turn.asked.append(one)

    assert _answering_after_a_failed_launch() == 1
    monkeypatch.setattr(answers, "_settle", trusting)
    assert _answering_after_a_failed_launch() == 0


def _answering_after_a_failed_launch() -> int:
    plant = Plant(lambda at_s: 50.0, made(decode=DecodeScale(floor=1, cap=1, tokens_per_s=RATE)))
    plant.cloud.faults["launch"] = ["fails"]
    return plant.run(30).service.answering("decode")
