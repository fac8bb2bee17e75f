"""What the caller placed where: for each replica, hashes of the prompt pages it was sent.

A hash stands for a whole page and for all before it, under one cache key, so tenants never see each
other's prefixes. It is a guess about the replica's cache and may be wrong either way; that costs
time, never a token. A replica is remembered for as many pages as it can hold, least recently
placed first to go. Called by the ingress of decode replicas, and by a decode replica of prefill
replicas. No torch.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from cluster.settings import Settings
from serve.kv.prefix import CacheKey

HASH_BYTES = 16  # a collision sends a request to a worse replica, nothing more


def page_hashes(key: CacheKey, tokens: Sequence[int], page_tokens: int) -> list[bytes]:
    """One hash for each whole page, chained; the page of the last token is never cached whole."""
    data = array("q", tokens).tobytes()
    size = page_tokens * 8
    chain = blake2b(repr(tuple(key)).encode(), digest_size=HASH_BYTES).digest()
    hashes = []
    for page in range(max(len(tokens) - 1, 0) // page_tokens):
        here = data[page * size : (page + 1) * size]
        chain = blake2b(here, key=chain, digest_size=HASH_BYTES).digest()
        hashes.append(chain)
    return hashes


@dataclass
class Guesses:
    """Placements with a known prefix and without, and over all requests whose first token came:
    prompt tokens that were believed cached at the replica chosen, and that a cache there had."""

    hit: int = 0
    miss: int = 0
    expected_tokens: int = 0
    found_tokens: int = 0

    def placed(self, cached_tokens: int) -> None:
        """A request was placed where so much of it was believed cached."""
        self.hit += cached_tokens > 0
        self.miss += cached_tokens == 0

    def found(self, expected_tokens: int, cached_tokens: int) -> None:
        """Its first token came, and said what had been cached."""
        self.expected_tokens += expected_tokens
        self.found_tokens += cached_tokens


class PlacedPrefixes:
    """The pages placed on each replica, at most `pages` for each; with 0 every look is a miss."""

    def __init__(self, page_tokens: int, pages: int) -> None:
        self.page_tokens = page_tokens
        self.pages = pages
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def hashes(self, key: CacheKey, tokens: Sequence[int]) -> list[bytes]:
        """See `page_hashes`; none when nothing is remembered."""
        return page_hashes(key, tokens, self.page_tokens) if self.pages else []

    def cached_tokens(self, replica_id: str, hashes: Sequence[bytes]) -> int:
        """Tokens of the longest prefix placed there and still remembered."""
        held = self._held.get(replica_id, OrderedDict[bytes, None]())
        pages = next((n for n, page in enumerate(hashes) if page not in held), len(hashes))
        return pages * self.page_tokens

    def note(self, replica_id: str, hashes: Sequence[bytes]) -> None:
        """A prompt was placed: its pages are the newest, the head newest of all."""
        held = self._held.setdefault(replica_id, OrderedDict())
        for page in reversed(hashes):  # a tail without its head would be of no use
            held[page] = None
            held.move_to_end(page)
        while len(held) > self.pages:
            held.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        self._held.pop(replica_id, None)


def placed_prefixes(settings: Settings) -> PlacedPrefixes:
    """As many pages as one replica's cache holds; none where there is no prefix cache."""
    engine = settings.engine
    pages = engine.kv_tokens // engine.page_tokens if engine.prefix_cache else 0
    return PlacedPrefixes(engine.page_tokens, pages)
