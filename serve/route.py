"""Which replica takes a request: pure functions of what the caller knows of the replicas.

Called by the ingress for decode and by decode for prefill. Everything is counted in tokens to be
computed, so that a cached prefix and a short queue can be weighed against each other.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serve.engine.cost import StepCost


class Choice(NamedTuple):
    """A replica, the tokens of the prompt it should have cached, and the cost of the others."""

    replica_id: str
    cached_tokens: int
    prefill_cost: float


def cheapest(
    replica_ids: Sequence[str],
    load_tokens: Mapping[str, int],
    cached_tokens: Mapping[str, int],
    prompt_tokens: int,
    cost: StepCost,
) -> Choice | None:
    """The replica that would be done with the prompt first; None without any.

    What is ahead in its queue plus what it has to compute itself: a popular prefix draws requests
    to its replica until the queue there costs more than computing the prefix elsewhere. Among
    equals the less loaded, then by name.
    """
    choices = []
    for replica_id in replica_ids:
        cached = min(cached_tokens.get(replica_id, 0), prompt_tokens)
        choices.append(Choice(replica_id, cached, cost.of(cached, prompt_tokens)))
    return min(
        choices,
        key=lambda c: (
            load_tokens.get(c.replica_id, 0) + c.prefill_cost,
            load_tokens.get(c.replica_id, 0),
            c.replica_id,
        ),
        default=None,
    )
