"""Single steps and short runs of the loop: what it does, in which order, and that it is pure."""

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Decision
from autoscale.loop.forecast import SURGE, Forecast
from autoscale.loop.need import RoleMind
from autoscale.loop.record import STEP, Step
from autoscale.loop.signals import Held, RoleLoad, Signals, TrainingClaim
from autoscale.loop.state import LoopState
from autoscale.loop.step import Loop
from autoscale.spot.basic import OnDemandPolicy, Refusals
from autoscale.spot.belief import SpotRisk
from autoscale.spot.fleet import Action, Fleet, Launch, Terminate
from autoscale.spot.levels import fit
from autoscale.spot.mixed import MixedPolicy
from cluster.settings.autoscale import DecodeScale, RoleScale
from tests.autoscale.loop.plant import PERIOD_S, RATE, Kept, Plant, offer
from tests.autoscale.loop.plant import settings as made

SPOT = offer("s", "spot", 0.3)
OD = offer("od", usd=1.0)
IDLE = {"decode": RoleLoad(0, 0, 0, 0.0)}


def held(name: str, of: Offer = OD, phase: Any = "ready", **more: Any) -> Held:
    values = {"role": "decode", "token": f"decode/t/{name}", "serving": True, **more}
    return Held(name, of.name, values.pop("role"), phase, 0.0, 0.0, None, **values)


def seen(now_s: float, machines: list[Held], load: Any = None, **more: Any) -> Signals:
    values = {"offers": (SPOT, OD), "events": (), **more}
    return Signals(now_s, IDLE if load is None else load, tuple(machines), **values)


def loop(policy: Any = None, **more: Any) -> Loop:
    return Loop(made(**more), policy or OnDemandPolicy(), Refusals(), "t")


class Wants:
    """A policy that wants exactly so many of each offer."""

    name = "wants"

    def __init__(self, **counts: int) -> None:
        self.counts = counts

    def decide(self, now_s: float, need: int, fleet: Fleet, offers: Any, risk: Any) -> list[Action]:
        actions: list[Action] = []
        for one in offers:
            nodes, count = fleet.of(one.name), self.counts.get(one.name, 0)
            if len(nodes) < count:
                actions.append(Launch(one, count - len(nodes), "wanted"))
            actions += [Terminate(node.id, "not wanted") for node in nodes[count:]]
        return actions


def acts(decision: Decision, kind: str) -> list[Any]:
    return [act for act in decision.actions if act.act == kind]


def test_a_step_changes_nothing_that_it_was_given():
    """Equal arguments, equal bytes, for a memory that learns too."""
    history = (np.random.default_rng(1).random((400, 1)) < 0.9).astype(np.int64) * 4
    risk = SpotRisk(fit(history, ("s",), ("r",), (1, 2, 4), 20.0))
    mixed = Loop(made(), MixedPolicy(20.0), risk, "t")
    state, before = mixed.start(), risk.beliefs.copy()
    for number in range(1, 6):
        signals = seen(number * PERIOD_S, [], {"decode": RoleLoad(4000, 100, 1, 0.1)})
        kept = copy.deepcopy(state)
        after, decision = mixed.step(state, signals)
        again, same = mixed.step(kept, signals)
        assert STEP.dump_json(Step(signals, decision)) == STEP.dump_json(Step(signals, same))
        assert again.asked == after.asked and again.minds == after.minds
        state = after
    assert (risk.beliefs == before).all()
    assert (state.memory.beliefs != before).any()  # type: ignore[attr-defined]


def test_time_goes_on():
    state, _ = loop().step(loop().start(), seen(20.0, []))
    with pytest.raises(ValueError, match="a later time is accepted"):
        loop().step(state, seen(20.0, []))


def settled(machines: list[Held], policy: Any, cap: int = 16, **more: Any) -> Decision:
    """A decision with a need of 1 (no load), the policy's word being all that asks for more."""
    scale = DecodeScale(floor=1, cap=cap, tokens_per_s=RATE)
    one = loop(policy, decode=scale, down_delay_s=0.0, **more)
    state: LoopState = one.start()
    state = replace(state, minds={"decode": _mind(1), "prefill": _mind(0)}, last_s=0.0)
    return one.step(state, seen(20.0, machines))[1]


def _mind(need: int) -> Any:
    return RoleMind(need, RATE)


def test_the_order_of_removal():
    """Five of six may go: pending, starting, spot, on demand, in this order."""
    machines = [
        held("d", OD),
        held("c", SPOT),
        held("b", SPOT, "starting"),
        held("a", SPOT, "pending", serving=False),
        held("e", OD),
    ]
    decision = settled(machines, Wants(od=1))
    gone = [act.machine for act in decision.actions if act.act in ("drain", "terminate")]
    assert sorted(gone) == ["a", "b", "c", "d"] or sorted(gone) == ["a", "b", "c", "e"]
    decision = settled(machines, Wants(od=1, s=1))
    gone = [act.machine for act in decision.actions if act.act in ("drain", "terminate")]
    assert "a" in gone and "b" in gone and "c" not in gone
    assert {act.machine for act in acts(decision, "terminate")} == {"a", "b"}


def test_what_answers_stays_until_its_replacement_does():
    decision = settled([held("c", SPOT)], Wants(od=1))
    assert [act.offer for act in acts(decision, "launch")] == ["od"]
    assert acts(decision, "drain") == []
    starting = held("n", OD, "starting")
    assert acts(settled([held("c", SPOT), starting], Wants(od=1)), "drain") == []
    replaced = settled([held("c", SPOT), held("n", OD)], Wants(od=1))
    assert [act.machine for act in acts(replaced, "drain")] == ["c"]


@pytest.mark.parametrize(("notice_s", "drains"), [(45.0, True), (300.0, False)])
def test_a_notice_buys_a_replacement_and_drains_in_time(notice_s: float, drains: bool):
    """With a long notice the machine serves on, and counts no more all the same."""
    doomed = replace(held("c", SPOT), doomed_s=20.0 + notice_s)
    decision = settled([doomed], Wants(s=1))
    assert len(acts(decision, "launch")) == 1
    assert bool(acts(decision, "drain")) == drains
    for drain in acts(decision, "drain"):
        assert drain.machine == "c" and 20.0 < drain.deadline_s < 20.0 + notice_s
    assert not acts(decision, "serve") or drains


def test_what_cannot_be_had_is_replaced_let_go_and_said():
    plant = Plant(lambda at_s: 50.0, made(), (SPOT, OD))
    plant.loop = Loop(plant.settings, Wants(s=1), Refusals(), "t")
    plant.__post_init__()
    plant.cloud.empty = {"s"}
    plant.run(4)
    assert {machine.offer for machine in plant.cloud.rented.values()} <= {"od"}
    plant.run(30)
    assert any("refused for" in act.reason and act.about == "s" for act in plant.acts("warn"))
    asked = [act for act in plant.acts("launch") if act.offer == "s"]
    assert asked and len(asked) < 25
    plant.cloud.empty = {"s", "od"}
    plant.cloud.rented.clear()
    plant.run(30)
    assert any(act.about == "decode" for act in plant.acts("warn"))


def test_a_machine_that_never_comes_is_let_go():
    plant = Plant(lambda at_s: 50.0, made())
    plant.cloud.slow = {"od"}
    plant.run(20)
    assert any("not there; let go" in act.reason for act in plant.acts("terminate"))
    plant.cloud.slow = set()
    plant.run(40)
    assert plant.service.answering("decode") >= 1


def test_to_nothing_and_back():
    """A role with floor 0 goes to nothing after a while without work, and comes back at once."""

    def load(at_s: float) -> float:
        return 0.0 if 400 < at_s < 1600 else 150.0

    plant = Plant(load, made(decode=DecodeScale(floor=0, cap=8, tokens_per_s=RATE)))
    plant.run(75)
    assert plant.needs()[-1] == 0 and not plant.cloud.rented
    plant.run(25)
    first = next(d for d in plant.decisions if d.now_s > 1600 and d.needs["decode"].need > 0)
    assert first.now_s <= 1600 + 2 * PERIOD_S
    assert plant.service.answering("decode") >= 2


def test_prefill_and_decode_are_scaled_apart():
    """Prefill's load rises tenfold; decode does not move."""
    both = made(
        decode=DecodeScale(floor=1, cap=16, tokens_per_s=RATE),
        prefill=RoleScale(floor=1, cap=16, tokens_per_s=RATE),
    )
    plant = Plant(lambda at_s: 150.0, both, prefill=lambda at_s: 60.0 if at_s < 1200 else 600.0)
    plant.run(58)
    before = plant.needs("decode")[-1], plant.needs("prefill")[-1]
    plant.run(30)
    assert plant.needs("decode")[-1] <= before[0] and before[1] <= 2
    assert plant.service.answering("prefill") >= 8
    roles = {machine: role for machine, role in plant.service.roles.items()}
    tokens = {name: plant.cloud.rented[name].token.split("/")[0] for name in roles}
    assert roles == tokens


def training_plant(**claim: Any) -> Plant:
    """Serving needs 3 more at t = 400 s; a job holds two machines."""
    plant = Plant(lambda at_s: 50.0 if at_s < 400 or at_s > 1200 else 300.0, made())
    for number in (1, 2):
        plant.cloud._made(OD, f"job/{number}")
    values = {"wanted": 2, "least": 0, "shrink_usd": 0.01, "value_usd_per_h": 5.0, **claim}
    plant.service.claims["j"] = TrainingClaim("j", ("m1", "m2"), **values)
    return plant


def test_training_yields_while_serving_is_short_and_gets_back():
    plant = training_plant().run(30)
    assert {act.machine for act in plant.acts("yield")} == {"m1", "m2"}
    assert {"m1", "m2"} <= set(plant.service.roles)
    plant.run(60)
    assert len(plant.acts("return")) >= 2
    assert len(plant.service.claims["j"].machines) == 2


@pytest.mark.parametrize(
    ("claim", "gives"), [({"shrink_usd": 50.0}, 0), ({"least": 1}, 1), ({"least": 2}, 0)]
)
def test_training_keeps_what_is_worth_more_than_waiting(claim: dict[str, Any], gives: int):
    plant = training_plant(**claim).run(30)
    assert len({act.machine for act in plant.acts("yield")}) == gives


def test_training_gets_nothing_back_that_costs_more_than_it_is_worth():
    plant = training_plant(value_usd_per_h=0.5).run(90)
    assert plant.acts("yield") and not plant.acts("return")
    assert len(plant.cloud.rented) == plant.needs()[-1]


def test_an_unknown_load_leaves_the_need_alone():
    plant = Plant(lambda at_s: 300.0, made()).run(60)
    need = plant.needs()[-1]
    plant.service.faults["signals"] = ["fails"] * 40
    plant.run(40)
    assert set(plant.needs()[-40:]) == {need}


def test_a_new_loop_over_old_machines_takes_them_over():
    """The loop crashes and begins again: nothing is bought twice, nothing is forgotten."""
    kept = Kept()
    plant = Plant(lambda at_s: 300.0, made()).run(60)
    machines = dict(plant.cloud.rented)
    old = plant.driver
    plant.loop = replace(plant.driver.loop, name="second")
    plant.log = kept
    cloud, service = plant.cloud, plant.service
    plant.driver = type(old)(cloud, service, plant.loop, plant.clock, kept)
    plant.run(20)
    assert plant.cloud.rented == machines
    assert not [a for _, decision in kept.steps for a in decision.actions if a.act == "launch"]


def rates_after(load: RoleLoad, steps: int = 20) -> float:
    """What a replica is believed to serve after so many equal steps of two of them, from 40."""
    scale = DecodeScale(floor=2, cap=8, tokens_per_s=40.0)
    one = loop(decode=scale)
    state, machines = one.start(), [held("a"), held("b")]
    for number in range(1, steps + 1):
        state, _ = one.step(state, seen(number * PERIOD_S, machines, {"decode": load}))
    return state.minds["decode"].rate


def test_the_rate_of_a_replica_is_measured_while_work_waits_and_only_then():
    """Two serve 20 s x 2 x 25 tokens in each step while 2000 wait; one that waits says nothing."""
    assert rates_after(RoleLoad(1000, 2000, 8, 0.5)) == pytest.approx(25.0, rel=0.01)
    assert rates_after(RoleLoad(100, 50, 2, 0.1)) == 40.0
    assert rates_after(RoleLoad(1000, 2000, 1, 0.1)) == 40.0


def test_the_forecast_follows_a_ramp_and_is_bounded():
    """A ramp of 1 token/s each second, seen for 20 minutes: 200 s ahead, within 10 %."""
    forecast = Forecast()
    for step in range(1, 61):
        tokens = round(20.0 * (100 + 20 * step))
        forecast = forecast.observe(step * 20.0, tokens, (step - 1) * 20.0, 200.0)
    truth = 100 + 20 * 60 + 200
    assert abs(forecast.upper(200.0, 0.9) / truth - 1) < 0.1
    assert forecast.expected(200.0) > 100 + 20 * 60
    spike = forecast.observe(61 * 20.0, 20_000_000, 1200.0, 200.0)
    assert spike.upper(200.0, 0.9) <= SURGE * 1_000_000


def test_the_quantile_covers_what_it_says():
    """Of a noisy load, about nine in ten levels stay below the 0.9 quantile made ahead of them."""
    draws = random.Random(3)
    forecast, ahead, below = Forecast(), [], []
    for step in range(1, 600):
        tokens = round(2000 * draws.lognormvariate(0, 0.3))
        forecast = forecast.observe(step * 20.0, tokens, (step - 1) * 20.0, 100.0)
        ahead.append(forecast.upper(100.0, 0.9))
        if step > 100:
            assert forecast.level is not None
            below.append(forecast.level <= ahead[step - 6])
    assert 0.8 < sum(below) / len(below) < 0.99
