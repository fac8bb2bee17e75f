"""What a decode replica has to tell each ingress, until that ingress reads it or falls silent.

One channel per ingress; a read takes everything that has gathered since the last one, so a step's
outputs cross as one message. Used by decode.py, on its event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from serve.engine.sequence import Output
from serve.wire import Moved, pack


@dataclass
class _Channel:
    """What waits to be sent to one ingress, and when that ingress was last heard."""

    heard_s: float
    outbox: list[Output | Moved] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False


class Channels:
    """By the name of an ingress; iterating gives the names. Times are the caller's clock's."""

    def __init__(self) -> None:
        self._channels: dict[str, _Channel] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def heard(self, ingress_id: str, now_s: float) -> None:
        """An ingress has called: it is there."""
        self._open(ingress_id, now_s).heard_s = now_s

    def send(self, ingress_id: str, items: list[Output | Moved], now_s: float) -> None:
        """Put these behind what waits for an ingress already."""
        channel = self._open(ingress_id, now_s)
        channel.outbox.extend(items)
        channel.changed.set()

    async def read(self, ingress_id: str, now_s: float) -> AsyncIterator[bytes]:
        """Messages for one ingress; ends when its channel is closed."""
        channel = self._open(ingress_id, now_s)
        while not channel.closed:
            await channel.changed.wait()
            channel.changed.clear()
            outbox, channel.outbox = channel.outbox, []
            if outbox:
                yield pack(outbox)

    def close_silent(self, oldest_s: float) -> list[str]:
        """Close the channels of those last heard before `oldest_s`; their names."""
        silent = [name for name, channel in self._channels.items() if channel.heard_s < oldest_s]
        for name in silent:
            channel = self._channels.pop(name)
            channel.closed = True
            channel.changed.set()
        return silent

    def _open(self, ingress_id: str, now_s: float) -> _Channel:
        if ingress_id not in self._channels:
            self._channels[ingress_id] = _Channel(heard_s=now_s)
        return self._channels[ingress_id]
