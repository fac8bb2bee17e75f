"""The actuator over HTTP reads what the service says of itself and asks for what the loop wants."""

import asyncio
from typing import Any

import httpx
import pytest

from autoscale.providers.remote import Remote, scrape
from cluster.clock import VirtualClock
from serve.observe import EdgeMetrics, RequestMetrics
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.served import KEY, Served
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import group, install

STATUS = {
    "metrics": {"queued_tokens": 40.0},
    "replicas": [],
}


def test_metrics_of_the_product_are_understood():
    """Over the edge's own exposition: counts, what waits, the bucket of the 90th percentile."""
    clock = VirtualClock()
    edge = EdgeMetrics("m", 4096, clock)
    before = scrape(edge.exposition({**STATUS, "metrics": {"queued_tokens": 0.0}}).decode())

    async def serve() -> None:
        for number in range(20):
            request = RequestMetrics(edge, 100, 50)
            await clock.advance(0.3 if number < 17 else 4.0)
            request.delta(1)
            await clock.advance(0.03)
            request.delta(4)
            request.ended("stop")
            request.closed()

    asyncio.run(serve())
    now = scrape(edge.exposition(STATUS).decode())
    assert now.since(before, "vllm:prompt_tokens_total") == 2000
    assert now.since(before, "vllm:generation_tokens_total") == 100
    assert now.values["sanderling_queued_tokens"] == 40
    assert now.p90(before, "vllm:time_to_first_token_seconds") == 5.0
    assert now.p90(before, "vllm:inter_token_latency_seconds") in (0.05, 0.025)
    assert now.p90(now, "vllm:time_to_first_token_seconds") is None
    assert now.since(scrape("vllm:prompt_tokens_total 9999"), "vllm:prompt_tokens_total") == 2000


def test_replicas_are_placed_drained_and_seen_by_their_machines():
    async def work(served: Served, remote: Remote, names: list[str]) -> None:
        machines = {name: f"m-{name}" for name in names}
        remote.place_of = lambda machine: machine.removeprefix("m-")
        remote.machines = machines.values
        first = await remote.signals()
        assert first.roles == {} and first.load["decode"].arrived_tokens == 0
        await remote.set_replicas("decode", list(machines.values()))
        assert set((await remote.signals()).roles) == set(machines.values())
        clock.time_s += 30
        seen = await remote.signals()
        assert seen.ready == set(machines.values()) and seen.load["decode"].arrived_tokens == 3000
        assert seen.load["decode"].running == 2
        assert seen.load["decode"].kv_used == pytest.approx(0.2)
        await remote.drain(f"m-{names[0]}", clock.time_s + 5)
        assert (await remote.signals()).draining == {f"m-{names[0]}"}
        remote.key = "wrong"
        with pytest.raises(httpx.HTTPStatusError):
            await remote.set_replicas("decode", [])

    class Clock:
        time_s = 1_800_000_000.0

        def now_s(self) -> float:
            return self.time_s

        async def sleep(self, duration_s: float) -> None:
            raise AssertionError("nobody waits")

    clock = Clock()

    async def all_of_it(served: Served, names: list[str]) -> None:
        transport = httpx.ASGITransport(app=served.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
            await work(served, Remote(client, KEY, 20.0, clock), names)

    double = Double()
    double.store.now_s = clock.now_s
    with double:
        cluster = Cluster(double.store, Cloud(startup_s=0.0))
        install(double, group("g", "spot", 4, 1.0, replicas=2))
        cluster.tick()
        names: list[Any] = [pod["metadata"]["name"] for pod in cluster.workers("g")]
        asyncio.run(all_of_it(Served(cluster), names))
