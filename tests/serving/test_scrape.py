"""/metrics under real traffic in one process: names, types, labels, growth; and the dashboard."""

import asyncio
import json
import re
from pathlib import Path
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.settings import Settings
from serve.http import EdgeSettings, build_app
from serve.local import LocalService
from serve.observe import REPLICA_METRICS
from tests.serving import tiny

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "sanderling.json"
COUNTERS = (
    *("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success"),
    *("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions"),
    *("sanderling_requests_resumed", "sanderling_replicas_lost", "sanderling_replicas_drained"),
    *("sanderling_handoff_bytes", "sanderling_remote_prefills", "sanderling_local_prefills"),
    "sanderling_requests_refused",
)
GAUGES = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("sanderling_leases", "sanderling_placed_tokens", "sanderling_requests_open"),
)
HISTOGRAMS = (
    *("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"),
    *("vllm:e2e_request_latency_seconds", "vllm:request_decode_time_seconds"),
    *("vllm:request_time_per_output_token_seconds", "vllm:request_prompt_tokens"),
    *("vllm:request_generation_tokens", "vllm:request_params_max_tokens", "vllm:request_params_n"),
)


class Scrape(NamedTuple):
    """One reading of /metrics: families' types, and every sample by name and labels."""

    kinds: dict[str, str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def total(self, name: str) -> float:
        return sum(value for (known, _), value in self.samples.items() if known == name)

    def labels(self, name: str) -> set[frozenset[str]]:
        return {frozenset(k for k, _ in pairs) for known, pairs in self.samples if known == name}


def read(text: str) -> Scrape:
    families = list(text_string_to_metric_families(text))
    assert len({f.name for f in families}) == len(families), "a family is there twice"
    samples = {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}
    return Scrape({f.name: f.type for f in families}, samples)


async def wait_until_ready(service: LocalService, decode: int) -> None:
    """Until so many decode replicas are ready and everybody's counters were heard."""
    async with asyncio.timeout(tiny.DEADLINE_S):
        while len(service.ingress.directory.ready("decode")) < decode:
            await asyncio.sleep(0.02)


async def scrapes() -> list[Scrape]:
    """Before traffic, after it, and after a decode replica was lost and replaced."""
    sections = {
        "engine": {"page_tokens": 4, "kv_tokens": 2048},
        "handoff": {"min_tokens": 8},
        "controller": {"period_s": 0.05},
    }
    model, six = tiny.random_model(), {"max_tokens": 6, "ignore_eos": True}
    async with LocalService(Settings.model_validate(sections), model) as service:
        app = build_app(service.ingress, model.text, EdgeSettings(model="m"))
        transport = httpx.ASGITransport(app)
        await wait_until_ready(service, 1)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            found = [read((await client.get("/metrics")).text)]
            for _ in range(3):
                body = {"model": "m", "prompt": "a prompt worth a hand-off, and again" * 2}
                answer = await client.post("/v1/completions", json={**body, **six})
                assert answer.status_code == 200, answer.text
            await client.post("/v1/completions", json={"model": "other", "prompt": "x"})
            await asyncio.sleep(0.3)  # a few pings, which carry the counters
            found.append(read((await client.get("/metrics")).text))
            service.launcher.kill(service.ingress.directory.ready("decode")[0].replica_id)
            async with asyncio.timeout(tiny.DEADLINE_S):
                while not service.ingress.events.lost:
                    await asyncio.sleep(0.02)
            await wait_until_ready(service, 1)
            found.append(read((await client.get("/metrics")).text))
    return found


def test_names_types_labels_and_growth():
    before, after, later = asyncio.run(scrapes())
    for names, kind in ((COUNTERS, "counter"), (GAUGES, "gauge"), (HISTOGRAMS, "histogram")):
        assert {name: after.kinds.get(name) for name in names} == dict.fromkeys(names, kind)
    for older, newer in ((before, after), (after, later)):
        for name in COUNTERS:
            assert older.total(f"{name}_total") <= newer.total(f"{name}_total"), name
    for name in ("handoff_bytes", "remote_prefills", "requests_refused"):
        assert after.total(f"sanderling_{name}_total") > 0, name
    assert after.total("vllm:generation_tokens_total") == 18
    assert after.total("vllm:prefix_cache_hits_total") > 0
    assert (after.total("sanderling_replicas_lost_total"), later.kinds) == (0, after.kinds)
    assert later.total("sanderling_replicas_lost_total") == 1
    for name, (_, _text) in REPLICA_METRICS.items():
        found = after.labels(f"sanderling_replica_{name}") | after.labels(
            f"sanderling_replica_{name}_total"
        )
        assert found == {frozenset({"model_name", "role", "replica"})}, name
    assert expressions_without(after) == set()


def expressions_without(scrape: Scrape) -> set[str]:
    """Names in the dashboard's expressions that the exposition does not have."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    expressions = " ".join(t["expr"] for panel in panels for t in panel["targets"])
    names = set(re.findall(r"\b(?:vllm:|sanderling_)\w+", expressions))
    assert len(names) > 15
    return names - {name for name, _ in scrape.samples}


def test_a_metric_that_is_missing_is_noticed():
    assert "sanderling_leases" in expressions_without(Scrape({}, {}))


def test_the_dashboard_can_be_imported():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert board["uid"] == "sanderling" and board["schemaVersion"] >= 36
    assert [v["type"] for v in board["templating"]["list"]] == ["datasource"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    sources = {t["datasource"]["uid"] for panel in board["panels"] for t in panel["targets"]}
    assert sources == {"${datasource}"}
