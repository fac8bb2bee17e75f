"""Following the directory: one task that asks for anything newer and passes it on.

Run by every ingress and decode process. A controller that is away (it may be restarting) is asked
again; what was known stays in force meanwhile.
"""

from collections.abc import Awaitable, Callable

from cluster.clock import Clock
from serve.directory import Directory

WATCH_S = 10.0  # how long one question may stay open
RETRY_S = 0.5

Watch = Callable[[int, float], Awaitable[Directory]]


async def follow(watch: Watch, update: Callable[[Directory], None], clock: Clock) -> None:
    """Call `update` with each newer directory, for ever."""
    version = 0
    while True:
        try:
            directory = await watch(version, WATCH_S)
        except Exception:  # it is another process: dead, restarting or in trouble of its own
            await clock.sleep(RETRY_S)
            continue
        if directory.version != version:
            version = directory.version
            update(directory)
