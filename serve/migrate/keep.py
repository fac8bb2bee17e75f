"""Which pages of a sequence a KV policy would keep: what has to cross when it moves.

Only "all" exists: no page of a live sequence is ever given up today, so what a policy keeps is the
raw pages and the plan has no way of its own for it. A policy that evicts tokens names what it would
keep here, and its pages become the way "kept".
"""

from typing import Protocol

from cluster.registry import Registry

KEEP_POLICIES = Registry("migrate.keep", {"all": "serve.migrate.keep:KeepAll"})


class KeepPolicy(Protocol):
    """What would still be there after eviction."""

    def kept_tokens(self, tokens: int) -> int:
        """How many of a sequence's `tokens` tokens keep their KV; `tokens` when it is all."""
        ...


class KeepAll:
    """Nothing is evicted."""

    def kept_tokens(self, tokens: int) -> int:
        return tokens


def open_policy(name: str) -> KeepPolicy:
    """The policy of that name; ValueError names the known ones."""
    policy: KeepPolicy = KEEP_POLICIES.load(name)()
    return policy
