"""How both kinds of replica await their engine."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serve.clients import ReplicaLost
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop, EngineStopped

T = TypeVar("T")


async def between_steps(loop: EngineLoop, function: Callable[[Engine], T]) -> T:
    """Run `function(engine)` on the engine's thread between two steps and await its result.

    ReplicaLost when the engine has stopped: whoever called this replica asks another.
    """
    try:
        return await asyncio.wrap_future(loop.call(function))
    except EngineStopped as stopped:
        raise ReplicaLost(str(stopped)) from stopped
