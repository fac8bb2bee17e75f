"""The plan of a drain against every combination, an integer program, and its own deadline."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from serve.migrate import plan as module
from serve.migrate.keep import open_policy
from serve.migrate.plan import Movable, Terms, plan, ways
from tests.migrate.instances import brute_force_s, problems, random_drain

TERMS = Terms(1e6, 0.0, 100.0, 1e8)


def movable(name, tokens, size_bytes, remaining=10_000, rate=1.0):
    return Movable(name, float(tokens), remaining, rate, {"pages": size_bytes})


def test_within_a_twentieth_of_every_combination():
    rng = random.Random(6)
    worst = 0.0
    for _ in range(120):
        drain = random_drain(rng)
        made, best_s = plan(*drain), brute_force_s(drain)
        assert problems(drain, made) == []
        assert made.cost_s <= best_s * 1.05 + 1e-9
        worst = max(worst, made.cost_s / best_s - 1 if best_s > 1e-9 else 0.0)
    print(f"worst of 120: {worst:.2%} over the optimum")


@given(st.integers(0, 2**32), st.booleans())
def test_it_keeps_the_deadline_and_a_later_one_never_costs_more(seed, many):
    rng = random.Random(seed)
    drain = random_drain(rng, most=14 if many else 8)
    costs = []
    for share in (0.0, 0.1, 0.35, 0.7, 1.0, 1.7):
        later = drain._replace(deadline_s=drain.deadline_s * share)
        made = plan(*later)
        assert problems(later, made) == []
        costs.append(made.cost_s)
    assert all(late <= soon + 1e-9 for soon, late in zip(costs, costs[1:], strict=False)), costs


@pytest.mark.parametrize("seed", range(4))
def test_many_sequences_against_an_integer_program(seed):
    rng = random.Random(seed)
    drain = random_drain(rng, most=8)
    while len(drain.sequences) < 40:
        more = [replace(s, request_id="s0") for s in random_drain(rng).sequences]
        drain = drain._replace(sequences=[*drain.sequences, *more])
    named = [replace(s, request_id=f"s{n}") for n, s in enumerate(drain.sequences)]
    whole_s = sum(drain.terms.move_s + max(s.carried_bytes.values(), default=0)
                  / drain.terms.link_bytes_per_s for s in named)  # fmt: skip
    drain = drain._replace(sequences=named, deadline_s=whole_s * 0.3)
    made = plan(*drain)
    assert problems(drain, made) == []
    assert made.cost_s <= least_cost_s(drain) * 1.02 + 1e-9


def least_cost_s(drain):
    """By HiGHS: one binary variable for each way of each sequence."""
    options = [ways(s, drain.terms, drain.deadline_s) for s in drain.sequences]
    cost = np.array([step.cost_s for each in options for step in each])
    link = np.array([step.link_s for each in options for step in each])
    owner = np.repeat(np.arange(len(options)), [len(each) for each in options])
    one_each = (owner[None, :] == np.arange(len(options))[:, None]).astype(float)
    found = milp(
        cost,
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(link[None] / drain.deadline_s, -np.inf, 1),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert found.success
    return float(found.fun)


def test_what_saves_most_for_a_second_of_the_link_goes_first():
    light = movable("light", 100, 10_000)
    heavy = movable("heavy", 1_000, 1_000_000)
    short = movable("short", 5, 1_000, remaining=1)
    made = plan([heavy, short, light], TERMS, 10.0)
    assert [(s.request_id, s.choice) for s in made.steps] == [
        ("light", "pages"),
        ("heavy", "pages"),
        ("short", "finish"),
    ]
    assert [s.request_id for s in made.moves] == ["light", "heavy"]


def test_a_shorter_deadline_turns_moves_into_replays_and_quantised_pages():
    one = movable("a", 1_000, 1_000_000)
    packed = replace(one, carried_bytes={"pages": 1_000_000, "int8": 500_000, "int4": 250_000})
    chosen = {t: plan([one], TERMS, t).steps[0].choice for t in (2.0, 0.9, 0.4, 0.1)}
    assert chosen == {2.0: "pages", 0.9: "replay", 0.4: "replay", 0.1: "replay"}
    chosen = {t: plan([packed], TERMS, t).steps[0].choice for t in (2.0, 0.9, 0.4, 0.1)}
    assert chosen == {2.0: "pages", 0.9: "int8", 0.4: "int4", 0.1: "replay"}


def test_pages_that_a_policy_keeps_are_a_way_of_their_own():
    one = movable("a", 1_000, 1_000_000)
    one = replace(one, carried_bytes={"pages": 1_000_000, "kept": 300_000})
    assert plan([one], TERMS, 0.5).steps[0].choice == "kept"


def test_a_deadline_in_the_past_leaves_replay():
    made = plan([movable("a", 10, 10), movable("b", 10, 10)], TERMS, -1.0)
    assert {s.choice for s in made.steps} == {"replay"} and made.link_s == 0


def test_nothing_to_move_is_an_empty_plan():
    assert plan([], TERMS, 1.0).steps == ()


def test_a_sequence_named_twice_is_refused():
    with pytest.raises(ValueError, match="named twice"):
        plan([movable("a", 1, 1), movable("a", 1, 1)], TERMS, 1.0)


def test_policies_that_do_not_exist_are_refused_by_name():
    assert open_policy("all").kept_tokens(77) == 77
    with pytest.raises(ValueError, match="'window' is called|called 'window'.*all"):
        open_policy("window")


@pytest.mark.parametrize("broken", ["greedy", "beyond"])
def test_a_worse_planner_is_noticed(broken, monkeypatch):
    """Greedy by density and one that overspends the link: the checks above see both."""

    def greedy(groups, deadline_s, _):
        steps, left_s = [], deadline_s
        for options in sorted(groups, key=lambda o: o[-1].link_s / o[0].cost_s):
            fits = [s for s in options if s.link_s <= left_s]
            steps.append(fits[-1])
            left_s -= fits[-1].link_s
        return steps

    def beyond(groups, deadline_s, _):
        return [options[-1] for options in groups]

    monkeypatch.setattr(module, "_exact", {"greedy": greedy, "beyond": beyond}[broken])
    rng, seen = random.Random(6), 0
    for _ in range(120):
        drain = random_drain(rng)
        made = plan(*drain)
        seen += bool(problems(drain, made)) or made.cost_s > brute_force_s(drain) * 1.05 + 1e-9
    assert seen > 0
