"""Proof rows of `kill -9` of a whole Ray node while an answer is made by a replica on it.

A head without CPUs and two nodes that hold three of the four replicas each, so that what a node
takes with it differs: one decode or both, prefill replicas, now and then controller or ingress,
which land where Ray puts them. The other node takes over; the lost one comes back under its old
label. KV travels in Ray objects, as between machines. A dead ingress takes its connections with it:
there the client must see a clear end, and its retry the answer.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import httpx

from tests.live.service import LiveService, busy, service, wait_for
from tests.prove.answers import CASES, Answer, ask, body, same
from tests.prove.kills import BACK_S, actor_pids, free, ready, restored
from tests.prove.raynodes import RayNodes, ray_nodes
from tests.prove.row import Row

ROUNDS = 6
CPUS = {"a": 3.0, "b": 3.0}
RESTORED_S = 180.0  # a node starts, then its replicas
SETTINGS = (
    *("decode.replicas=2", "decode.cpus=1", "decode.threads=1"),
    *("prefill.replicas=2", "prefill.cpus=1", "prefill.threads=1"),
    *("handoff.min_tokens=32", "handoff.transport=ray_object"),
    *("controller.ping_deadline_s=3", "http.proxy=python"),
)
PLACES = {"decode": "DecodeActor", "prefill": "PrefillActor"}
PLACES |= {"controller": "ControllerActor", "ingress": "ServeReplica"}


@dataclass
class Tally:
    """What the rounds have shown so far."""

    rounds: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)
    in_time: int = 0
    again: int = 0
    answered_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    restored_s: list[float] = field(default_factory=list)


@dataclass
class Blow:
    """One node's end: which it was and when, what ran on it, whether the answer was made there."""

    node: str = ""
    at_s: float = 0.0
    held: Counter[str] = field(default_factory=Counter)
    hit: bool = False


def rows(rounds: int = ROUNDS) -> Iterator[Row]:
    """Every row of this module, about a minute and a half for each round."""
    chance, tally = random.Random(62), Tally()
    with ray_nodes(CPUS) as nodes:
        given = (*SETTINGS, f"ray.address={nodes.address}")
        with service(*given, environment=nodes.environment) as live:
            for number in range(rounds):
                case = chance.choice(list(CASES))
                try:
                    _round(live, nodes, tally, number, case, chance.randrange(1, 14))
                except (AssertionError, KeyError, ValueError, httpx.HTTPError, RuntimeError) as e:
                    tally.lost.append(f"{number + 1} ({case}): {e}")
    yield from _rows(tally, rounds)


def _round(
    live: LiveService, nodes: RayNodes, tally: Tally, number: int, case: str, at: int
) -> None:
    """One node killed during one answer, then the same answer undisturbed, then the node again."""
    wait_for(lambda: restored(live), "two replicas of each role, idle", RESTORED_S)
    waves = " ".join(f"Wave {n} brings {(n * 7 + number) % 31} shells." for n in range(40))
    question = f"Letter {number}. {waves} Which city lies at this sea? Tell me about its weather."
    sent, blow = body(case, 3000 + number, question), Blow()
    act = partial(_strike, live, nodes, live.pids(), blow)
    tally.rounds += 1
    try:
        disturbed = _disturbed(live, sent, at, act, blow, tally)
        tally.answered_s.append(time.monotonic() - blow.at_s)
        if blow.held["ingress"]:  # nobody can be asked before
            wait_for(lambda: ready(live), "another ingress", RESTORED_S)
        tally.back_s.append(wait_for(lambda: free(live), "pages and leases", RESTORED_S))
        if not same(disturbed, ask(live, sent)):
            tally.different.append(f"{number + 1} ({case})")
    finally:
        if blow.node:
            nodes.start(blow.node, CPUS[blow.node])
    tally.restored_s.append(wait_for(lambda: restored(live), "full strength", RESTORED_S))
    tally.in_time += blow.hit
    tally.taken.update(blow.held)
    held = ", ".join(f"{n} {kind}" for kind, n in sorted(blow.held.items()) if n)
    times = f"answered after {tally.answered_s[-1]:.0f} s"
    print(f"   {number + 1}: {case}, node {blow.node} with {held}; {times}", flush=True)


def _disturbed(
    live: LiveService,
    sent: dict[str, object],
    at: int,
    act: Callable[[], None],
    blow: Blow,
    tally: Tally,
) -> Answer:
    try:
        return ask(live, sent, at=at, act=act)
    except (httpx.HTTPError, RuntimeError):
        if not blow.held["ingress"]:
            raise
    tally.again += 1
    wait_for(lambda: ready(live), "another ingress", RESTORED_S)
    return ask(live, sent)


def _strike(live: LiveService, nodes: RayNodes, pids: dict[str, int], blow: Blow) -> None:
    """Kill the node of the decode replica that works on the answer."""
    states = live.states("decode")
    working = [r for r, s in states.items() if busy({r: s})["sequences"]]
    victim = pids[f"replica/{(working or sorted(states))[0]}"]
    blow.node = next(name for name in CPUS if victim in nodes.pids(name))
    there = nodes.pids(blow.node)
    blow.held.update({kind: len(actor_pids(there, word)) for kind, word in PLACES.items()})
    blow.hit = bool(working)
    nodes.kill(blow.node)
    blow.at_s = time.monotonic()


def _rows(tally: Tally, rounds: int) -> Iterator[Row]:
    taken = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.taken.items()))
    first = "".join(f"; {text}" for text in tally.lost[:2])
    yield Row(
        f"{rounds} whole nodes killed in mid-stream (with them {taken})",
        "0 lost",
        f"{len(tally.lost)} lost, {tally.again} asked again of a new ingress, all answered "
        f"{max(tally.answered_s, default=0):.0f} s after the kill at the latest{first}",
        tally.rounds == rounds and not tally.lost,
    )
    first = "".join(f"; {text}" for text in tally.different)
    measured = f"{len(tally.different)} different{first}"
    complete = len(tally.back_s) == len(tally.restored_s) == rounds
    yield Row(
        "answers under node deaths = undisturbed",
        "0 different",
        measured,
        complete and not tally.different,
    )
    measured = f"{tally.in_time} of {rounds}"
    yield Row("nodes that worked on the answer", "most", measured, tally.in_time > rounds / 2)
    worst = max(tally.back_s, default=float("inf"))
    text = f"{worst:.1f} s at worst"
    yield Row("pages and leases back after each", f"<= {BACK_S:g} s", text, worst <= BACK_S)
    worst = max(tally.restored_s, default=float("inf"))
    text = f"{worst:.0f} s at worst after the node's start"
    yield Row("full strength again", f"<= {RESTORED_S:g} s", text, complete and worst <= RESTORED_S)
