"""Proof rows of migration: plans against brute force, drains of eight live sequences of the default
model with and without their pages, in every format of the cache, and a real SIGKILL."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cluster.settings import Settings
from serve import build
from serve.decode import DecodeReplica
from serve.engine.sequence import Limits, Output, Request, Sampling
from serve.kv.prefix import CacheKey
from serve.local import LocalService
from serve.migrate.plan import plan
from serve.wire import Moved
from tests.migrate.instances import brute_force_s, problems, random_drain
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

INSTANCES = 2_000
STREAMS = 8
TOKENS = 64
STEPS_LEFT = 20  # the deadline of a drain, in engine steps: far fewer than the answers need
SUITES = (
    Suite(
        "plan, packing, pace",
        ("tests/migrate", "tests/engine/test_pace.py"),
    ),
    Suite(
        "form, seed, logprobs, stops, choices, adapters; leases, kills, races; mutations",
        ("tests/serving/test_migrate.py",),
    ),
    Suite(
        "Ray actors: notice, SIGKILL at the deadline and in the middle of the moves",
        ("tests/live/test_migrate.py", "-m", "live"),
    ),
)


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    yield from attempt("plans", plans)
    yield from attempt("drains", drains)
    for suite in SUITES:
        yield from attempt(suite.shows, lambda suite=suite: run(suite))  # type: ignore[misc]


def plans() -> Iterator[Row]:
    """Random drains of up to 8 sequences; a third more time must never cost more."""
    rng = random.Random(2024)
    worst = mean = 0.0
    wrong = dearer = 0
    for _ in range(INSTANCES):
        drain = random_drain(rng)
        made, best_s = plan(*drain), brute_force_s(drain)
        over = made.cost_s / best_s - 1 if best_s > 1e-9 else float(made.cost_s > 1e-9)
        worst, mean = max(worst, over), mean + over / INSTANCES
        wrong += bool(problems(drain, made))
        later = drain._replace(deadline_s=drain.deadline_s * 1.33)
        dearer += plan(*later).cost_s > made.cost_s + 1e-9
    yield Row(
        f"plan / brute force, {INSTANCES:,} drains of 1 to 8 sequences",
        "<= 1.05",
        f"worst {1 + worst:.4f}, mean {1 + mean:.4f}",
        worst <= 0.05,
    )
    yield Row("of these, beyond their deadline or misstated", "0", str(wrong), wrong == 0)
    yield Row("of these, dearer with more time", "0", str(dearer), dearer == 0)


@dataclass
class Ran:
    """What came of the streams. left: tokens whose KV each had when it left, by request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    at_s: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    moved_tokens: int = 0
    moved_bytes: int = 0
    token_bytes: int = 0
    again: int = 0
    failed: int = 0
    drained_s: float = 0.0
    deadline_s: float = 0.0

    @property
    def again_share(self) -> float:
        """Of the tokens that were computed when their sequences left, those computed twice."""
        return self.again / max(sum(self.left.values()), 1)

    def pause_s(self) -> float:
        """Median over the streams that moved of their longest wait for a token since the drain."""
        waits = []
        for name in self.left:
            late = [t for t in self.at_s[name] if t > self.drained_s]
            waits.append(max((b - a for a, b in zip(late, late[1:], strict=False)), default=0.0))
        return statistics.median(waits)


class Case(NamedTuple):
    """A way to drain, and the settings that make it."""

    name: str
    kv_dtype: str
    migrate: dict[str, Any]


EXACT = (
    Case("pages as they are, float16", "auto", {}),
    Case("pages as they are, int8", "int8", {}),
    Case("pages as they are, int4", "int4", {}),
)
REPLAY = Case("replay alone", "auto", {"pages": False})


def drains() -> Iterator[Row]:
    torch.set_num_threads(1)  # two replicas in one process: else they wait for each other's threads
    model = build.load(Settings())
    requests = streams()
    undisturbed: dict[str, Ran] = {}
    for case in EXACT:
        undisturbed[case.kv_dtype] = asyncio.run(ran(model, case, requests, drain=False))
        moved = asyncio.run(ran(model, case, requests, drain=True))
        yield from _exact_rows(case, moved, undisturbed[case.kv_dtype])
        if case is EXACT[0]:
            again = asyncio.run(ran(model, REPLAY, requests, drain=True))
            yield from _replay_rows(moved, again, undisturbed["auto"])
    yield from _lossy_rows(model, requests, undisturbed["auto"])


def streams() -> list[Request]:
    """Prompts of 40 to 208 tokens with nothing in common, greedy and seeded in turn."""
    chance = random.Random(8)
    made = []
    for n in range(STREAMS):
        prompt = tuple(chance.randrange(100, 40_000) for _ in range(40 + 24 * n))
        sampling = Sampling(0.9, top_p=0.95, seed=n) if n % 2 else Sampling(temperature=0.0)
        limits = Limits(TOKENS, ignore_eos=True)
        made.append(Request(f"r{n}", prompt, sampling, limits, CacheKey("", "", "")))
    return made


async def ran(model: build.Model, case: Case, requests: list[Request], *, drain: bool) -> Ran:
    """The requests on one decode replica, which is drained in their middle if it is to be."""
    settings = Settings.model_validate(
        {
            "prefill": {"replicas": 0},
            "engine": {"kv_dtype": case.kv_dtype, "kv_tokens": 8_192},
            "migrate": case.migrate,
        }
    )
    made = Ran()
    async with LocalService(settings, model) as service:
        await _ready(service)
        _watch_departures(service, made)
        work = [asyncio.create_task(_stream(service, one, made)) for one in requests]
        if drain:
            while len(made.tokens) < STREAMS or min(map(len, made.tokens.values())) < 8:
                await asyncio.sleep(0.01)
            [leaving] = _replicas(service)
            made.deadline_s = max(2.0, STEPS_LEFT * leaving.loop.pace.step_s(STREAMS))
            made.drained_s = time.monotonic()
            await service.controller.drain(leaving.replica_id, made.deadline_s)
        await asyncio.gather(*work)
        for replica in _replicas(service):
            counts = replica.arrivals.counts
            made.moved += counts.requests
            made.moved_tokens += counts.tokens
            made.moved_bytes += counts.bytes
            made.failed += counts.failed
            made.again += replica.loop.engine.recomputed_tokens
            made.token_bytes = replica.storage.token_bytes
    return made


async def _stream(service: LocalService, request: Request, made: Ran) -> None:
    async with aclosing(service.ingress.generate(request)) as deltas:
        async for delta in deltas:
            made.tokens.setdefault(request.request_id, []).extend(delta.token_ids)
            made.at_s.setdefault(request.request_id, []).append(time.monotonic())


def _watch_departures(service: LocalService, made: Ran) -> None:
    """Note how much of each request had been computed when it left its replica."""
    ingress: Any = service.ingress
    take_in = ingress._take_in

    def noting(item: Output | Moved) -> None:
        record = ingress._placed.get(item.request_id)
        if isinstance(item, Moved) and record is not None:
            made.left[record.sequence.request_id] = len(record.sequence) - 1
        take_in(item)

    ingress._take_in = noting


async def _ready(service: LocalService) -> None:
    while not service.ingress.directory.ready("decode"):
        await asyncio.sleep(0.05)


def _replicas(service: LocalService) -> list[DecodeReplica]:
    members = service.launcher.members.values()
    return [m.replica for m in members if isinstance(m.replica, DecodeReplica)]


def _exact_rows(case: Case, moved: Ran, undisturbed: Ran) -> Iterator[Row]:
    what = f"{case.name}, {STREAMS} live, {sum(moved.left.values()):,} tokens of KV"
    share = moved.again_share
    measured = (
        f"{share:.1%} ({moved.again} tokens; {moved.moved} of {len(moved.left)} with pages, "
        f"{moved.failed} failed, {moved.deadline_s:.1f} s)"
    )
    ok = share <= 0.1 and len(moved.left) >= STREAMS // 2
    yield Row(f"computed again: {what}", "<= 10 %, at least half leave", measured, ok)
    expected = moved.moved_tokens * moved.token_bytes
    yield Row(
        f"bytes moved / KV of the tokens moved: {case.name}",
        "1.000",
        f"{moved.moved_bytes / max(expected, 1):.3f} ({moved.moved_bytes:,} bytes)",
        0 < moved.moved_bytes == expected,
    )
    yield _equal_row(case.name, moved, undisturbed)


def _equal_row(name: str, ran_: Ran, undisturbed: Ran) -> Row:
    differ = sum(ran_.tokens[r] != undisturbed.tokens[r] for r in undisturbed.tokens)
    what = f"streams whose tokens differ from the undisturbed run's: {name}"
    return Row(what, f"0 of {STREAMS}", str(differ), differ == 0)


def _replay_rows(moved: Ran, again: Ran, undisturbed: Ran) -> Iterator[Row]:
    yield Row(
        "the same drain by replay alone, as a mutation: computed again",
        ">= 90 %",
        f"{again.again_share:.1%} ({again.again} tokens of {len(again.left)} streams)",
        again.again_share >= 0.9 and again.moved == 0,
    )
    yield _equal_row(REPLAY.name, again, undisturbed)
    ratio = moved.pause_s() / again.pause_s()
    yield Row(
        "longest pause of a stream that moved, median, pages / replay",
        "<= 0.5",
        f"{ratio:.2f} ({moved.pause_s():.2f} s and {again.pause_s():.2f} s)",
        ratio <= 0.5,
    )


def _lossy_rows(model: build.Model, requests: list[Request], undisturbed: Ran) -> Iterator[Row]:
    """A link on which only a part of the float16 pages fits into the deadline."""
    narrow = {"link_bytes_per_s": 4e6}
    exact = asyncio.run(ran(model, Case("", "auto", narrow), requests, drain=True))
    name = "a link of 4 MB/s, lossy not allowed"
    yield _equal_row(name, exact, undisturbed)
    whole = exact.moved_bytes == exact.moved_tokens * exact.token_bytes
    yield Row(f"{name}: pages moved in fewer bits", "0", "0" if whole else "some", whole)
    allowed = {**narrow, "lossy": True}
    lossy = asyncio.run(ran(model, Case("", "auto", allowed), requests, drain=True))
    share = lossy.moved_bytes / max(lossy.moved_tokens * lossy.token_bytes, 1)
    same = statistics.mean(
        sum(a == b for a, b in zip(lossy.tokens[r], undisturbed.tokens[r], strict=True)) / TOKENS
        for r in undisturbed.tokens
    )
    yield Row(
        "the same, allowed: bytes / those of float16",
        "< 1",
        f"{share:.2f}; {lossy.moved} with pages beside {exact.moved}; computed again "
        f"{lossy.again_share:.1%} beside {exact.again_share:.1%}; {same:.0%} of tokens alike",
        0 < share < 1,
    )
