"""An engine in milliseconds: a runner whose logits are a known function of the tokens it reads.

`MemoryRunner` keeps token ids where a model keeps KV: it writes each slice's tokens to their slots
and computes logits from the whole context as read back through the page table. So a wrong page, a
page freed too early or a chunk left out changes the tokens, as it would with a model; and it
refuses to write to a page that somebody else reads. `solo` says what must come out.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Many

import numpy as np
import torch

from serve.engine.cost import StepCost
from serve.engine.engine import Engine
from serve.engine.runner import Rows
from serve.engine.sampler import Draw, sample
from serve.engine.scheduler import Scheduler, Slice
from serve.engine.sequence import Delta, Limits, Output, Request, Sampling, Sequence
from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, PrefixTree

VOCAB = 40
EOS = VOCAB - 1
KEY = CacheKey("tenant", "", "")
GREEDY = Sampling(temperature=0.0)


def logits_of(tokens: Many[int]) -> torch.Tensor:
    """[VOCAB] float32: a fixed function of all the tokens, in order."""
    digest = hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return torch.from_numpy(generator.normal(size=VOCAB).astype(np.float32)) * 2


class Memory:
    """Token ids by slot, in pages that can be copied; -1 where nothing was written."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.rows = np.full((pages, page_tokens), -1, np.int64)
        self.generation = np.zeros(pages, np.int64)

    def copy_page(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]


class MemoryRunner:
    """See above. `steps` keeps the slices of every step as (request id, start, stop)."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        assert isinstance(pool.storage, Memory)
        self.memory = pool.storage.rows.reshape(-1)
        self.steps: list[list[tuple[str, int, int]]] = []

    def run(self, slices: list[Slice]) -> Rows:
        self.steps.append([(s.sequence.request_id, s.start, s.stop) for s in slices])
        rows = []
        for piece in slices:
            table = piece.sequence.table
            assert table is not None and piece.stop > piece.start
            slots = table.slots(piece.start, piece.stop)
            for page in set((slots // self.pool.page_tokens).tolist()):
                assert self.pool.refcount(page) == 1, "a page that others read is written"
            self.memory[slots] = piece.sequence.tokens(piece.start, piece.stop)
            if piece.samples:
                rows.append(logits_of(self.memory[table.slots(0, piece.stop)].tolist()))
        logits = torch.stack(rows) if rows else torch.empty(0, VOCAB)
        return Rows(logits, logits)


class Letters:
    """A detokenizer of one letter per token; eos is silent."""

    def push(self, ids: Iterable[int]) -> str:
        return "".join("" if token == EOS else letter(token) for token in ids)

    def flush(self) -> str:
        return ""


def letter(token: int) -> str:
    return chr(ord("A") + token)


def engine(
    pages: int = 64,
    page_tokens: int = 4,
    *,
    budget_tokens: int = 32,
    max_running: int = 8,
    cost: StepCost | None = None,
    prefix_cache: bool = True,
) -> Engine:
    pool = PagePool(pages, page_tokens, Memory(pages, page_tokens))
    scheduler = Scheduler(
        pool,
        PrefixTree(pool),
        budget_tokens=budget_tokens,
        max_running=max_running,
        cost=cost or StepCost(),
        prefix_cache=prefix_cache,
    )
    detokenizer: object = Letters
    return Engine(
        scheduler,
        MemoryRunner(pool),
        eos_token_ids=(EOS,),
        detokenizer=detokenizer,  # type: ignore[arg-type]
    )


def runner(made: Engine) -> MemoryRunner:
    assert isinstance(made.runner, MemoryRunner)
    return made.runner


def sequence(
    request_id: str,
    prompt: Many[int],
    max_tokens: int = 8,
    *,
    sampling: Sampling = GREEDY,
    key: CacheKey = KEY,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
) -> Sequence:
    limits = Limits(max_tokens, min_tokens, stop_token_ids, stop, ignore_eos)
    return Sequence(Request(request_id, tuple(prompt), sampling, limits, key))


def solo(request: Request) -> list[Delta]:
    """What a request must yield, one delta per token, worked out without an engine."""
    limits, output, deltas = request.limits, list[int](), list[Delta]()
    text = ""
    while not deltas or deltas[-1].finish is None:
        early = len(output) < limits.min_tokens
        banned = (EOS, *limits.stop_token_ids) if early else ()
        tokens = [*request.prompt, *output]
        draw = Draw(request.sampling, len(tokens), banned, request.prompt, tuple(output))
        [token] = sample(logits_of(tokens)[None], [draw])
        output.append(token)
        counted = len(output) >= limits.min_tokens
        text += letter(token) if counted and token != EOS else ""
        matched = next((s for s in limits.stop if s in text), None)
        ends = token == EOS and not limits.ignore_eos
        if counted and (matched or ends or token in limits.stop_token_ids):
            deltas.append(Delta((token,), "stop", matched))
        elif len(output) == limits.max_tokens:
            deltas.append(Delta((token,), "length"))
        else:
            deltas.append(Delta((token,)))
    return deltas


def solo_tokens(request: Request) -> list[int]:
    return [token for delta in solo(request) for token in delta.token_ids]


class Collected:
    """Outputs by request, verified to arrive in order and to stop at the finish."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, Delta] = {}

    def take(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            mine = self.tokens.setdefault(output.request_id, [])
            before = self.last.get(output.request_id)
            assert before is None or before.finish is None, "output after the end"
            assert output.index == len(mine), "an output out of order"
            mine.extend(output.delta.token_ids)
            self.last[output.request_id] = output.delta


def run(made: Engine, collected: Collected | None = None, most_steps: int = 10_000) -> Collected:
    """Step to the end, checking every invariant after every step."""
    collected = collected or Collected()
    for _ in range(most_steps):
        if not made.has_work:
            return collected
        collected.take(made.step())
        made.check()
        assert made.progressed, "the engine stalled with nobody else holding pages"
    raise AssertionError(f"not done after {most_steps} steps")


def free(made: Engine) -> bool:
    """Whether every page is free or only cached."""
    pool, tree = made.scheduler.pool, made.scheduler.tree
    return pool.free_pages + tree.evictable_pages == pool.pages
