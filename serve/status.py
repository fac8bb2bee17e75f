"""What the replicas report, summed for /metrics: called by the ingress with its directory.

Counters never fall: what a replica had counted when it was last heard of stays in the sums after
it is gone, since a sum that falls would be read as a restart and counted again.
"""

from serve.directory import Directory
from serve.state import ReplicaState


class Totals:
    """Counters over every replica that an ingress has known."""

    def __init__(self) -> None:
        self._gone: dict[str, float] = {}
        self._present: dict[str, dict[str, float]] = {}

    def update(self, directory: Directory) -> None:
        """Take in a newer directory."""
        for entry in directory.entries:
            if entry.state is not None:
                self._present[entry.replica_id] = _counters(entry.state)
        for replica_id in set(self._present) - {e.replica_id for e in directory.entries}:
            for name, value in self._present.pop(replica_id).items():
                self._gone[name] = self._gone.get(name, 0.0) + value

    def counters(self) -> dict[str, float]:
        """Sums by the names of serve.observe.STATUS_METRICS; empty before the first state."""
        sums = dict(self._gone)
        for counters in self._present.values():
            for name, value in counters.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums


def gauges(directory: Directory) -> dict[str, float]:
    """What is so now, by the names of serve.observe.STATUS_METRICS.

    Running and waiting count decode replicas (they own requests); KV use is of the fullest decode
    replica, since that is the one that will preempt next.
    """
    states = [e.state for e in directory.entries if e.state is not None]
    decode = [s.stats for s in states if s.role == "decode"]
    used = [1 - (s.free_pages + s.evictable_pages) / s.pages for s in decode]
    return {
        "num_requests_running": float(sum(s.running for s in decode)),
        "num_requests_waiting": float(sum(s.waiting + s.reserved for s in decode)),
        "kv_cache_usage_perc": max(used, default=0.0),
        "leases": float(sum(s.leases for s in states)),
    }


def _counters(state: ReplicaState) -> dict[str, float]:
    stats = state.stats
    return {
        "prefix_cache_queries": float(stats.prefix_queries_tokens),
        "prefix_cache_hits": float(stats.prefix_hits_tokens),
        "num_preemptions": float(stats.preemptions),
        "handoff_bytes": float(state.handed_bytes),
        "remote_prefills": float(state.remote_prefills),
        "local_prefills": float(state.local_prefills),
        "migrated_requests": float(state.migrated.requests),
        "migrated_failed": float(state.migrated.failed),
        "migrated_tokens": float(state.migrated.tokens),
        "migrated_bytes": float(state.migrated.bytes),
        "migrated_recomputed_tokens": float(stats.recomputed_tokens),
    }
