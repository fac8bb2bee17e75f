"""Who hears that a job is to stop: the command alone, never its workers.

`ray job stop`, and other keepers of processes, signal every process below the one that they
started. Only the command may act on that: it asks for an end through the run's folder, all
workers finish their step together, and the last checkpoint is written.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that this thread starts meanwhile, and theirs, never get SIGTERM: a blocked signal
    is inherited, before the process could say anything itself. SIGKILL still ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def own_stop() -> Iterator[None]:
    """What this process does on SIGTERM is afterwards what it was, whatever a library set
    meanwhile: `ray.init` puts a handler of its own, which ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
