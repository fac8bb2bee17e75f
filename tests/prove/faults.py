"""Proof rows of real kills on a real service: SIGKILL to a prefill replica during a hand-off and to
a decode replica in mid-stream. The client's text must be the undisturbed one, and pages and leases
back to the start."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.runfiles import RunFiles
from tests.live.service import LiveService, idle, kill, service, wait_for
from tests.prove.row import Row

QUESTION = "Write a story about a crab that lives on a beach and finds a pearl."
BACK_S = 10.0


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    with service("handoff.min_tokens=32") as live:
        yield from decode_killed(live)
        yield from prefill_killed(live)


def decode_killed(live: LiveService) -> Iterator[Row]:
    """Kill the only decode replica after some tokens of a seeded stream."""
    undisturbed = stream(live, QUESTION, tokens=48)
    victim = live.pid("decode")
    disturbed = stream(live, QUESTION, tokens=48, at=12, act=lambda: kill(victim))
    back_s = wait_for(lambda: restored(live), "pages and leases back", 60)
    yield _same("decode replica killed -9 in mid-stream", undisturbed, disturbed)
    yield _back("decode", back_s)


def prefill_killed(live: LiveService) -> Iterator[Row]:
    """Kill the only prefill replica while it computes the prompt of a waiting request."""
    long = " ".join(f"{n}. {QUESTION}" for n in range(50))
    undisturbed = stream(live, long + " Begin!", tokens=12)
    wait_for(lambda: "prefill-" in " ".join(live.states("prefill")), "a prefill replica")
    before = _remote(live)
    victim = live.pid("prefill")
    killer = threading.Thread(target=_kill_when_busy, args=(live, victim))
    killer.start()
    # Another first word: nothing of the prompt is cached, all of it is asked of the replica.
    disturbed = stream(live, "Now: " + long + " Begin!", tokens=12)
    killer.join()
    back_s = wait_for(lambda: restored(live), "pages and leases back", 60)
    again = stream(live, "Now: " + long + " Begin!", tokens=12)
    yield Row("prompts prefilled remotely before the kill", ">= 1", str(before), before >= 1)
    yield _same("prefill replica killed -9 during a hand-off", again, disturbed)
    yield _back("prefill", back_s)
    assert undisturbed


def restored(live: LiveService) -> bool:
    """As at the start: one ready replica of each role, nothing held for any request, and no shared
    memory but the living prefill replica's."""
    ready = sorted(live.states())
    roles = [replica_id.partition("-")[0] for replica_id in ready]
    segments = [path.name for path in Path("/dev/shm").glob(f"sanderling-{run_id(live)}-*")]
    alone = all(name.endswith(f"-{ready[-1]}") for name in segments) if ready else False
    return roles == ["decode", "prefill"] and idle(live) and alone and len(segments) == 1


def run_id(live: LiveService) -> str:
    """What the shared memory of this run is called by."""
    return RunFiles(live.data_dir).run_id


def stream(
    live: LiveService,
    question: str,
    *,
    tokens: int,
    at: int | None = None,
    act: Callable[[], None] = lambda: None,
) -> str:
    """The text of one seeded, streamed answer; `act` runs after chunk number `at`."""
    pieces: list[str] = []
    answer = live.client().chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        seed=11,
        temperature=0.8,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in answer:
        pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
        if len(pieces) == at:
            act()
    return "".join(pieces)


def _kill_when_busy(live: LiveService, victim: int) -> None:
    """Kill the prefill replica as soon as it is seen computing."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stats = [state["stats"] for state in live.states("prefill").values()]
        if any(s["running"] or s["waiting"] for s in stats):
            break
        time.sleep(0.05)
    kill(victim)


def _remote(live: LiveService) -> int:
    return sum(state["remote_prefills"] for state in live.states("decode").values())


def _same(what: str, undisturbed: str, disturbed: str) -> Row:
    same = undisturbed == disturbed and len(undisturbed) > 0
    return Row(what, "undisturbed text", "same" if same else f"differs: {disturbed!r:.80}", same)


def _back(role: str, back_s: float) -> Row:
    text = f"{back_s:.1f} s"
    return Row(f"{role}: pages and leases back", f"<= {BACK_S:g} s", text, back_s <= BACK_S)
