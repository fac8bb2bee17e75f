"""The edge's metrics: vLLM's names and edges, and numbers that follow what happened."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from cluster.clock import VirtualClock
from serve.observe import STATUS_METRICS, EdgeMetrics, RequestMetrics, count_edges

Samples = dict[tuple[str, str], float]


def samples(text: bytes) -> Samples:
    """(sample name, its label besides the model's) -> value."""
    read: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert family.name.startswith("sanderling_service") or labels.pop("model_name") == "m"
            read[sample.name, ",".join(labels.values())] = sample.value
    return read


async def one_request(edge: EdgeMetrics, clock: VirtualClock) -> None:
    request = RequestMetrics(edge, 7, 50)
    await clock.advance(0.05)
    request.delta(1)
    await clock.advance(0.3)
    request.delta(2)
    request.ended("stop")
    await clock.advance(1.0)
    request.closed()


def test_a_request_is_measured():
    clock = VirtualClock()
    edge = EdgeMetrics("m", 1000, clock)
    asyncio.run(one_request(edge, clock))
    read = samples(edge.exposition({}))
    assert read["vllm:time_to_first_token_seconds_sum", ""] == 0.05
    assert read["vllm:time_to_first_token_seconds_bucket", "0.04"] == 0
    assert read["vllm:time_to_first_token_seconds_bucket", "0.06"] == 1
    assert round(read["vllm:inter_token_latency_seconds_sum", ""], 6) == 0.3
    assert read["vllm:e2e_request_latency_seconds_bucket", "1.5"] == 1
    assert read["vllm:prompt_tokens_total", ""] == 7
    assert read["vllm:generation_tokens_total", ""] == 3
    assert read["vllm:request_generation_tokens_sum", ""] == 3
    assert read["vllm:request_params_max_tokens_bucket", "50.0"] == 1
    assert read["vllm:request_success_total", "stop"] == 1
    assert read["sanderling_requests_open", ""] == 0


def test_a_request_that_nobody_ended_was_aborted():
    edge = EdgeMetrics("m", 1000, VirtualClock())
    request = RequestMetrics(edge, 7, 50)
    assert samples(edge.exposition({}))["sanderling_requests_open", ""] == 1
    request.closed()
    assert samples(edge.exposition({}))["vllm:request_success_total", "abort"] == 1


def test_time_to_first_token_has_vllms_22_edges():
    read = samples(EdgeMetrics("m", 10, VirtualClock()).exposition({}))
    edges = [e for name, e in read if name == "vllm:time_to_first_token_seconds_bucket"]
    assert len(edges) == 22 + 1
    assert (edges[0], edges[-2], edges[-1]) == ("0.001", "2560.0", "+Inf")


def test_the_services_numbers_are_exported_as_they_are():
    edge = EdgeMetrics("m", 10, VirtualClock())
    numbers = {name: float(at) for at, name in enumerate(STATUS_METRICS, start=1)}
    read = samples(edge.exposition({"metrics": numbers}))
    assert read["vllm:num_requests_running", ""] == 1
    assert read["vllm:prefix_cache_queries_total", ""] == 4
    assert read["sanderling_service_status_up", ""] == 1


def test_numbers_that_are_missing_are_not_invented():
    edge = EdgeMetrics("m", 10, VirtualClock())
    read = samples(edge.exposition(None))
    assert ("vllm:num_requests_running", "") not in read
    assert read["sanderling_service_status_up", ""] == 0


def test_two_apps_in_one_process_count_apart():
    first, second = (EdgeMetrics("m", 10, VirtualClock()) for _ in range(2))
    first.refused(404, "unknown_url")
    assert (
        samples(first.exposition({}))["sanderling_requests_refused_total", "unknown_url,404"] == 1
    )
    assert ("sanderling_requests_refused_total", "unknown_url,404") not in samples(
        second.exposition({})
    )


def test_edges_for_counts():
    assert count_edges(100) == [1, 2, 5, 10, 20, 50, 100]
    assert count_edges(8192)[-1] == 5000
    assert count_edges(1) == [1]
