"""What the replicas report, summed for /metrics: called by the ingress with its directory."""

from serve.directory import Directory


def summary(directory: Directory) -> dict[str, float]:
    """Gauges and counters over all replicas, by the names of serve.observe.STATUS_METRICS.

    Running and waiting count decode replicas (they own requests); KV use is of the fullest decode
    replica, since that is the one that will preempt next.
    """
    states = [e.state for e in directory.entries if e.state is not None]
    decode = [s.stats for s in states if s.role == "decode"]
    everyone = [s.stats for s in states]
    used = [1 - (s.free_pages + s.evictable_pages) / s.pages for s in decode]
    return {
        "num_requests_running": float(sum(s.running for s in decode)),
        "num_requests_waiting": float(sum(s.waiting + s.reserved for s in decode)),
        "kv_cache_usage_perc": max(used, default=0.0),
        "prefix_cache_queries": float(sum(s.prefix_queries_tokens for s in everyone)),
        "prefix_cache_hits": float(sum(s.prefix_hits_tokens for s in everyone)),
        "num_preemptions": float(sum(s.preemptions for s in everyone)),
    }
