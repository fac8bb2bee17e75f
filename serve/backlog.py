"""What waits for its first token: how much may, whose turn it is, and when to come back.

A cap on waiting prompt tokens and requests, shared among the tenants that have work waiting: over
it, a tenant within its share is still let in, one beyond it gets a 429 with the time that the
excess takes at the prefill rate measured here. Turns are start tags of start-time fair queueing
(Goyal et al., 1996), by which the engine orders prompts of one priority, so that a tenant's few
requests do not stand behind another's many. One per ingress; plain, no I/O.
"""

from collections import Counter, deque

from cluster.clock import Clock
from serve.engine.sequence import Request
from serve.errors import RequestError

SAMPLES = 64  # prompts whose times make the prefill rate
UNMEASURED_RETRY_S = 5.0
LONGEST_RETRY_S = 600.0


class Backlog:
    """Counts waiting work by tenant. `enter`, then `started` at the first token, then `leave`."""

    def __init__(self, max_tokens: int, max_requests: int, clock: Clock) -> None:
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.clock = clock
        self.refused = 0
        self.turns = Turns()
        self._waiting: dict[str, tuple[Request, float]] = {}
        self._tokens: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES)
        self._mark_s = 0.0

    @property
    def tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._tokens.total()

    @property
    def requests(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Measured over the last prompts, counting only time in which something waited."""
        spent_s = sum(took_s for took_s, _ in self._samples)
        return sum(tokens for _, tokens in self._samples) / spent_s if spent_s > 0 else None

    def report(self) -> dict[str, float | None]:
        """What waits, as plain JSON values."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "refused": self.refused,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
        }

    def enter(self, request: Request) -> float:
        """Let a request wait, and return its turn; RequestError 429 when too much waits."""
        tenant, tokens = request.cache_key.salt, cost_tokens(request)
        if self._waiting and not self._fits(tenant, request.share, tokens):
            self.refused += 1
            raise self._full(tokens)
        if not self._waiting:
            self._mark_s = self.clock.now_s()
        turn = self.turns.take(tenant, request.share, tokens)
        self._waiting[request.request_id] = (request, turn)
        self._tokens[tenant] += tokens
        self._requests[tenant] += 1
        return turn

    def started(self, request_id: str, cached_tokens: int) -> None:
        """The first token is there. Once per request; later calls change nothing."""
        entry = self._waiting.get(request_id)
        if entry is None:
            return
        now_s = self.clock.now_s()
        computed = max(cost_tokens(entry[0]) - cached_tokens, 0)
        self._samples.append((now_s - self._mark_s, computed))
        self._mark_s = now_s
        self.turns.reached(entry[1])
        self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """The request waits no longer, whatever became of it. Idempotent."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return
        request, _ = entry
        tenant = request.cache_key.salt
        self._tokens[tenant] -= cost_tokens(request)
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._tokens[tenant], self._requests[tenant]

    def _fits(self, tenant: str, share: float, tokens: int) -> bool:
        """Whether all fits, or the tenant stays within its part of the cap."""
        fits = self.tokens + tokens <= self.max_tokens and self.requests < self.max_requests
        if fits:
            return True
        shares = {r.cache_key.salt: r.share for r, _ in self._waiting.values()}
        part = share / sum((shares | {tenant: share}).values())
        if part == 1.0:  # nobody else waits
            return False
        within = self._tokens[tenant] + tokens <= part * self.max_tokens
        return within and self._requests[tenant] + 1 <= part * self.max_requests

    def _full(self, tokens: int) -> RequestError:
        rate = self.prefill_tokens_per_s
        excess = max(self.tokens + tokens - self.max_tokens, tokens)
        retry_s = excess / rate if rate else UNMEASURED_RETRY_S
        text = (
            f"{self.requests} requests with {self.tokens} prompt tokens are waiting already; at "
            f"most {self.max_requests} and {self.max_tokens} may. Try again later."
        )
        retry_s = min(max(retry_s, 1.0), LONGEST_RETRY_S)
        return RequestError(429, "rate_limit_error", None, text, "queue_full", retry_s)


class Turns:
    """Virtual time in tokens: who asked for little so far comes before who asked for much."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def take(self, tenant: str, share: float, tokens: int) -> float:
        """The next turn of a tenant, for so many tokens."""
        start = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens / share
        return start

    def reached(self, turn: float) -> None:
        """Work of this turn has been done: nobody new starts before it."""
        self._now = max(self._now, turn)
        self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}


def cost_tokens(request: Request) -> int:
    """Prompt tokens to compute, at most; a further choice of a prompt computes one."""
    further = request.group and request.group != request.request_id
    return 1 if further else len(request.prompt)
