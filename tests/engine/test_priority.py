"""Priorities: the better one goes first, takes seats and pages, and nobody starves."""

import pytest

from serve.engine.scheduler import AGEING_STEPS
from serve.engine.sequence import Limits, Request, Sequence
from tests.engine.fakes import GREEDY, KEY, Collected, engine, free, run, solo_tokens


def ranked(
    request_id: str, priority: int, prompt_tokens: int = 4, max_tokens: int = 8, first: int = 1
) -> Sequence:
    prompt = tuple((first + 3 * n) % 37 for n in range(prompt_tokens))
    limits = Limits(max_tokens, ignore_eos=True)
    return Sequence(Request(request_id, prompt, GREEDY, limits, KEY, priority=priority))


def order_of_end(made, collected: Collected) -> list[str]:
    ended: list[str] = []
    while made.has_work:
        outputs = made.step()
        made.check()
        collected.take(outputs)
        ended += [o.request_id for o in outputs if o.delta.finish]
    return ended


def test_the_better_priority_is_admitted_first_and_equals_by_arrival():
    made = engine(max_running=1)
    for name, priority in (("late", 5), ("first", 0), ("early", -5), ("second", 0)):
        made.add(ranked(name, priority))
    assert order_of_end(made, Collected()) == ["early", "first", "second", "late"]


def test_it_takes_the_seat_of_a_worse_one_which_loses_no_token():
    made, collected = engine(max_running=2), Collected()
    slow = [
        ranked("slow a", 1, first=2, max_tokens=20),
        ranked("slow b", 1, first=3, max_tokens=20),
    ]
    for one in slow:
        made.add(one)
    for _ in range(3):
        collected.take(made.step())
    urgent = ranked("urgent", 0, first=9)
    made.add(urgent)
    collected.take(made.step())
    assert urgent.output and made.scheduler.preemptions == 1
    assert made.scheduler.waiting == [slow[1]], "the last to arrive of the worse ones gives way"
    run(made, collected)
    for one in (*slow, urgent):
        assert collected.tokens[one.request_id] == solo_tokens(one.request)
    assert free(made)


def test_it_takes_the_pages_of_a_worse_one():
    made, collected = engine(pages=8, page_tokens=4, prefix_cache=False), Collected()
    big = ranked("big", 1, prompt_tokens=20, max_tokens=12)
    made.add(big)
    collected.take(made.step())
    urgent = ranked("urgent", 0, prompt_tokens=16, max_tokens=4, first=2)
    made.add(urgent)
    collected.take(made.step())
    assert made.scheduler.running == [urgent] and made.scheduler.waiting == [big]
    run(made, collected)
    for one in (big, urgent):
        assert collected.tokens[one.request_id] == solo_tokens(one.request)


def test_its_prompt_goes_before_the_rest_of_a_long_one():
    made = engine(budget_tokens=8)
    made.add(ranked("long", 1, prompt_tokens=60))
    made.step()
    urgent = ranked("urgent", 0, prompt_tokens=8, first=5)
    made.add(urgent)
    made.step()
    assert len(urgent.output) == 1


@pytest.mark.parametrize("priority", [0, 1])
def test_equals_and_worse_ones_take_nothing(priority):
    made = engine(max_running=1)
    here = ranked("here", 0, max_tokens=10)
    made.add(here)
    made.step()
    made.add(ranked("next", priority, first=7))
    made.step()
    assert made.scheduler.running == [here] and made.scheduler.preemptions == 0


def test_a_low_priority_waits_a_bounded_time_behind_an_endless_stream_of_better_ones():
    made = engine(max_running=1)
    low = ranked("low", 2, max_tokens=3)
    made.add(low)
    steps, fresh = 0, 0
    while not low.output:
        if not any(s.request.priority == 0 for s in made.sequences.values()):
            made.add(ranked(f"better {fresh}", 0, max_tokens=5, first=fresh % 30))
            fresh += 1
        made.step()
        made.check()
        steps += 1
        assert steps <= 3 * AGEING_STEPS, "starved"
    assert steps > AGEING_STEPS, "the better ones had no advantage"
