"""How both kinds of replica await their engine."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop

T = TypeVar("T")


async def between_steps(loop: EngineLoop, function: Callable[[Engine], T]) -> T:
    """Run `function(engine)` on the engine's thread between two steps and await its result.

    RuntimeError when the engine has stopped.
    """
    return await asyncio.wrap_future(loop.call(function))
