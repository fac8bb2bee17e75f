"""The loop's actuator over a service that runs elsewhere: its load from /metrics, its replicas from
/status, and POST /machines to place them.

What arrived is what was served since the last look and what waits more than then: the service
counts a prompt when its first token is made and an answer as it is made.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from autoscale.loop.actuator import Service
from autoscale.loop.signals import RoleLoad
from cluster.clock import Clock

ROLES = ("decode", "prefill")
PROMPTS, ANSWERS = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
QUEUED = "sanderling_queued_tokens"
TTFT, TPOT = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
UP = "sanderling_service_status_up"


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics: sums by series' name, histograms' buckets by edge."""

    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]]

    def since(self, before: "Scrape", name: str) -> float:
        """How much a counter grew; from 0 where it began anew."""
        now, then = self.values.get(name, 0.0), before.values.get(name, 0.0)
        return now - then if now >= then else now

    def p90(self, before: "Scrape", name: str) -> float | None:
        """The upper edge of the bucket that the 90th percentile since then is in."""
        now, then = self.buckets.get(name, {}), before.buckets.get(name, {})
        if any(many < then.get(edge, 0.0) for edge, many in now.items()):
            then = {}  # the service began anew
        fresh = {edge: many - then.get(edge, 0.0) for edge, many in sorted(now.items())}
        total = max(fresh.values(), default=0.0)
        for edge, many in fresh.items():
            if total and many >= 0.9 * total and math.isfinite(edge):
                return edge
        return None


class Remote:
    """See autoscale.loop.actuator.Actuator. place_of: what the service calls a machine, "" where
    it cannot know it yet. key: of POST /machines."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        key: str,
        drain_s: float,
        clock: Clock,
        place_of: Callable[[str], str] = lambda machine: machine,
    ) -> None:
        self.client, self.key, self.drain_s, self.clock = client, key, drain_s, clock
        self.place_of = place_of
        self.machines: Callable[[], Iterable[str]] = lambda: ()
        self._before: Scrape | None = None

    async def signals(self) -> Service:
        text = (await self._answer("GET", "/metrics")).text
        status = (await self._answer("GET", "/status")).json()
        now = scrape(text)
        if not now.values.get(UP):
            raise ValueError("the service did not say its numbers this time")
        before, self._before = self._before or now, now
        names = {self.place_of(machine): machine for machine in self.machines()}
        placed = [
            (names.get(_place(e["replica_id"]), _place(e["replica_id"])), e)
            for e in status["replicas"]
        ]
        placed = [(machine, entry) for machine, entry in placed if machine]
        return Service(
            _load([entry for _, entry in placed], now, before),
            {machine: entry["role"] for machine, entry in placed},
            frozenset(machine for machine, e in placed if e["phase"] == "ready"),
            frozenset(machine for machine, e in placed if e["phase"] == "draining"),
            frozenset(machine for machine, e in placed if _idle(e)),
        )

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        places = [place for place in map(self.place_of, machine_ids) if place]
        body = {"role": role, "machines": places, "drain_s": self.drain_s}
        await self._answer("POST", "/machines", body)

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        place = self.place_of(machine_id)
        if place:
            left_s = max(0.0, deadline_s - self.clock.now_s())
            await self._answer("POST", "/machines/leave", {"machine": place, "deadline_s": left_s})

    async def yield_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"no training job {job!r} shares machines with this service")

    async def return_machine(self, job: str, machine_id: str) -> None:
        raise ValueError(f"no training job {job!r} shares machines with this service")

    async def _answer(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        answer = await self.client.request(method, path, json=body, headers=headers)
        answer.raise_for_status()
        return answer


def scrape(text: str) -> Scrape:
    """Sums over models and replicas."""
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                edges = buckets.setdefault(sample.name.removesuffix("_bucket"), {})
                edge = float(sample.labels["le"])
                edges[edge] = edges.get(edge, 0.0) + sample.value
            else:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Scrape(values, buckets)


def _load(entries: Sequence[Any], now: Scrape, before: Scrape) -> Mapping[str, RoleLoad]:
    """Prompts are prefill's where there is such a replica; all else is decode's."""
    queued = now.values.get(QUEUED, 0.0)
    waits_more = queued - before.values.get(QUEUED, 0.0)
    prompts = max(0, round(now.since(before, PROMPTS) + waits_more))
    answers, waiting = round(now.since(before, ANSWERS)), round(queued)
    first_s, token_s = now.p90(before, TTFT), now.p90(before, TPOT)
    if not any(entry["role"] == "prefill" for entry in entries):
        work = _work(entries, "decode")
        return {"decode": RoleLoad(prompts + answers, waiting, *work, first_s, token_s)}
    return {
        "decode": RoleLoad(answers, 0, *_work(entries, "decode"), None, token_s),
        "prefill": RoleLoad(prompts, waiting, *_work(entries, "prefill"), first_s),
    }


def _work(entries: Sequence[Any], role: str) -> tuple[int, float]:
    """Sequences under way, and the share of pages in use, over the replicas of a role."""
    stats = [e["state"]["stats"] for e in entries if e["role"] == role and e["state"]]
    used = [1 - (s["free_pages"] + s["evictable_pages"]) / s["pages"] for s in stats]
    return sum(s["running"] for s in stats), fmean(used) if used else 0.0


def _place(replica_id: str) -> str:
    """See serve.places."""
    return replica_id.partition(".")[2]


def _idle(entry: Any) -> bool:
    """As in served.py: one that drains is idle when it is gone."""
    if not entry["state"] or entry["phase"] == "draining":
        return False
    stats = entry["state"]["stats"]
    return not (stats["running"] or stats["waiting"] or stats["reserved"] or stats["held"])
