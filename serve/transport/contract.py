"""The contract of a transport, and what it moves. Imported by every transport and both replicas."""

from dataclasses import dataclass
from typing import Any, Protocol

from serve.engine.sequence import TokenLogprob
from serve.kv.device import Storage


class HandoffLost(Exception):
    """What was offered is no longer there (lease run out, sender gone). The receiver computes the
    prompt itself or asks another replica; nothing of the offer has been used."""


@dataclass(frozen=True)
class Offer:
    """KV of positions [start_tokens, stop_tokens) of one sequence, lent until its lease ends.

    pages: the sender's pages for those positions, start_tokens being the first slot of the first.
    generations: of each page when it was lent; a page given to somebody else has a newer one.
    kv_format: how the sender's pages store keys and values (kernels.kv_formats).
    payload: the bytes themselves where the transport sends by value, else None.
    """

    lease_id: str
    transport: str
    segment: str
    pages: tuple[int, ...]
    generations: tuple[int, ...]
    start_tokens: int
    stop_tokens: int
    kv_format: str
    payload: Any = None

    @property
    def tokens(self) -> int:
        return self.stop_tokens - self.start_tokens


@dataclass(frozen=True)
class PrefillReply:
    """The token that follows the prompt, and the offer of the KV that the caller lacks.

    cached_tokens: leading tokens that this replica had in its prefix cache. logprob: of the token,
    where the request asks for it.
    """

    token: int
    cached_tokens: int
    offer: Offer
    logprob: TokenLogprob | None = None


def check_format(offer: Offer, storage: Storage) -> None:
    """ValueError where an offer's bytes mean something else than the receiver's."""
    if offer.kv_format != storage.kv_format:
        raise ValueError(
            f"the sender's pages are in {offer.kv_format}, ours in {storage.kv_format}; "
            "engine.kv_dtype must be equal for prefill and decode"
        )


class Transport(Protocol):
    """Stateless but for cached mappings. An offer of no tokens is valid and moves 0 bytes."""

    name: str

    def offer(
        self, lease_id: str, storage: Storage, pages: list[int], start_tokens: int, stop: int
    ) -> Offer:
        """Sender: describe (or copy out) the KV of positions [start_tokens, stop) held in `pages`.

        The pages stay the sender's and must not change until the lease is released or expires.
        """
        ...

    def fetch(self, offer: Offer, storage: Storage, pages: list[int]) -> int:
        """Receiver: copy an offer into `pages` of its own storage; returns the bytes copied, which
        are tokens * storage.token_bytes.

        HandoffLost when any lent page changed hands before the copy ended. ValueError when the two
        storages differ in shape or format.
        """
        ...

    def close(self) -> None:
        """Drop cached mappings; idempotent."""
        ...
