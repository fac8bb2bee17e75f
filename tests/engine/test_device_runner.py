"""The engine over a GPU's decoder: the same tokens as over the float32 decoder, whatever happens to
the sequences; and padded steps, which are what a GPU captures. Runs on a GPU where there is one,
else the same steps run uncaptured on the ops' torch references."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.batch import TokenBatch
from models.device.padded import PaddedSteps, Shape, powers
from serve.engine.cost import StepCost
from serve.engine.device_runner import DeviceRunner
from serve.engine.draws import derived_seed
from serve.engine.engine import Engine
from serve.engine.runner import ModelRunner, Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.device import DeviceStorage
from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, PrefixTree
from serve.kv.storage import KVShape, KVStorage
from tests.models.device_models import CONFIG, DEVICE, RandomSource, cache_of, on_device, oracle
from tests.models.test_device import CUT_FAR, distance

PAGE_TOKENS = 4
KEY = CacheKey("tenant", "", "")
GREEDY = Sampling(temperature=0.0)
SOURCE = RandomSource(CONFIG, "Q4_1", {"v_proj": "Q8_0"})


def shape(pages: int) -> KVShape:
    return KVShape(CONFIG.layers, pages, PAGE_TOKENS, CONFIG.kv_heads, CONFIG.head_dim)


def engine(runner: Runner, storage: Any, **terms: Any) -> Engine:
    pool = PagePool(storage.shape.pages, PAGE_TOKENS, storage)
    how: dict[str, Any] = {"budget_tokens": 16, "max_running": 4, "cost": StepCost(), **terms}
    scheduler = Scheduler(pool, PrefixTree(pool), **how)
    letters: Any = Letters
    return Engine(scheduler, runner, eos_token_ids=(), detokenizer=letters)


class Letters:
    """No text is looked at here."""

    def push(self, ids: list[int]) -> str:
        return "." * len(ids)

    def flush(self) -> str:
        return ""


def on_gpu(pages: int, kv_format: str = "float32", **terms: Any) -> Engine:
    storage = DeviceStorage(shape(pages), kv_format, DEVICE)
    limits = {"budget_tokens": terms.get("budget_tokens", 16), "max_running": 4}
    runner = DeviceRunner(on_device(SOURCE, CONFIG), storage, **limits)
    runner.warm_up()
    return engine(runner, storage, **terms)


def on_cpu(pages: int, **terms: Any) -> Engine:
    storage = KVStorage(shape(pages), "float32")
    return engine(ModelRunner(oracle(SOURCE, CONFIG), storage), storage, **terms)


def prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((17 * n + 5 * seed + n * n) % CONFIG.vocab for n in range(count))


def request(name: str, tokens: tuple[int, ...], most: int = 8, **terms: Any) -> Sequence:
    limits = Limits(most, ignore_eos=True)
    return Sequence(Request(name, tokens, terms.pop("sampling", GREEDY), limits, KEY, **terms))


def tokens(made: Engine, waves: list[list[Sequence]]) -> dict[str, list[int]]:
    """Of every request; each wave arrives three steps after the one before."""
    found: dict[str, list[int]] = {}
    waves = list(waves)
    steps = 0
    while made.has_work or waves:
        if waves and steps % 3 == 0:
            for sequence in waves.pop(0):
                made.add(sequence)
        for output in made.step():
            found.setdefault(output.request_id, []).extend(output.delta.token_ids)
        made.check()
        steps += 1
        assert steps < 1000
    return found


def several() -> list[list[Sequence]]:
    return [
        [request("a", prompt(5)), request("b", prompt(21, 1)), request("c", prompt(1, 2))],
        [request("d", prompt(9, 3)), request("e", prompt(30, 4), 5)],
        [request("f", (*prompt(21, 1), 7))],  # whose beginning b has computed
    ]


def choices() -> list[list[Sequence]]:
    first = request("g", prompt(10, 5), group="g", sampling=Sampling(seed=3)).request
    return [
        [
            Sequence(replace(first, request_id=f"g{n}", sampling=Sampling(seed=derived_seed(3, n))))
            for n in range(3)
        ]
    ]


# What happens: pages, the engine's terms, and what arrives.
SCENES: dict[str, tuple[int, dict[str, Any], Callable[[], list[list[Sequence]]]]] = {
    "together": (64, {}, several),
    "in chunks": (64, {"budget_tokens": 5}, several),
    "short of pages": (12, {}, several),
    "without a prefix cache": (64, {"prefix_cache": False}, several),
    "choices of one prompt": (64, {}, choices),
}


@pytest.mark.parametrize("scene", SCENES)
def test_tokens_are_those_of_the_float32_decoder(scene: str):
    pages, terms, arrive = SCENES[scene]
    ours, theirs = on_gpu(pages, **terms), on_cpu(pages, **terms)
    got, wanted = tokens(ours, arrive()), tokens(theirs, arrive())
    assert got == wanted
    assert len({tuple(each) for each in wanted.values()}) == len(wanted)
    stats = ours.stats()
    assert stats.steps == theirs.stats().steps
    assert (stats.preemptions > 0) == (scene == "short of pages")
    if scene == "together":
        assert stats.prefix_hits_tokens > 0


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_small_caches_run_to_the_end(kv_format: str):
    """Alone or with others, preempted or not: the tokens of a cache of that form. Sums of another
    order may end in another level, which on a GPU other company has; int4's are far apart."""
    ours = tokens(on_gpu(64, kv_format), several())
    assert {name: len(each) for name, each in ours.items()} == {
        "a": 8, "b": 8, "c": 8, "d": 8, "e": 5, "f": 8,
    }  # fmt: skip
    if kv_format != "int4" and DEVICE.type == "cpu":
        assert tokens(on_gpu(12, kv_format), several()) == ours


def test_penalties_bans_and_logprobs_are_taken_where_logits_are():
    """What touches logits before a token is chosen, on whatever device they are."""
    terms = Sampling(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias=((3, 2.0), (9, -4.0)),
    )  # fmt: skip
    work = [[request("p", prompt(6), sampling=terms, logprobs=3), request("s", prompt(7), score=2)]]
    again = [
        [request("p", prompt(6), sampling=terms, logprobs=3), request("s", prompt(7), score=2)]
    ]
    ours, theirs = on_gpu(64), on_cpu(64)
    for made, waves in ((ours, work), (theirs, again)):
        for one in waves[0]:
            made.add(one)
    while theirs.has_work:
        for mine, other in zip(ours.step(), theirs.step(), strict=True):
            assert mine.delta.token_ids == other.delta.token_ids
            pairs = [
                *zip(mine.delta.logprobs, other.delta.logprobs, strict=True),
                *zip(mine.delta.scores, other.delta.scores, strict=True),
            ]
            for near, exact in pairs:
                assert near.logprob == pytest.approx(exact.logprob, abs=1e-4)
                assert [token for token, _ in near.top] == [token for token, _ in exact.top]


def step(rows: list[tuple[int, int, int]], pages: int) -> TokenBatch:
    """rows: (sequence, first position, tokens); each sequence has `pages` pages of its own."""
    ids, positions, slots, starts, contexts, tables = [], [], [], [0], [], []
    for number, first, count in rows:
        places = list(range(first, first + count))
        ids += [(7 * place + 3 * number) % CONFIG.vocab for place in places]
        positions += places
        slots += [number * pages * PAGE_TOKENS + place for place in places]
        starts.append(len(ids))
        contexts.append(first + count)
        tables.append([number * pages + page for page in range(pages)])
    every = torch.arange(len(ids))
    return TokenBatch(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(slots), tuple(starts),
        tuple(contexts), torch.tensor(tables), every,
    )  # fmt: skip


def computed(made: PaddedSteps, batch: TokenBatch) -> torch.Tensor:
    shape = made.shape(batch)
    assert shape is not None
    return made.logits(made.states(batch, shape)).clone()


def padded(most_rows: int = 32) -> PaddedSteps:
    made = PaddedSteps(on_device(SOURCE, CONFIG), cache_of(CONFIG, 24, PAGE_TOKENS), most_rows, 16)
    with torch.inference_mode():
        made.prepare()
    return made


STEPS = [
    [(0, 0, 9), (1, 0, 3)],  # prompts
    [(0, 9, 1), (1, 3, 4), (2, 0, 1)],  # a token, a chunk, a prompt of one
    [(2, 1, 1), (0, 10, 1), (1, 7, 1)],  # tokens
]


def test_padding_changes_no_real_row_and_writes_nothing():
    """Against the same step as it is, whose prompts are attended to in blocks."""
    made, plain = padded(), cache_of(CONFIG, 24, PAGE_TOKENS)
    for rows in STEPS:
        batch = step(rows, 6)
        with torch.inference_mode():
            got = computed(made, batch)
            wanted = made.decoder(batch, plain)
        assert torch.allclose(got, wanted, atol=1e-4)
        assert torch.allclose(made.cache.numbers, plain.numbers, atol=1e-4), "other slots"


def test_a_row_that_is_added_would_be_seen_if_it_wrote(monkeypatch: pytest.MonkeyPatch):
    """The test above fails when padding is given a slot that somebody has."""
    made, plain = padded(), cache_of(CONFIG, 24, PAGE_TOKENS)
    fill = made._fill

    def careless(batch: TokenBatch, shape: Shape) -> None:
        fill(batch, shape)
        made._inputs.numbers[2].clamp_(min=0)

    monkeypatch.setattr(made, "_fill", careless)
    batch = step(STEPS[0], 6)
    with torch.inference_mode():
        computed(made, batch)
        made.decoder(batch, plain)
    assert not torch.allclose(made.cache.numbers, plain.numbers, atol=1e-4)


@pytest.mark.parametrize("most,wanted", [(1, [1]), (4, [1, 2, 4]), (5, [1, 2, 4, 8])])
def test_sizes(most: int, wanted: list[int]):
    assert list(powers(most)) == wanted


def test_which_step_a_batch_is_padded_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("models.device.padded.CHUNK_KEYS", (32, 64))
    made = padded(8)
    made.decoder.sizes = made.decoder.sizes._replace(units=0)  # contexts whole, on a GPU as well
    assert made.sizes == (1, 2, 4, 8) and made.key_sizes == (32, 64)
    assert made.shape(step([(0, 0, 9)], 6)) is None, "too many rows"
    assert made.shape(step([(0, 0, 5)], 6)) == Shape(8, 1, 0)
    three = step([(0, 20, 3)], 6)
    assert made.shape(three) == Shape(4, 1, 0)
    read_tokens = 21 + 22 + 23  # by its three rows
    monkeypatch.setattr("models.device.padded.MOST_READ_BYTES", read_tokens * made._read_bytes - 1)
    assert made.shape(three) == Shape(4, 1, 32), "in chunks"
    assert made.shape(step([(0, 20, 3), (1, 20, 4)], 6)) == Shape(8, 1, 64)
    assert made.shape(step([(0, 20, 1), (1, 20, 1), (2, 20, 1)], 6)) == Shape(4, 1, 0)
    tokens_and_chunk = step([(0, 20, 1), (1, 20, 4)], 6)
    assert made.shape(tokens_and_chunk) == Shape(8, 1, 32), "keys of the chunk alone"
    monkeypatch.setattr("models.device.padded.CHUNK_SEQUENCES", 1)
    assert made.shape(step([(0, 20, 3), (1, 20, 4)], 6)) is None, "too many sequences"


@pytest.mark.parametrize("kv_format", ["float32", "int8"])
def test_chunks_of_prompts_in_padded_steps(monkeypatch: pytest.MonkeyPatch, kv_format: str):
    """Tokens beside chunks, chunks of one row, contexts of several lengths: as computed without."""
    monkeypatch.setattr("models.device.padded.MOST_READ_BYTES", 0)
    monkeypatch.setattr("models.device.padded.CHUNK_KEYS", (32, 64))
    decoder = on_device(SOURCE, CONFIG)
    caches = [cache_of(CONFIG, 24, PAGE_TOKENS, kv_format) for _ in range(2)]
    made = PaddedSteps(decoder, caches[0], 16, 16)
    with torch.inference_mode():
        made.prepare()
        used = set()
        for rows in (
            [(0, 0, 9), (1, 0, 3)],
            [(0, 9, 1), (1, 3, 4), (2, 0, 1), (3, 0, 2)],
            [(2, 1, 1), (0, 10, 13)],
            [(0, 23, 1), (1, 7, 1)],
        ):
            batch = step(rows, 6)
            shape = made.shape(batch)
            assert shape is not None
            used.add(shape.keys)
            got = made.logits(made.states(batch, shape)).clone()
            assert distance(got, decoder(batch, caches[1])) < CUT_FAR[kv_format]
    assert used == {0, 32}


def test_contexts_are_read_in_as_many_parts_as_their_lengths_ask_for(
    monkeypatch: pytest.MonkeyPatch,
):
    """As on a GPU of some multiprocessors: one part of a short context, more of a long one."""
    decoder = on_device(SOURCE, CONFIG)
    decoder.sizes = decoder.sizes._replace(units=8)
    monkeypatch.setattr("models.device.step.LEAST_PART_TOKENS", 4)
    monkeypatch.setattr("models.device.padded.LONGEST_TOKENS", (4, 12, 1 << 30))
    made = PaddedSteps(decoder, cache_of(CONFIG, 24, PAGE_TOKENS), 8, 8)
    plain = cache_of(CONFIG, 24, PAGE_TOKENS)
    used: list[int] = []
    attend = decoder.ops.paged_attention

    def noted(*args: Any) -> torch.Tensor:
        used.append(args[-1])
        return attend(*args)

    decoder.ops = decoder.ops._replace(paged_attention=noted)
    with torch.inference_mode():
        made.prepare()
        assert sorted(shape.splits for shape in made._steps if shape.rows == 1) == [1, 3, 8]
        for rows in ([(0, 0, 8)], [(0, 8, 1)], [(1, 0, 1)], [(0, 9, 7)], [(0, 16, 1), (1, 1, 1)]):
            batch = step(rows, 6)
            used.clear()
            got = computed(made, batch)
            shape = made.shape(batch)
            assert shape is not None
            parts = shape.splits
            assert DEVICE.type == "cuda" or set(used) == {parts}, "a replay calls nothing"
            assert torch.allclose(got, decoder(batch, plain), atol=1e-4)
            longest = max(first + count for _, first, count in rows)
            size = next(each for each in made.sizes if each >= len(batch.ids))
            most = {4: 1, 8: 3, 9: 3, 1: 1, 16: 1 << 30, 17: 1 << 30}[longest]
            assert parts == min(decoder.sizes.splits(size, 1 << 30), most), rows


def test_more_logits_than_any_size():
    made = padded()
    states = torch.randn(20, CONFIG.hidden, device=DEVICE)
    with torch.inference_mode():
        assert torch.allclose(made.logits(states), made.decoder.logits(states), atol=1e-5)
        assert torch.allclose(made.logits(states[:3]), made.decoder.logits(states[:3]), atol=1e-5)
        assert made.logits(states[:0]).shape == (0, CONFIG.vocab)


def test_warming_up_writes_to_no_page():
    storage = DeviceStorage(shape(8), "int8", DEVICE)
    runner = DeviceRunner(on_device(SOURCE, CONFIG), storage, budget_tokens=16, max_running=4)
    runner.warm_up()
    assert not storage.cache.numbers.any()
