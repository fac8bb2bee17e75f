"""A fence ends a collective whose peer lives but does not come; without it only time does."""

import multiprocessing
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from train.elastic.group import Gate, meet
from train.world import WorldChanged

pytestmark = pytest.mark.live


class BlindGate(Gate):
    """Lacks the fence's effect on connections."""

    def opening(self) -> None:
        """Does not look at what is opened."""


def wait_for_nobody(blind: bool, timeout_s: float, ports: Any, answers: Any, rank: int) -> None:
    """Rank 0 waits in a sum that rank 1 does not come to, and fences itself after a moment; then
    both make the next generation's group."""
    torch.set_num_threads(1)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(store.port)
    port = store.port if rank == 0 else ports.get()
    first = BlindGate() if blind else Gate()
    common = partial(meet, address=("127.0.0.1", port), rank=rank, size=2)
    try:
        with common(first, name="a", generation=1, timeout_s=timeout_s) as world:
            if rank == 1:
                time.sleep(timeout_s if blind else 1.5)
                raise WorldChanged(reason="it goes")
            threading.Timer(0.5, first.fence).start()
            started_s = time.monotonic()
            world.all_reduce(torch.ones(1000))
    except WorldChanged:
        took_s = time.monotonic() - started_s if rank == 0 else 0.0
    with common(Gate(), name="b", generation=2, timeout_s=60.0) as world:
        total = torch.ones(3)
        world.all_reduce(total)
    answers.put((rank, took_s, float(total.sum())))


@pytest.mark.parametrize("blind", [False, True])
def test_a_fence_ends_what_waits(blind: bool):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.elastic.worker", "tests.train.elastic.tiny"])
    timeout_s = 3.0 if blind else 60.0
    ports, answers = context.Queue(), context.Queue()
    ranks = [
        context.Process(
            target=wait_for_nobody, args=(blind, timeout_s, ports, answers, rank), daemon=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        found = sorted(answers.get(timeout=90) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert [total for _, _, total in found] == [6.0, 6.0], "the next generation works"
    waited_s = found[0][1]
    # Fenced after half a second, where the peer is still there for a whole one.
    assert waited_s > 2.0 if blind else waited_s < 1.4


def test_a_generation_that_is_over_is_not_joined():
    gate = Gate()
    gate.fence()
    with (
        pytest.raises(WorldChanged, match="ended"),
        meet(gate, address=("127.0.0.1", 1), name="x", rank=0, size=2, generation=1, timeout_s=1.0),
    ):
        raise AssertionError("nobody gets in")
