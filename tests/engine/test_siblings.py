"""Choices of one prompt: computed once, shared pages, and each one's tokens those of it alone."""

from dataclasses import replace

import pytest

from serve.engine.draws import derived_seed
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from tests.engine.fakes import KEY, Collected, engine, free, run, runner, solo_tokens

COUNT = 4


def family(prompt_tokens: int, count: int = COUNT, max_tokens: int = 10) -> list[Sequence]:
    prompt = tuple((5 + 7 * n) % 39 for n in range(prompt_tokens))
    first = Request("f", prompt, Sampling(seed=3), Limits(max_tokens), KEY, group="f")
    return [
        Sequence(replace(first, request_id=f"f-{n}", sampling=Sampling(seed=derived_seed(3, n))))
        for n in range(count)
    ]


@pytest.mark.parametrize("prompt_tokens", [1, 3, 4, 5, 30, 32, 45])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_prompt_is_computed_once_and_every_choice_is_its_own(prompt_tokens, prefix_cache):
    made = engine(prefix_cache=prefix_cache, budget_tokens=16)
    siblings = family(prompt_tokens)
    for one in siblings:
        made.add(one)
    collected = run(made)
    computed = sum(
        min(stop, prompt_tokens) - start
        for step in runner(made).steps
        for _, start, stop in step
        if start < prompt_tokens
    )
    assert computed == prompt_tokens + COUNT - 1, "all but the first compute one token of it"
    for one in siblings:
        assert collected.tokens[one.request_id] == solo_tokens(one.request)
    assert len({tuple(one.output) for one in siblings}) > 1
    assert free(made)


def test_forks_share_pages_until_they_write():
    made = engine(pages=64, page_tokens=4, prefix_cache=False)
    siblings = family(30, count=8, max_tokens=3)
    for one in siblings:
        made.add(one)
    made.step()
    made.step()
    pool = made.scheduler.pool
    # Seven whole pages for all, and one of its own for each.
    assert pool.used_pages == 30 // 4 + 8
    while made.has_work:
        made.step()
        made.check()
    assert free(made)


@pytest.mark.parametrize("pages", [12, 14, 18])
def test_short_of_pages_they_are_preempted_and_lose_nothing(pages):
    made = engine(pages=pages, page_tokens=4, budget_tokens=16)
    siblings = family(17, count=5, max_tokens=20)
    for one in siblings:
        made.add(one)
    collected = run(made)
    assert made.scheduler.preemptions > 0
    for one in siblings:
        assert collected.tokens[one.request_id] == solo_tokens(one.request)
    assert free(made)


def test_the_first_one_aborted_leaves_the_others():
    made, collected = engine(budget_tokens=8), Collected()
    siblings = family(30)
    for one in siblings:
        made.add(one)
    collected.take(made.step())
    made.abort("f-0")
    run(made, collected)
    for one in siblings[1:]:
        assert collected.tokens[one.request_id] == solo_tokens(one.request)
    assert free(made)


def test_one_that_was_resumed_with_output_joins_in():
    whole = family(18)
    made, collected = engine(), Collected()
    for one in whole:
        made.add(one)
    run(made, collected)
    again = family(18)
    again[2].output = list(collected.tokens["f-2"][:3])
    second = engine()
    for one in again:
        second.add(one)
    while second.has_work:
        second.step()
        second.check()
    assert [one.output for one in again] == [one.output for one in whole]


def test_seeds_of_choices():
    assert derived_seed(7, 0) == 7
    others = {derived_seed(seed, n) for seed in (7, 8, -1) for n in range(1, 50)}
    assert len(others) == 3 * 49 and all(0 <= one < 1 << 63 for one in others)
