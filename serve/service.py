"""What the HTTP edge needs from whatever makes tokens: the seam to the ingress.

http.py calls it and nothing else; the ingress implements it over replicas, the tests by a script.
"""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from serve.engine.sequence import Delta, Request


class Service(Protocol):
    """A source of tokens. Any number of calls may be under way at once on one event loop."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, in order; the last one, and only it, has `finish` set.

        Raises RequestError (429, 503, …) before the first delta when the request can't be taken.
        `aclose()`, or cancelling the task that awaits the next delta, aborts the request: work
        stops and pages become free. A trouble after the first delta is a RequestError or a last
        delta with finish "error".
        """
        ...

    async def probe(self) -> bool:
        """True when a token can be made now, not merely when a process is up."""
        ...

    async def status(self) -> dict[str, Any]:
        """Replicas, queues, pages, counters, as plain JSON values.

        The key "metrics" maps the names of `observe.STATUS_METRICS` to numbers over all
        replicas (kv_cache_usage_perc is a fraction, 0 to 1); an absent name is not exported.
        """
        ...
