"""Which replica takes a request: pure functions of what the caller knows of the replicas.

Called by the ingress for decode and by decode for prefill. Prefix affinity, links and prices are
further terms of the same key.
"""

from collections.abc import Mapping, Sequence


def least_loaded(replica_ids: Sequence[str], load_tokens: Mapping[str, int]) -> str | None:
    """The replica with the fewest tokens outstanding, by name among equals; None without any."""
    return min(replica_ids, key=lambda r: (load_tokens.get(r, 0), r), default=None)
