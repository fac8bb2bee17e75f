"""Clients that ask without pause: a mix of every kind of request, and what came of it.

Every request is one of a few hundred, so that its answer has to be the one it had before, streamed
or whole. Nothing may be lost; only a dead ingress takes its connections with it, and a client whose
request met such an outage asks again. Used by the soak.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from tests.live.service import MODEL, LiveService, wait_for
from tests.prove.answers import CASES, Answer, ask, body, same
from tests.prove.kills import RESTORED_S, ready

ACTS = {"stream": 10, "whole": 5, "embed": 2, "leave": 3}  # how often, of their sum
NUMBERS = 40  # requests of each case
INPUTS = 8  # to embed, of different lengths
WAVES = 24


class Request(NamedTuple):
    """What a client does next: the kind of act, what the answer is known by, the body."""

    act: str
    name: str
    body: dict[str, Any]


@dataclass
class Load:
    """What the clients of a service have asked and been told; their threads share it.

    again: requests that were asked again of a new ingress. compared: answers that had been given
    before. outage_ends_s: when each outage of the ingress ended; infinity while it lasts.
    """

    live: LiveService
    acts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    again: int = 0
    compared: int = 0
    outage_ends_s: list[float] = field(default_factory=list)
    _known: dict[str, Any] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def clients(self, count: int) -> Iterator[None]:
        """So many clients at work; at the end each has its last answer."""
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """What is asked before the end of it may have met a dead ingress."""
        self.outage_ends_s.append(float("inf"))
        yield
        self.outage_ends_s[-1] = time.monotonic()

    def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            request = draw(chance)
            try:
                answer = self._persist(request)
            except Exception as error:  # whatever a client gets instead of an answer
                with self._lock:
                    self.lost.append(f"{request.act} {request.name}: {error!r}")
                continue
            with self._lock:
                self.acts[request.act] += 1
                if answer is not None:
                    self._compare(request, answer)

    def _persist(self, request: Request) -> Any:
        """The answer; asked for once more when the ingress died under the request."""
        started_s = time.monotonic()
        try:
            return _ACTS[request.act](self.live, request.body)
        except (httpx.HTTPError, RuntimeError):
            if not any(started_s <= end_s for end_s in self.outage_ends_s):
                raise
        with self._lock:
            self.again += 1
        wait_for(lambda: ready(self.live), "another ingress", RESTORED_S)
        return _ACTS[request.act](self.live, request.body)

    def _compare(self, request: Request, answer: Any) -> None:
        self.compared += request.name in self._known
        if not _alike(self._known.setdefault(request.name, answer), answer):
            self.different.append(f"{request.act} {request.name}")


def draw(chance: random.Random) -> Request:
    """One half of the chats share long prefixes, the other differs from the first word on."""
    [act] = chance.choices(list(ACTS), list(ACTS.values()))
    if act == "embed":
        number = chance.randrange(INPUTS)
        text = " ".join(f"Gull {n} at sea." for n in range(4 + 10 * number))
        return Request(act, f"embedding {number}", {"model": MODEL, "input": text})
    case, number = chance.choice(list(CASES)), chance.randrange(NUMBERS)
    waves = " ".join(f"Wave {n} brings {(n * 7 + number % 4) % 31} shells." for n in range(WAVES))
    first, last = (f"Letter {number}. ", "") if number % 2 else ("", f" Letter {number}.")
    question = f"{first}{waves}{last} Which city lies at this sea? Tell me about its weather."
    return Request(act, f"{case} {number}", body(case, 7000 + number, question))


def _whole(live: LiveService, sent: dict[str, Any]) -> Answer:
    """The same as `ask`, not streamed."""
    answer = _post(live, "chat/completions", {**sent, "stream": False})
    return {choice["index"]: _flat(choice) for choice in answer["choices"]}


def _flat(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice["message"].get("tool_calls") or []
    entries = (choice.get("logprobs") or {}).get("content") or []
    return {
        "text": choice["message"].get("content") or "",
        "finish": choice["finish_reason"],
        "calls": [[call["function"]["name"], call["function"]["arguments"]] for call in calls],
        "tokens": [entry["token"] for entry in entries],
        "logprobs": [entry["logprob"] for entry in entries],
    }


def _embed(live: LiveService, sent: dict[str, Any]) -> list[float]:
    embedding: list[float] = _post(live, "embeddings", sent)["data"][0]["embedding"]
    return embedding


def _leave(live: LiveService, sent: dict[str, Any]) -> None:
    """Read a few lines, more of them with a greater seed, and go."""
    with (
        httpx.Client(timeout=120) as client,
        client.stream("POST", f"{live.url}/v1/chat/completions", json=sent) as response,
    ):
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
        for _ in zip(range(sent["seed"] % 12), response.iter_lines(), strict=False):
            pass


def _post(live: LiveService, path: str, sent: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{live.url}/v1/{path}", json=sent, timeout=300)
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(abs(a - b) <= 1e-5 for a, b in zip(one, other, strict=True))
    return same(one, other)


_ACTS: dict[str, Callable[[LiveService, dict[str, Any]], Any]] = {
    "stream": ask,
    "whole": _whole,
    "embed": _embed,
    "leave": _leave,
}
