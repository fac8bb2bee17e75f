"""Short of pages: preemption, reservations, holds and aborts leak nothing and change no token."""

import random

import pytest

from serve.engine.cost import StepCost
from serve.engine.sequence import Sampling
from serve.kv.prefix import CacheKey
from tests.engine.fakes import Collected, engine, free, run, runner, sequence, solo_tokens
from tests.engine.test_step import adopt


def random_sequence(rng, name, capacity):
    """A request that fits alone; many share prefixes, some share them under another key."""
    max_tokens = rng.randint(1, 10)
    length = rng.randint(1, min(30, capacity - max_tokens))
    prompt = [rng.choice([1, 2])] * rng.randint(0, length)
    prompt += [rng.randrange(30) for _ in range(length - len(prompt))]
    return sequence(
        name,
        prompt,
        max_tokens,
        sampling=Sampling(rng.choice([0.0, 1.0]), rng.choice([0, 5]), seed=rng.getrandbits(63)),
        key=CacheKey(rng.choice("xy"), "", ""),
        min_tokens=rng.randint(0, max_tokens),
    )


@pytest.mark.parametrize("seed", range(25))
def test_random_workloads_on_tiny_pools(seed):
    """Arrivals at random, pools that hold one to three requests: same tokens, always progress."""
    rng = random.Random(seed)
    page_tokens = rng.choice([1, 3, 4, 8])
    made = engine(
        pages=-(-rng.randint(40, 100) // page_tokens),
        page_tokens=page_tokens,
        budget_tokens=rng.choice([1, 5, 16, 64]),
        max_running=rng.choice([1, 2, 8]),
        cost=StepCost(rng.choice([10.0, 1e9])),
        prefix_cache=rng.random() < 0.7,
    )
    sequences = [random_sequence(rng, f"r{n}", made.capacity_tokens) for n in range(20)]
    waiting, collected = list(sequences), Collected()
    for _ in range(20_000):
        while waiting and rng.random() < 0.3:
            made.add(waiting.pop())
        collected.take(made.step())
        made.check()
        assert made.progressed or not made.has_work
        if not made.has_work and not waiting:
            break
    assert collected.tokens == {s.request_id: solo_tokens(s.request) for s in sequences}
    assert free(made) and not made.sequences


@pytest.mark.parametrize("seed", range(25))
def test_random_life_with_reservations_holds_and_aborts(seed):
    """Every way in and out at random. Whoever is not aborted gets its tokens; no page is lost."""
    rng = random.Random(1000 + seed)
    made, collected = engine(pages=rng.randint(14, 30), max_running=rng.choice([2, 6])), Collected()
    alive, reserved, freed, number = {}, [], set[str](), 0
    for _ in range(300):
        kind = rng.choice(["add", "reserve", "hold", "adopt", "give up", "abort", "free", "step"])
        if kind in ("add", "reserve", "hold") and len(made.sequences) < 8:
            number += 1
            one = random_sequence(rng, f"r{number}", made.capacity_tokens)
            if kind != "reserve":
                made.add(one, hold=kind == "hold")
            elif not made.reserve(one):
                continue
            else:
                reserved.append(one)
            alive[one.request_id] = one
        elif kind == "adopt" and reserved:
            adopt(made, reserved.pop(rng.randrange(len(reserved))), collected)
        elif kind == "give up" and reserved:
            made.give_up_reservation(reserved.pop(rng.randrange(len(reserved))).request_id)
        elif kind == "abort" and alive:
            one = alive.pop(rng.choice(list(alive)))
            ended = freed if one.hold else finished(collected)
            assert made.abort(one.request_id) is (one.request_id not in ended)
            assert made.abort(one.request_id) is False
            reserved = [r for r in reserved if r is not one]
        elif kind == "free" and made.held:
            name = rng.choice(list(made.held))
            freed.add(name)
            assert made.free_held(name)
        collected.take(made.step())
        made.check()
    for one in reserved:
        made.give_up_reservation(one.request_id)
    for request_id in list(made.held):
        made.free_held(request_id)
    while made.has_work:
        collected.take(made.step())
        made.check()
        for request_id in list(made.held):
            made.free_held(request_id)
    for one in alive.values():
        wanted = solo_tokens(one.request)
        assert collected.tokens[one.request_id] == (wanted[:1] if one.hold else wanted)
    assert free(made) and not made.sequences and not made._stops


def finished(collected):
    """Requests that came to their end."""
    return {name for name, delta in collected.last.items() if delta.finish is not None}


def test_preemption_frees_the_last_to_start_and_changes_no_token():
    made = engine(pages=8, page_tokens=4)
    old = sequence("old", [1] * 8, 16, ignore_eos=True)
    young = sequence("young", [2] * 8, 16, ignore_eos=True)
    made.add(old)
    made.add(young)
    collected = Collected()
    while made.scheduler.preemptions == 0:
        collected.take(made.step())
        made.check()
    assert list(made.scheduler.waiting) == [young] and made.scheduler.running == [old]
    run(made, collected)
    assert collected.tokens == {s.request_id: solo_tokens(s.request) for s in (old, young)}
    assert free(made)


@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "decoding", "reserved", "held"])
def test_abort_in_every_state_frees_the_pages(state):
    made = engine(pages=32, page_tokens=4, budget_tokens=8)
    one = sequence("one", range(20), 10, ignore_eos=True)
    if state == "reserved":
        assert made.reserve(one)
    else:
        made.add(one, hold=state == "held")
    for _ in range({"mid-prefill": 1, "decoding": 5, "held": 3}.get(state, 0)):
        made.step()
    where = {
        "waiting": one in made.scheduler.waiting,
        "mid-prefill": one in made.scheduler.running and 0 < one.computed_tokens < 20,
        "decoding": one in made.scheduler.running and len(one.output) > 1,
        "reserved": made.reserved == {"one": one},
        "held": made.held == {"one": one},
    }
    assert where == {name: name == state for name in where}
    assert made.abort("one") and not made.abort("one")
    made.check()
    assert free(made) and not made.has_work
    made.add(sequence("one", [1], 2))  # the name is free again
    run(made)


def test_abort_of_a_stranger_is_nothing():
    assert engine().abort("nobody") is False


def test_a_reservation_takes_what_is_cached_and_room_for_the_rest():
    made = engine(pages=16, page_tokens=4)
    made.add(sequence("warm", range(12), 1, ignore_eos=True))
    run(made)
    one = sequence("one", [*range(12), 1, 2, 3], 4, ignore_eos=True)
    assert made.reserve(one)
    assert one.computed_tokens == one.cached_tokens == 12
    assert one.table is not None and one.table.capacity_tokens == 16
    assert not made.has_work and made.step() == []
    collected = Collected()
    adopt(made, one, collected)
    run(made, collected)
    assert collected.tokens["one"] == solo_tokens(one.request)
    assert runner(made).steps[-1] == [("one", 17, 18)]  # the prompt was never computed here


def test_a_reservation_never_preempts_and_takes_nothing_when_it_fails():
    made = engine(pages=8, page_tokens=4)
    running = sequence("running", [1] * 20, 8, ignore_eos=True)
    made.add(running)
    made.step()
    late = sequence("late", [2] * 16, 8)
    before = made.scheduler.pool.free_pages
    assert not made.reserve(late)
    assert made.scheduler.pool.free_pages == before and late.table is None
    assert set(made.sequences) == {"running"}
    while made.has_work:
        made.step()
    assert made.scheduler.preemptions == 0
    assert made.reserve(late)


def test_a_reservation_takes_no_page_that_an_admitted_prompt_will_need():
    made = engine(pages=8, page_tokens=4, budget_tokens=4)
    made.add(sequence("long", range(24), 4, ignore_eos=True))
    made.step()
    assert made.scheduler.pool.free_pages == 7
    assert not made.reserve(sequence("late", [2] * 12, 4))
    run(made)
    assert made.scheduler.preemptions == 0


def test_reservations_do_not_overtake_for_ever_what_waits_for_pages():
    made = engine(pages=8, page_tokens=4)
    holder = sequence("holder", [3] * 8, 4, ignore_eos=True)
    assert made.reserve(holder)
    big = sequence("big", [1] * 26, 4, ignore_eos=True)
    made.add(big)
    assert made.step() == [] and not made.progressed
    assert not made.reserve(sequence("small", [2] * 4, 4))
    made.abort("holder")
    assert [o.request_id for o in made.step()] == ["big"]
    made.abort("big")
    assert made.reserve(sequence("small", [2] * 4, 4))


def test_an_aborted_waiter_no_longer_holds_back_reservations():
    made = engine(pages=8, page_tokens=4)
    assert made.reserve(sequence("holder", [3] * 8, 4))
    made.add(sequence("big", [1] * 26, 4))
    made.step()
    assert made.abort("big")
    assert made.reserve(sequence("small", [2] * 4, 4))


def test_an_engine_stalled_by_a_reservation_recovers():
    made = engine(pages=8, page_tokens=4)
    assert made.reserve(sequence("holder", [3] * 16, 4, ignore_eos=True))
    big = sequence("big", [1] * 20, 4, ignore_eos=True)
    made.add(big)
    for _ in range(3):
        assert made.step() == [] and made.has_work and not made.progressed
    assert runner(made).steps == []
    made.give_up_reservation("holder")
    collected = run(made)
    assert collected.tokens["big"] == solo_tokens(big.request)
    assert len(collected.tokens["holder"]) == 4


def test_a_hold_makes_one_token_and_keeps_its_pages_until_they_are_freed():
    made = engine(pages=16, page_tokens=4)
    one = sequence("one", range(10), 9, ignore_eos=True)
    made.add(one, hold=True)
    [output] = made.step()
    assert output.delta.token_ids == tuple(solo_tokens(one.request)[:1])
    assert output.delta.finish is None and not made.has_work
    assert one.table is not None and len(one.table.pages) == 3 and one.computed_tokens == 10
    made.check()
    assert not free(made)
    with pytest.raises(ValueError, match="already here"):
        made.add(sequence("one", [1], 2))
    assert made.free_held("one") and not made.free_held("one")
    assert free(made)


def test_a_hold_that_ends_at_once_is_held_too():
    made = engine()
    made.add(sequence("one", range(10), 1), hold=True)
    [output] = made.step()
    assert output.delta.finish is not None and set(made.held) == {"one"}
