"""Same machine: the receiver maps the sender's KV storage read-only and copies straight out of it.

One copy, from the sender's pages to the receiver's; only a list of page numbers crosses by message.
A lent page that changed hands is noticed by its generation, read before and after the copy, so a
lease that ran out costs a recomputation and never a wrong token.
"""

from typing import NamedTuple

import numpy as np

from serve.kv import shared
from serve.kv.device import DeviceStorage, Storage
from serve.kv.storage import KVStorage
from serve.transport.contract import HandoffLost, Offer, check_format
from serve.transport.copy import receive


class _Mapping(NamedTuple):
    """A sender's storage as mapped here, and which file it is: names are used again, files not."""

    storage: KVStorage
    file: tuple[int, int] | None


class SharedMemoryTransport:
    """Keeps one mapping per sender it has received from, until the sender's file is gone."""

    name = "shared_memory"

    def __init__(self) -> None:
        self._attached: dict[str, _Mapping] = {}

    def offer(
        self, lease_id: str, storage: Storage, pages: list[int], start_tokens: int, stop: int
    ) -> Offer:
        if storage.name is None:
            raise ValueError(
                "handoff.transport shared_memory needs KV storage in shared memory; this replica's "
                "storage is private"
            )
        if isinstance(storage, DeviceStorage):
            storage.lend(pages)
        generations = tuple(int(g) for g in storage.generation[pages])
        lent = tuple(pages)
        segment, kv_format = storage.name, storage.kv_format
        return Offer(lease_id, self.name, segment, lent, generations, start_tokens, stop, kv_format)

    def fetch(self, offer: Offer, storage: Storage, pages: list[int]) -> int:
        check_format(offer, storage)
        sender = self._attach(offer.segment)
        theirs = (sender.shape._replace(pages=0), sender.kv_format)
        ours = (storage.shape._replace(pages=0), storage.kv_format)
        if theirs != ours:
            raise ValueError(
                f"the sender's pages are {theirs}, ours are {ours}; [engine] must be equal for "
                "prefill and decode"
            )
        self._unchanged(sender, offer)
        copied = receive(sender.tensor, offer.pages, storage, pages, offer.tokens)
        self._unchanged(sender, offer)
        return copied

    def close(self) -> None:
        for mapping in self._attached.values():
            mapping.storage.close()
        self._attached.clear()

    def _attach(self, segment: str) -> KVStorage:
        file = _file(segment)
        known = self._attached.get(segment)
        if known is not None and known.file == file:
            return known.storage
        self._drop_stale()
        try:
            storage = KVStorage.attach(segment)
        except (ValueError, OSError) as error:
            raise HandoffLost(f"the sender's storage cannot be mapped: {error}") from error
        if _file(segment) != file:
            raise HandoffLost(f"the sender's storage {segment} was replaced while it was mapped")
        self._attached[segment] = _Mapping(storage, file)
        return storage

    def _drop_stale(self) -> None:
        """Let go of senders that are gone: a mapping keeps all of their memory."""
        for segment, mapping in list(self._attached.items()):
            if mapping.file != _file(segment):
                mapping.storage.close()
                del self._attached[segment]

    def _unchanged(self, sender: KVStorage, offer: Offer) -> None:
        now = sender.generation[list(offer.pages)]
        if not np.array_equal(now, np.array(offer.generations, dtype=now.dtype)):
            raise HandoffLost(f"lease {offer.lease_id} ran out before its pages were copied")


def _file(segment: str) -> tuple[int, int] | None:
    """What tells the file of that name from every other one; None when there is none."""
    try:
        status = (shared.SHARED_DIRECTORY / segment).stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
