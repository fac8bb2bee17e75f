"""Several processes that form one gloo world, for tests: a function runs on every rank.

What it returns is collected by rank; what it raises fails the test with the rank's traceback.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from train.world import GlooWorld, join

DEADLINE_S = 120.0


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` in `size` processes; its results by rank.

    function: a module-level one; what it returns must pickle.
    """
    # The server imports torch once; what it forks has no threads of torch yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pydantic", "train.step"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(
                target=_rank, args=(folder, rank, size, queue, function, arguments), daemon=True
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            answers = dict(queue.get() for _ in processes)
        finally:
            for process in processes:
                process.join(DEADLINE_S)
                process.kill()
    failures = [text for ok, text in answers.values() if not ok]
    assert not failures, "\n".join(failures)
    return [answers[rank][1] for rank in range(size)]


def _rank(
    folder: str, rank: int, size: int, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    world: GlooWorld | None = None
    try:
        store = FileStore(str(Path(folder) / "store"), size)
        world = join(store, rank, size, timeout_s=DEADLINE_S)
        queue.put((rank, (True, function(world, *arguments))))
        world.barrier()
        world.close()
    except Exception:
        queue.put((rank, (False, f"rank {rank}:\n{traceback.format_exc()}")))
