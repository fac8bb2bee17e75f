"""Which nodes a request goes through: each request gets a pipeline of its own, drawn at every node
by interleaved weighted round robin on the flow to the next ones; nodes whose KV cache is above its
high-water mark are passed over (Helix, ASPLOS 25, section 5)."""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from autoscale.placement.flow import SINK, SOURCE

Choice = TypeVar("Choice", bound=Hashable)


class InterleavedRoundRobin(Generic[Choice]):
    """Choices in proportion to weights, as evenly spread as can be: each draw pays every open
    choice its share of one turn and takes the one that is owed most, so after n draws a choice that
    was always open is less than one turn from n times its share times the number of choices."""

    def __init__(self, weights: Mapping[Choice, float]) -> None:
        self._weights = {choice: weight for choice, weight in weights.items() if weight > 0}
        self._owed = dict.fromkeys(self._weights, 0.0)

    def draw(self, closed: frozenset[Choice] = frozenset()) -> Choice | None:
        """The next choice that is not closed; None where all are. What is closed earns nothing
        meanwhile, so it is not flooded when it opens."""
        open_ = {c: weight for c, weight in self._weights.items() if c not in closed}
        total = sum(open_.values())
        if not open_:
            return None
        for choice, weight in open_.items():
            self._owed[choice] += weight / total
        taken = max(open_, key=lambda choice: self._owed[choice])
        self._owed[taken] -= 1.0
        return taken


class FlowRouter:
    """Pipelines for requests over a layout's flow.

    flow: of each (from, to) as `LayoutFlow.links` has it. kv_tokens: of each node, how many tokens'
    keys and values fit (none given: no limit). high_water: the share of them above which a node
    takes no new request."""

    def __init__(
        self,
        flow: Mapping[tuple[str, str], float],
        *,
        kv_tokens: Mapping[str, int] | None = None,
        high_water: float = 0.9,
    ) -> None:
        following: dict[str, dict[str, float]] = {}
        for (tail, head), tokens_per_s in flow.items():
            following.setdefault(tail, {})[head] = tokens_per_s
        self._turns = {tail: InterleavedRoundRobin(heads) for tail, heads in following.items()}
        self._following = following
        self._limit = {name: high_water * room for name, room in (kv_tokens or {}).items()}
        self._held = dict.fromkeys(self._limit, 0)

    def pipeline(self, tokens: int) -> list[str] | None:
        """The nodes of one request, in order, `tokens` reserved in each; None where every way is
        full, and nothing is reserved then. tokens: of prompt and expected answer."""
        closed = self._closed(tokens)
        path: list[str] = []
        at = SOURCE
        while at != SINK:
            turns = self._turns.get(at)
            taken = None if turns is None else turns.draw(closed)
            if taken is None:
                return None
            if taken != SINK:
                path.append(taken)
            at = taken
        for name in path:
            if name in self._held:
                self._held[name] += tokens
        return path

    def release(self, path: list[str], tokens: int) -> None:
        """The request that had `tokens` reserved on this path is over."""
        for name in path:
            if name in self._held:
                self._held[name] -= tokens

    def held_tokens(self, name: str) -> int:
        """Reserved on a node whose limit is known."""
        return self._held[name]

    def _closed(self, tokens: int) -> frozenset[str]:
        """Nodes that are full, and nodes from which only full ones can be reached."""
        closed = {name for name, held in self._held.items() if held + tokens > self._limit[name]}
        grown = True
        while grown:
            stuck = {
                tail
                for tail, heads in self._following.items()
                if tail not in closed and tail != SOURCE and all(head in closed for head in heads)
            }
            closed |= stuck
            grown = bool(stuck)
        return frozenset(closed)
