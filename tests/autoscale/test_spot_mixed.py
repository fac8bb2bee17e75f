"""Our policy: its choice against enumeration, and what each of its parts is there for."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.simulate.market import Market, made_market
from autoscale.simulate.replay import Cloud, replay
from autoscale.simulate.study import Study, duel
from autoscale.spot.allocation import Question, Table, choose
from autoscale.spot.belief import SpotRisk
from autoscale.spot.calibrate import Outcome, calibrate
from autoscale.spot.events import SpotEvent
from autoscale.spot.fleet import Launch, Terminate
from autoscale.spot.mixed import MixedPolicy

ZONES = ("e1a", "e1b", "e2a", "w1a")


def table(values: np.ndarray) -> Table:
    return tuple(tuple(tuple(row) for row in rows) for rows in values.tolist())


def question(seed: int, together: float) -> Question:
    draws = np.random.default_rng(seed)
    kept = np.zeros((3, 3, 3))
    kept[:, 0, 0] = 1
    for pool in range(3):
        for asked in (1, 2):
            loss = draws.dirichlet([1, 1, 20])[: asked + 1]
            kept[pool, asked, : asked + 1] = loss / loss.sum()
    return Question(
        need=3,
        levels=(0, 1, 2),
        kept=table(kept),
        usd_per_h=tuple(draws.uniform(0.2, 0.5, 3)),
        regions=("x", "x", "y"),
        extra_usd_per_h=((0.0,) * 3,) * 3,
        together=together,
        on_demand_usd_per_h=1.0,
        short_usd_per_h=float(draws.uniform(1, 60)),
    )


def short_by_enumeration(q: Question, asked: tuple[int, ...], on_demand: int) -> float:
    """Every outcome of every pool, for itself and under the shock of a region, summed one by
    one."""
    kept = np.array(q.kept)

    def chance(tables: list[np.ndarray]) -> float:
        total = 0.0
        for left in itertools.product(range(3), repeat=3):
            weight = math.prod(float(tables[pool][asked[pool], left[pool]]) for pool in range(3))
            total += weight * (sum(left) + on_demand < q.need)
        return float(total)

    alone = chance([kept[pool] for pool in range(3)])
    if not (asked[0] and asked[1]):
        return alone
    lose = [1 - kept[pool, asked[pool], asked[pool]] for pool in (0, 1)]
    shock = q.together * float(sum(lose)) / 2
    struck = [kept[pool].copy() for pool in range(3)]
    for pool in (0, 1):
        struck[pool][asked[pool], asked[pool]] = 0
        struck[pool][asked[pool]] /= lose[pool]
    return (1 - shock) * alone + shock * chance(struck)


@pytest.mark.parametrize("together", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_cheapest_of_all(seed: int, together: float):
    q = question(seed, together)

    def total(asked: tuple[int, ...], on_demand: int) -> float:
        price = sum(count * usd for count, usd in zip(asked, q.usd_per_h, strict=True))
        short = short_by_enumeration(q, asked, on_demand)
        return float(price + on_demand + q.short_usd_per_h * short)

    options = itertools.product(itertools.product(range(3), repeat=3), range(q.need + 1))
    best = min(total(*option) for option in options)
    found = choose(q)
    assert total(found.machines, found.on_demand) == pytest.approx(best)
    assert found.short == pytest.approx(short_by_enumeration(q, found.machines, found.on_demand))


def study(seed: int = 5, steps: int = 1000) -> Study:
    made = made_market(steps, ZONES, depth=8, seed=seed)
    return Study(made, 4, int(0.4 * steps))


def test_dearer_shortage_buys_availability():
    reports = [study(6).mixed(MixedPolicy(price)) for price in (0.0, 3.0, 200.0)]
    assert reports[0].served == 0  # nothing is bought that nothing is worth
    assert reports[0].cost == 0
    assert reports[1].availability < reports[2].availability
    assert reports[1].cost < reports[2].cost


def test_ours_beats_spothedge_on_a_market_of_our_own():
    """The smaller sibling of the proof on recorded traces: at SpotHedge's availability for 0.85 of
    its cost, and a fifth of its refusals. (At its cost ours is not always strictly more available
    here: a market this short misses two steps or one.)"""
    made = study()
    ours = [made.mixed(MixedPolicy(price)) for price in (3.0, 20.0, 80.0)]
    for over in (1, 2):
        rival = made.hedge(over)
        found = duel(rival, ours)
        assert found.cheaper is not None and found.better is not None
        assert found.cheaper.cost < 0.85 * rival.cost
        assert found.better.availability >= rival.availability
        assert found.cheaper.refused < rival.refused / 5


def test_a_straw_rival_would_be_noticed():
    """The duel itself: a point below our curve is not beaten."""
    made = study()
    rival = made.hedge(1)
    assert not duel(replace_cost(rival, 0.01), [made.mixed(MixedPolicy(30.0))]).wins


def replace_cost(report, share: float):
    return replace(report, spot_usd=share * report.all_on_demand_usd, on_demand_usd=0.0)


def test_backing_off_is_what_keeps_refusals_few():
    made = study(7)
    eager = made.mixed(MixedPolicy(30.0, refusal_price=0.0))
    careful = made.mixed(MixedPolicy(30.0))
    assert careful.refused < 0.6 * eager.refused
    assert careful.availability > eager.availability - 0.01


def test_the_decision_is_pure():
    made = study()
    risk = SpotRisk(made.chain())
    cloud = Cloud(made.market, risk)
    before = risk.beliefs.copy()
    policy = MixedPolicy(30.0)
    answers = [policy.decide(0.0, 4, cloud.fleet(), made.market.offers, risk) for _ in range(2)]
    assert answers[0] == answers[1]
    assert (risk.beliefs == before).all()


def test_ready_machines_go_back_only_when_enough_others_answer():
    """All on demand is held and spot has become safe: nothing ready goes before its replacement
    is."""
    made = study()
    risk = SpotRisk(made.chain())
    cloud = Cloud(made.market, risk)
    on_demand = made.market.offers[-1]
    cloud.launch(Launch(on_demand, 4, ""), 0, 0.0, 4)
    for step in range(1, 200):
        now_s = 300.0 * step
        for offer in made.market.spot:
            risk.observe(SpotEvent(now_s, offer.name, "held", cloud.count[offer.name]))
        actions = MixedPolicy(3.0).decide(now_s, 4, cloud.fleet(), made.market.offers, risk)
        ready = {n.id for n in cloud.fleet().nodes if n.ready_s <= now_s}
        gone = {action.node for action in actions if isinstance(action, Terminate)}
        assert len(ready - gone) >= 4
        for action in actions:
            if isinstance(action, Launch):
                cloud.launch(action, 0, now_s, 99)
        for node in gone:
            cloud.remove(node)
    assert not cloud.fleet().market("on_demand")


def test_the_cheaper_kind_of_two_alike_is_taken():
    """Two kinds in one zone as two pools: equally steady, one at half the price."""
    base = made_market(800, ("e1a", "w1a"), depth=8, seed=1)
    capacity = np.stack([base.capacity[:, 0], base.capacity[:, 0]], axis=1)
    kinds = tuple(
        Offer(f"e1a {kind}", kind, 1, "e1", "e1a", "spot", usd, None, 180.0)
        for kind, usd in (("dear", 1.0), ("cheap", 0.5))
    )
    made = Study(Market(capacity, 300.0, (*kinds, base.offers[-1])), 4, 300)
    log = made.mixed(MixedPolicy(10.0), log=True).log
    bought = {line.offer: 0 for line in log}
    for line in log:
        bought[line.offer] += line.machines if line.act == "launch" else 0
    assert bought["e1a cheap"] > 3 * bought.get("e1a dear", 0)


def test_a_target_is_met_on_the_history_with_the_least_price():
    made = study()
    policy = made.calibrated(0.97)
    history = made.market.part(0, made.fitted)
    reached = replay(history, policy, SpotRisk(made.chain()), 4, scored_from=2)
    assert reached.availability >= 0.97
    assert made.calibrated(0.9).short_price <= policy.short_price


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="the most was 0.5"):
        calibrate(0.9, lambda policy: Outcome(0.5, 1.0))
    with pytest.raises(ValueError, match="at most at 1"):
        calibrate(1.5, lambda policy: Outcome(1.0, 1.0))
