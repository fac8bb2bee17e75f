"""Prometheus metrics of the HTTP edge, under the names and buckets that vLLM's dashboards read.

Owns one registry per app (nothing module-global, so several apps may live in one process). What
only replicas know (queues, pages, prefix hits) is taken from the service's status at each scrape.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.clock import Clock

# Edges as in vLLM (vllm/v1/metrics/loggers.py), so that histogram_quantile panels line up.
TTFT_EDGES_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_EDGES_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_EDGES_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


@dataclass(frozen=True)
class StatusMetric:
    """A number of the service's status: how it is exported and what it says."""

    kind: Kind
    text: str
    prefix: str = "vllm:"


def _own(kind: Kind, text: str) -> StatusMetric:
    return StatusMetric(kind, text, "sanderling_")


STATUS_METRICS = {
    "num_requests_running": StatusMetric(GaugeMetricFamily, "Requests in the running batches."),
    "num_requests_waiting": StatusMetric(GaugeMetricFamily, "Requests waiting to be processed."),
    "kv_cache_usage_perc": StatusMetric(GaugeMetricFamily, "Used KV pages, 1 is all of them."),
    "prefix_cache_queries": StatusMetric(CounterMetricFamily, "Tokens looked up in prefix caches."),
    "prefix_cache_hits": StatusMetric(CounterMetricFamily, "Tokens found in prefix caches."),
    "num_preemptions": StatusMetric(CounterMetricFamily, "Sequences preempted by engines."),
    "requests_resumed": _own(CounterMetricFamily, "Times a request went on at another replica."),
    "replicas_lost": _own(CounterMetricFamily, "Replicas that died, hung or failed."),
    "replicas_drained": _own(CounterMetricFamily, "Replicas that were drained."),
    "placed_tokens": _own(GaugeMetricFamily, "Tokens of the requests that replicas have."),
    "queued_tokens": _own(GaugeMetricFamily, "Prompt tokens that wait for their first token."),
    "prefix_expected_tokens": _own(
        CounterMetricFamily, "Prompt tokens that routes were chosen for, believed cached there."
    ),
    "prefix_found_tokens": _own(
        CounterMetricFamily, "Prompt tokens of routed requests that a prefix cache really had."
    ),
    "leases": _own(GaugeMetricFamily, "Handed-off prompts whose receiver has not confirmed."),
    "handoff_bytes": _own(CounterMetricFamily, "KV bytes received by decode replicas."),
    "remote_prefills": _own(CounterMetricFamily, "Prompts computed by prefill replicas."),
    "local_prefills": _own(CounterMetricFamily, "Prompts computed by decode replicas."),
    "migrated_requests": _own(
        CounterMetricFamily, "Requests of drained replicas that went on from their KV."
    ),
    "migrated_failed": _own(
        CounterMetricFamily, "Requests whose KV was offered but could not be had in time."
    ),
    "migrated_tokens": _own(CounterMetricFamily, "Tokens whose KV crossed for such requests."),
    "migrated_bytes": _own(CounterMetricFamily, "KV bytes that crossed for such requests."),
    "migrated_recomputed_tokens": _own(
        CounterMetricFamily, "Tokens computed a second time after a request went on elsewhere."
    ),
}

# Per replica, from its engine's stats.
REPLICA_METRICS: dict[str, tuple[Kind, str]] = {
    "running": (GaugeMetricFamily, "Sequences in the running batch."),
    "waiting": (GaugeMetricFamily, "Sequences that wait for a turn."),
    "pages": (GaugeMetricFamily, "KV pages there are."),
    "free_pages": (GaugeMetricFamily, "KV pages that hold nothing."),
    "evictable_pages": (GaugeMetricFamily, "KV pages that only the prefix cache holds."),
    "prefix_hits_tokens": (CounterMetricFamily, "Prompt tokens found in the prefix cache."),
    "prompt_tokens": (CounterMetricFamily, "Prompt tokens computed."),
    "generated_tokens": (CounterMetricFamily, "Tokens generated."),
    "steps": (CounterMetricFamily, "Engine steps."),
}


def count_edges(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `largest`, vLLM's edges for counts of tokens."""
    edges = (m * 10**e for e in range(len(str(largest))) for m in (1, 2, 5))
    return [edge for edge in edges if edge <= largest] or [1]


class EdgeMetrics:
    """All series of one app, labelled with its model's name."""

    def __init__(self, model_name: str, context_tokens: int, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._model_name = model_name
        counts = count_edges(context_tokens)
        histogram, counter = self._histogram, self._counter
        self.ttft = histogram("time_to_first_token_seconds", TTFT_EDGES_S)
        self.decode = histogram("request_decode_time_seconds", REQUEST_EDGES_S)
        self.per_token = histogram("request_time_per_output_token_seconds", INTER_TOKEN_EDGES_S)
        self.inter_token = histogram("inter_token_latency_seconds", INTER_TOKEN_EDGES_S)
        self.latency = histogram("e2e_request_latency_seconds", REQUEST_EDGES_S)
        self.prompt_length = histogram("request_prompt_tokens", counts)
        self.answer_length = histogram("request_generation_tokens", counts)
        self.max_tokens = histogram("request_params_max_tokens", counts)
        self.n = histogram("request_params_n", [1, 2, 5, 10, 20])
        self.prompt_tokens = counter("prompt_tokens")
        self.generation_tokens = counter("generation_tokens")
        finished = ["model_name", "finished_reason"]
        name = "vllm:request_success"
        self._finished = Counter(name, "Requests by end.", finished, registry=self.registry)
        name = "sanderling_requests_refused"
        labels = ["model_name", "status", "code"]
        self._refused = Counter(name, "Error answers.", labels, registry=self.registry)
        name = "sanderling_requests_open"
        gauge = Gauge(name, "Requests at the service.", ["model_name"], registry=self.registry)
        self.open = gauge.labels(model_name)

    def _histogram(self, name: str, edges: Any) -> Histogram:
        text = f"As vLLM's {name}."
        series = Histogram(
            f"vllm:{name}", text, ["model_name"], buckets=edges, registry=self.registry
        )
        return series.labels(self._model_name)

    def _counter(self, name: str) -> Counter:
        text = f"As vLLM's {name}."
        series = Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry)
        return series.labels(self._model_name)

    def finished(self, reason: str) -> None:
        """Count the end of a request: stop, length, abort or error."""
        self._finished.labels(self._model_name, reason).inc()

    def refused(self, status: int, code: str | None = None) -> None:
        """Count an error answer, by OpenAI's code where it has one."""
        self._refused.labels(self._model_name, str(status), code or "").inc()

    def exposition(self, status: Mapping[str, Any] | None) -> bytes:
        """The text of /metrics. status: the service's, None when it could not be had."""
        snapshot = CollectorRegistry()
        snapshot.register(_Snapshot(self._model_name, status))
        return generate_latest(self.registry) + generate_latest(snapshot)


class _Snapshot(Collector):
    """The service's own numbers at one moment."""

    def __init__(self, model_name: str, status: Mapping[str, Any] | None) -> None:
        self._model_name = model_name
        self._known = status is not None
        self._numbers: Mapping[str, float] = (status or {}).get("metrics", {})
        self._replicas: list[Mapping[str, Any]] = (status or {}).get("replicas", [])

    def collect(self) -> Iterator[Metric]:
        text = "1 when the service answered this scrape, 0 when its numbers are missing."
        yield GaugeMetricFamily("sanderling_service_status_up", text, float(self._known))
        for name, metric in STATUS_METRICS.items():
            if name in self._numbers:
                family = metric.kind(metric.prefix + name, metric.text, labels=["model_name"])
                family.add_metric([self._model_name], float(self._numbers[name]))
                yield family
        yield from self._per_replica()

    def _per_replica(self) -> Iterator[Metric]:
        """A replica's counters begin at 0 with it; its name is never given again."""
        heard = [entry for entry in self._replicas if entry["state"] is not None]
        for name, (kind, text) in REPLICA_METRICS.items():
            labels = ["model_name", "role", "replica"]
            family = kind(f"sanderling_replica_{name}", text, labels=labels)
            for entry in heard:
                values = [self._model_name, entry["role"], entry["replica_id"]]
                family.add_metric(values, float(entry["state"]["stats"][name]))
            if heard:
                yield family


class RequestMetrics:
    """The measurements of one request, from its admission to its close. Calls come in order."""

    def __init__(
        self,
        metrics: EdgeMetrics,
        prompt_tokens: int,
        max_tokens: int,
        choices: int = 1,
        request_id: str = "",
    ) -> None:
        self._metrics = metrics
        self.prompt_tokens = prompt_tokens
        self.request_id = request_id
        self.tokens = 0
        self.ttft_s: float | None = None
        self.reason = "abort"
        self.prompt_counted = False  # by another choice of the same prompt
        self._started_s = self._last_s = metrics.clock.now_s()
        metrics.max_tokens.observe(max_tokens)
        metrics.n.observe(choices)
        metrics.open.inc()

    @property
    def started_s(self) -> float:
        """When it was admitted, by the metrics' clock."""
        return self._started_s

    @property
    def last_s(self) -> float:
        """When its last delta arrived; before the first one, when it was admitted."""
        return self._last_s

    def delta(self, tokens: int) -> None:
        """A delta arrived: the first one, or another step of the decode."""
        now_s = self._metrics.clock.now_s()
        if self.ttft_s is None:
            self.ttft_s = now_s - self._started_s
            self._metrics.ttft.observe(self.ttft_s)
            self._metrics.prompt_tokens.inc(0 if self.prompt_counted else self.prompt_tokens)
        else:
            self._metrics.inter_token.observe(now_s - self._last_s)
        self._last_s = now_s
        self.tokens += tokens
        self._metrics.generation_tokens.inc(tokens)

    def ended(self, reason: str) -> None:
        """Why generation ended; without it the client left, and the reason is abort."""
        self.reason = reason

    def closed(self) -> None:
        """The request is over. Call once."""
        now_s = self._metrics.clock.now_s()
        self._metrics.latency.observe(now_s - self._started_s)
        if self.ttft_s is not None:
            decode_s = self._last_s - self._started_s - self.ttft_s
            self._metrics.decode.observe(decode_s)
            if self.tokens > 1:
                self._metrics.per_token.observe(decode_s / (self.tokens - 1))
        self._metrics.prompt_length.observe(self.prompt_tokens)
        self._metrics.answer_length.observe(self.tokens)
        self._metrics.finished(self.reason)
        self._metrics.open.dec()
