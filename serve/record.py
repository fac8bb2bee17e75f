"""What the ingress keeps of each request under way, and of each replica that it is connected to."""

import asyncio
from dataclasses import dataclass, field

from serve.clients import DecodeClient
from serve.engine.sequence import Delta, Sequence


@dataclass
class Record:
    """A request under way: what was delivered, which replica has it, what waits to be read.

    call_id: what that replica knows the request by. An event of None means: that replica is out of
    it, go on elsewhere. futile_moves counts those since the last token. expected_tokens: of the
    prompt, that this replica was thought to have cached; None once it is known what it had.
    """

    sequence: Sequence
    replica_id: str | None = None
    call_id: str = ""
    load_tokens: int = 0
    expected_tokens: int | None = None
    futile_moves: int = 0
    events: asyncio.Queue[Delta | None] = field(default_factory=asyncio.Queue)
    finished: bool = False


@dataclass(eq=False)
class Link:
    """A connection to one decode replica; `name` is what the replica knows this ingress by."""

    name: str
    client: DecodeClient
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
