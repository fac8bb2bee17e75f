"""What both kinds of replica have in common: how they describe themselves, and await their engine.

Imported by prefill.py, decode.py, the controller (which reads states) and the ingress.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from serve.engine.engine import Engine, EngineStats
from serve.engine.loop import EngineLoop

Role = Literal["prefill", "decode"]
T = TypeVar("T")


@dataclass(frozen=True)
class ReplicaState:
    """A replica's answer to a ping. `failure` is a sentence when it can serve no more.

    silent_s: seconds since its engine last took a step or was seen idle.
    leases: offers not yet acknowledged (prefill). handed_bytes: KV received (decode).
    """

    replica_id: str
    role: Role
    failure: str | None
    silent_s: float
    draining: bool
    leases: int
    handed_bytes: int
    remote_prefills: int
    local_prefills: int
    stats: EngineStats

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


async def between_steps(loop: EngineLoop, function: Callable[[Engine], T]) -> T:
    """Run `function(engine)` on the engine's thread between two steps and await its result.

    RuntimeError when the engine has stopped.
    """
    return await asyncio.wrap_future(loop.call(function))
