"""Proof rows of the kill suite: seeded kills of every kind while an answer of some kind is made.

Two prefill and two decode replicas serve; a kill hits the one that works on the answer. Each answer
is asked for again afterwards, undisturbed, and has to be the same. The kinds: `kill -9` of decode,
prefill, controller and ingress, a decode replica that hangs (SIGSTOP), one that is drained and sent
away. A dead ingress takes its connections with it: there the client must see a clear end, and its
retry the answer, from the prefix cache.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import httpx
import psutil

from serve import bench
from tests.cluster_ray.machine import living
from tests.live.service import LiveService, busy, idle, kill, sanderling, service, wait_for
from tests.prove.answers import CASES, Answer, ask, body, same
from tests.prove.row import Row

KILLS = 60
BACK_S = 10.0
RESTORED_S = 90.0
KINDS = ("decode", "prefill", "hang", "decode", "ingress", "drain", "prefill", "controller")
SETTINGS = (
    *("decode.replicas=2", "prefill.replicas=2", "handoff.min_tokens=32"),
    *("controller.ping_deadline_s=3", "decode.threads=1", "prefill.threads=1"),
)
CANCELLED = 200
ROUNDS = 3


@dataclass
class Tally:
    """What the trials have shown so far."""

    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    in_time: int = 0
    back_s: list[float] = field(default_factory=list)
    retries_cached: list[int] = field(default_factory=list)


def rows(kills: int = KILLS) -> Iterator[Row]:
    """Every row of this module, as it is measured; about 25 minutes."""
    with service(*SETTINGS) as live:
        yield from suite(live, kills)
        yield abort_storm(live)


def suite(live: LiveService, kills: int) -> Iterator[Row]:
    chance, tally = random.Random(60), Tally()
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        case = chance.choice(list(CASES))
        started_s = time.monotonic()
        try:
            _trial(live, tally, number, kind, case, chance.randrange(1, 14))
        except (AssertionError, KeyError, IndexError, httpx.HTTPError, RuntimeError) as error:
            tally.lost.append(f"{number + 1} ({kind}, {case}): {error}")
        took_s = time.monotonic() - started_s
        print(f"   kill {number + 1}: {kind}, {case}, {took_s:.0f} s", flush=True)
    total = tally.kinds.total()
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.kinds.items()))
    cases = ", ".join(f"{n} {case}" for case, n in sorted(tally.cases.items()))
    first = "".join(f"; {text}" for text in tally.lost[:2])
    yield Row(
        f"{kills} seeded kills ({kinds})",
        "0 lost",
        f"{len(tally.lost)} of {total} lost{first}",
        total == kills and not tally.lost,
    )
    first = "".join(f"; {text}" for text in tally.different[:2])
    yield Row(
        f"answers under kills = undisturbed ({cases})",
        "0 different",
        f"{len(tally.different)} different{first}",
        total == kills and not tally.different,
    )
    measured = f"{tally.in_time} of {total}"
    yield Row("kills that hit an answer in the making", "most", measured, tally.in_time > total / 2)
    worst = max(tally.back_s, default=float("inf"))
    text = f"{worst:.1f} s at worst"
    yield Row("pages and leases back after each", f"<= {BACK_S:g} s", text, worst <= BACK_S)
    hits = sum(tokens > 0 for tokens in tally.retries_cached)
    measured = f"{hits} of {len(tally.retries_cached)}"
    ok = 0 < hits == len(tally.retries_cached)
    yield Row("retries after a dead ingress hit the cache", "all", measured, ok)


def _trial(live: LiveService, tally: Tally, number: int, kind: str, case: str, at: int) -> None:
    """One kill during one answer, then the same answer undisturbed."""
    wait_for(lambda: restored(live), "two replicas of each role, idle", RESTORED_S)
    tail = " ".join(f"Wave {n} brings {(n * 7 + number) % 31} shells." for n in range(40))
    question = f"Letter {number}. {tail} Which city lies at this sea? Tell me about its weather."
    sent = body(case, 1000 + number, question)
    pids = live.pids()
    hit: list[bool] = []
    what = f"{number + 1} ({kind}, {case})"
    tally.kinds[kind] += 1
    tally.cases[case] += 1
    try:
        disturbed = _disturbed(live, kind, sent, at, pids, hit)
    except (httpx.HTTPError, RuntimeError) as error:
        if kind != "ingress":
            tally.lost.append(f"{what}: {error}")
            return
        disturbed = _retried(live, sent, tally)
    tally.in_time += any(hit)
    tally.back_s.append(wait_for(lambda: free(live), "pages and leases", RESTORED_S))
    if not same(disturbed, ask(live, sent)):
        tally.different.append(what)


def _disturbed(
    live: LiveService,
    kind: str,
    sent: dict[str, object],
    at: int,
    pids: dict[str, int],
    hit: list[bool],
) -> Answer:
    if kind != "prefill":
        return ask(live, sent, at=at, act=partial(_strike, live, kind, pids, hit))
    killer = threading.Thread(target=_kill_prefill, args=(live, pids, hit))
    killer.start()
    try:
        return ask(live, sent)
    finally:
        killer.join()


def _strike(live: LiveService, kind: str, pids: dict[str, int], hit: list[bool]) -> None:
    """Hit what works on the answer."""
    if kind == "ingress":
        hit.append(True)
        kill(ingress_pid(live))
        return
    if kind == "controller":
        hit.append(True)
        kill(pids["controller"])
        return
    working = [r for r, s in live.states("decode").items() if busy({r: s})["sequences"]]
    hit.append(bool(working))
    victim = (working or sorted(live.states("decode")))[0]
    if kind == "hang":
        os.kill(pids[f"replica/{victim}"], signal.SIGSTOP)
    elif kind == "drain":
        data = f"data_dir={live.data_dir}"
        sanderling("scale", "decode=1", "--drain-s", "0", "--set", data, timeout_s=120)
        sanderling("scale", "decode=2", "--set", data, timeout_s=120)
    else:
        kill(pids[f"replica/{victim}"])


def _kill_prefill(live: LiveService, pids: dict[str, int], hit: list[bool]) -> None:
    """Kill the prefill replica that is first seen at work."""
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        states = live.states("prefill")
        working = [r for r, s in states.items() if busy({r: s})["sequences"]]
        if working:
            hit.append(True)
            kill(pids[f"replica/{working[0]}"])
            return
        time.sleep(0.02)
    kill(pids[f"replica/{sorted(live.states('prefill'))[0]}"])


def _retried(live: LiveService, sent: dict[str, object], tally: Tally) -> Answer:
    """What a client does whose connection broke: ask again as soon as somebody is ready."""
    wait_for(lambda: ready(live), "another ingress", RESTORED_S)
    answer = ask(live, sent)
    whole = {**sent, "stream": False, "max_tokens": 1, "n": 1}
    usage = httpx.post(f"{live.url}/v1/chat/completions", json=whole, timeout=60).json()["usage"]
    tally.retries_cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    return answer


def ingress_pid(live: LiveService) -> int:
    """The process of the ingress, which Serve names."""
    [found] = actor_pids(live.processes(), "ServeReplica")
    return found


def actor_pids(pids: Iterable[int], word: str) -> list[int]:
    """Those of some processes whose actor, by the title that Ray gives them, has a word in it."""
    return [pid for pid in pids if word in title(pid) and living([pid])]


def title(pid: int) -> str:
    """The first word of a process's command line: "ray::DecodeActor"; empty when it is gone."""
    try:
        return "".join(psutil.Process(pid).cmdline()[:1])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def ready(live: LiveService) -> bool:
    """Whether a token can be made, as far as a client can see."""
    try:
        return live.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False


def full_strength(live: LiveService) -> bool:
    """Whether two replicas of each role are ready."""
    try:
        roles = sorted(name.partition("-")[0] for name in live.states())
    except httpx.HTTPError:
        return False
    return roles == ["decode", "decode", "prefill", "prefill"]


def free(live: LiveService) -> bool:
    """Whether pages and leases are back, on all replicas that are ready."""
    try:
        return idle(live)
    except httpx.HTTPError:
        return False


def restored(live: LiveService) -> bool:
    return full_strength(live) and free(live)


def abort_storm(live: LiveService) -> Row:
    """Throughput of a small closed loop before and after requests that were all cancelled."""
    wait_for(lambda: restored(live), "two replicas of each role, idle", RESTORED_S)
    load = bench.Load(requests=12, concurrency=4, prompt_tokens=40, max_tokens=24)
    bench.run(live.url, load)
    before = [bench.run(live.url, load)["output_tokens_per_s"] for _ in range(ROUNDS)]
    _cancel_many(live)
    wait_for(lambda: idle(live), "pages after the storm", RESTORED_S)
    after = [bench.run(live.url, load)["output_tokens_per_s"] for _ in range(ROUNDS)]
    ratio = sorted(after)[ROUNDS // 2] / sorted(before)[ROUNDS // 2]
    text = f"{ratio:.2f} of the throughput before"
    return Row(f"{CANCELLED} cancelled requests", ">= 0.9", text, ratio >= 0.9)


def _cancel_many(live: LiveService) -> None:
    """Streams that are left after their first chunk, eight at a time."""

    def leave(number: int) -> None:
        sent = {**body("seeded", number, f"{number}. Count the waves."), "max_tokens": 500}
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", f"{live.url}/v1/chat/completions", json=sent) as response,
        ):
            if number % 2:
                next(response.iter_lines())

    for first in range(0, CANCELLED, 8):
        threads = [threading.Thread(target=leave, args=(n,)) for n in range(first, first + 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
