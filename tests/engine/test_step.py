"""Who is in a step: arrivals, departures, decodes first, the budget, chunks, seats."""

import math

import pytest

from serve.engine.cost import StepCost
from serve.engine.sequence import Request
from tests.engine.fakes import GREEDY, Collected, engine, free, run, runner, sequence, solo_tokens


def step_cost(cost: StepCost, step: list[tuple[str, int, int]]) -> float:
    return sum(cost.of(start, stop) for _, start, stop in step)


def test_a_request_leaves_in_the_step_it_ends():
    made = engine()
    made.add(sequence("short", [1, 2, 3], 2, ignore_eos=True))
    made.add(sequence("long", [4, 5], 6, ignore_eos=True))
    assert [o.request_id for o in made.step()] == ["short", "long"]
    ended = made.step()
    assert [(o.request_id, o.delta.finish) for o in ended] == [("short", "length"), ("long", None)]
    assert set(made.sequences) == {"long"}
    made.check()
    while made.has_work:
        made.step()
    assert free(made)
    # 3 + 2 tokens of prompt, then only decodes: nobody was computed once more than needed.
    assert [len(step) for step in runner(made).steps] == [2, 2, 1, 1, 1, 1]


def test_a_late_arrival_starts_in_the_next_step():
    made = engine()
    made.add(sequence("first", [1] * 5, 20, ignore_eos=True))
    for _ in range(3):
        made.step()
    made.add(sequence("late", [2] * 6, 20, ignore_eos=True))
    outputs = made.step()
    assert {o.request_id for o in outputs} == {"first", "late"}


def test_decodes_come_first_and_prompts_share_what_is_left():
    cost = StepCost(half_context_tokens=20)
    made = engine(pages=200, budget_tokens=24, cost=cost)
    for name in "abc":
        made.add(sequence(name, [ord(name) % 30] * 4, 40, ignore_eos=True))
    while any(len(s.output) == 0 for s in made.sequences.values()):
        made.step()
    made.add(sequence("prompt", list(range(30)) * 4, 2, ignore_eos=True))
    for _ in range(8):
        made.step()
        step = runner(made).steps[-1]
        assert [name for name, _, _ in step[:3]] == ["a", "b", "c"]
        assert step_cost(cost, step) <= 24
    assert step[-1][0] == "prompt"


@pytest.mark.parametrize("half", [math.inf, 50.0])
def test_a_prompt_is_cut_into_the_largest_chunks_that_the_budget_buys(half):
    cost = StepCost(half)
    made = engine(budget_tokens=17, cost=cost)
    one = sequence("one", list(range(30)) * 4, 3, ignore_eos=True)
    made.add(one)
    collected = run(made)
    chunks = [step[0] for step in runner(made).steps]
    prompt = [(start, stop) for _, start, stop in chunks if start < 120]
    assert [start for start, _ in prompt] == [0, *(stop for _, stop in prompt[:-1])]
    assert prompt[-1][1] == 120
    for start, stop in prompt[:-1]:
        assert cost.of(start, stop) <= 17 < cost.of(start, stop + 1)
    assert collected.tokens["one"] == solo_tokens(one.request)


def test_one_token_dearer_than_the_budget_is_computed_all_the_same():
    """Else a long context with a small budget would wait for ever."""
    made = engine(budget_tokens=2, max_running=2, cost=StepCost(half_context_tokens=1.0))
    one = sequence("one", range(30), 4, ignore_eos=True)
    made.add(one)
    assert run(made).tokens["one"] == solo_tokens(one.request)


@pytest.mark.parametrize("max_running", [1, 3])
def test_a_step_has_at_most_max_running_sequences(max_running):
    made = engine(max_running=max_running, pages=200)
    sequences = [sequence(f"s{n}", [n] * (1 + n % 7), 3 + n % 4) for n in range(10)]
    for one in sequences:
        made.add(one)
    collected = run(made)
    assert max(len(step) for step in runner(made).steps) == max_running
    assert collected.tokens == {s.request_id: solo_tokens(s.request) for s in sequences}


def test_adopted_sequences_beyond_max_running_wait_for_a_seat():
    made, collected = engine(max_running=2), Collected()
    sequences = [sequence(f"s{n}", [n] * 5, 4, ignore_eos=True) for n in range(5)]
    for one in sequences:
        assert made.reserve(one)
        adopt(made, one, collected)
    run(made, collected)
    assert max(len(step) for step in runner(made).steps) == 2
    assert collected.tokens == {s.request_id: solo_tokens(s.request) for s in sequences}


def adopt(made, one, collected):
    """What a hand-off does: fill the reserved pages, then say which token came next."""
    assert one.table is not None
    runner(made).memory[one.table.slots(0, len(one))] = one.tokens(0, len(one))
    collected.take([made.adopt(one.request_id, solo_tokens(one.request)[len(one.output)])])
    made.check()


def test_shared_prefixes_are_computed_once():
    made = engine(budget_tokens=64)
    shared = list(range(20))
    made.add(sequence("a", [*shared, 30], 2, ignore_eos=True))
    run(made)
    before = made.prompt_tokens
    later = sequence("b", [*shared, 31], 2, ignore_eos=True)
    made.add(later)
    collected = run(made)
    assert made.prompt_tokens - before == 1
    assert collected.last["b"].cached_tokens == 20
    assert collected.tokens["b"] == solo_tokens(later.request)


def test_the_prefix_cache_can_be_off():
    made = engine(prefix_cache=False)
    for name in "ab":
        made.add(sequence(name, range(20), 2, ignore_eos=True))
        assert run(made).last[name].cached_tokens == 0
    assert made.scheduler.pool.free_pages == made.scheduler.pool.pages


def test_what_can_never_run_is_refused():
    made = engine(pages=4, page_tokens=4)
    with pytest.raises(ValueError, match="17 tokens; this replica holds at most 16"):
        made.add(sequence("long", [1] * 9, 8))
    with pytest.raises(ValueError, match="prompt is empty"):
        made.add(sequence("empty", [], 8))
    with pytest.raises(ValueError, match="max_tokens"):
        made.add(sequence("none", [1], 0))
    with pytest.raises(ValueError, match="stop string"):
        made.add(sequence("stop", [1], 2, stop=("",)))
    made.add(sequence("twice", [1], 2))
    for enter in (made.add, made.reserve):
        with pytest.raises(ValueError, match="already here"):
            enter(sequence("twice", [1], 2))
    made.check()
    run(made)
    assert free(made)


def test_waiting_does_not_count_as_asking_the_cache():
    made = engine(pages=8, page_tokens=4)
    first = sequence("first", range(20), 12, ignore_eos=True)
    made.add(first)
    made.step()
    second = sequence("second", [*range(8), *range(20)], 4, ignore_eos=True)
    made.add(second)
    for _ in range(4):
        made.step()
        assert list(made.scheduler.waiting) == [second]
    assert made.scheduler.tree.queries_tokens == 20
    while made.has_work:
        made.step()
    assert made.scheduler.tree.queries_tokens == 20 + 28
    assert second.output == solo_tokens(second.request) and second.cached_tokens == 8


def test_solo_is_not_trivial():
    """The oracle itself: different prompts and seeds give different tokens."""
    one = sequence("a", [1, 2], 12, ignore_eos=True).request
    assert isinstance(one, Request) and one.sampling is GREEDY
    assert len(set(solo_tokens(one))) > 4
    assert solo_tokens(one) != solo_tokens(sequence("b", [1, 3], 12, ignore_eos=True).request)
