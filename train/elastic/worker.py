"""A worker: waits for a plan, meets the others, gets the state, trains until its generation ends.

Two threads: `run` trains; `listen` hears the supervisor and ends the generation under way, so that
the training thread comes out of whatever collective it waits in. The process outlives them all.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from train.elastic.channel import Channel
from train.elastic.group import Gate, meet
from train.elastic.keeper import Keeper
from train.elastic.messages import Beat, Failed, Fence, Finished, Idle, Leave, Plan, Resumed
from train.elastic.trainee import StepEnd
from train.world import GlooWorld, World, WorldChanged

Reason = Literal["new", "paused", "changed", "gave", "done"]
log = logging.getLogger(__name__)


class ElasticWorker:
    """One worker of a job of `steps` steps.

    collective_s: how long a collective may take before the group counts as broken. on_step: told of
    each finished step with its generation. ended: whether the job is at its end before its last
    step, the same on all workers after a step. finish: collective, after the last step; called
    again by a later generation if it was broken off.
    """

    def __init__(
        self,
        name: str,
        keeper: Keeper,
        channel: Channel,
        steps: int,
        *,
        collective_s: float = 120.0,
        beat_s: float = 1.0,
        on_step: Callable[[int, StepEnd], None] = lambda generation, end: None,
        ended: Callable[[], bool] = lambda: False,
        finish: Callable[[World], None] = lambda world: None,
    ) -> None:
        self._name, self._keeper, self._channel, self._steps = name, keeper, channel, steps
        self._collective_s, self._beat_s, self._on_step = collective_s, beat_s, on_step
        self._ended, self._finish = ended, finish
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._gates: dict[int, Gate] = {}
        self._pause = self._generation = 0
        self._last: Finished | None = None
        self._store: TCPStore | None = None
        self._detail = ""

    def run(self) -> None:
        """Until told to leave, or the supervisor is gone. What the job itself raises ends it, and
        the supervisor is told first."""
        threading.Thread(target=self.listen, daemon=True, name="listen").start()
        try:
            self._tell_idle("new")
            while (plan := self._plans.get()) is not None:
                self._tell_idle(self._follow(plan))
        except Exception as error:
            log.exception("the job ends")
            self._channel.send(Failed(detail=f"{type(error).__name__}: {error}"))
            raise

    def listen(self) -> None:
        """The other thread: plans, fences, and signs of life."""
        try:
            while True:
                if not self._channel.ready(self._beat_s):
                    self._channel.send(Beat())
                    continue
                message = self._channel.to_worker()
                if isinstance(message, Leave):
                    break
                if isinstance(message, Fence):
                    self._fence(message)
                else:
                    self._plans.put(message)
        except (EOFError, OSError):
            log.warning("%s: the supervisor is gone", self._name)
        self._plans.put(None)
        self._gate(self._generation).fence()

    def _fence(self, message: Fence) -> None:
        if message.hard:
            self._gate(message.generation).fence()
        else:
            self._pause = max(self._pause, message.generation)

    def _gate(self, generation: int) -> Gate:
        with self._lock:
            return self._gates.setdefault(generation, Gate())

    def _follow(self, plan: Plan) -> Reason:
        """One generation."""
        self._generation = plan.generation
        self._detail = ""
        with self._lock:
            self._gates = {g: gate for g, gate in self._gates.items() if g >= plan.generation}
        try:
            return self._train(plan)
        except WorldChanged as change:
            self._detail = change.reason
            return "changed"

    def _train(self, plan: Plan) -> Reason:
        rank = plan.everyone.index(self._name)
        if plan.givers:
            with self._meet(plan, "hand-over", rank, len(plan.everyone)) as world:
                fetched = self._keeper.fetch(plan, world)
                world.barrier()
            if self._name in plan.givers:
                return "gave"
        with self._meet(plan, "train", rank, len(plan.ranks)) as world:
            if not plan.givers:
                fetched = self._keeper.fetch(plan, world)
            self._keeper.settle(world)
            self._channel.send(
                Resumed(
                    generation=plan.generation,
                    rank=rank,
                    step=self._keeper.at(),
                    local_bytes=fetched.local_bytes,
                    peer_bytes=fetched.peer_bytes,
                    store_bytes=fetched.store_bytes,
                    lost=fetched.lost,
                )
            )
            return self._steps_in(world)

    def _meet(
        self, plan: Plan, name: str, rank: int, size: int
    ) -> AbstractContextManager[GlooWorld]:
        return meet(
            self._gate(plan.generation),
            address=(plan.host, plan.port),
            name=name,
            rank=rank,
            size=size,
            generation=plan.generation,
            timeout_s=self._collective_s,
        )

    def _steps_in(self, world: World) -> Reason:
        """Steps until the last one, or until somebody asked for a pause."""
        while self._keeper.at() < self._steps and not self._ended():
            started_s = time.monotonic()
            end = self._keeper.step(world, self._pause >= world.generation)
            self._keeper.protect(world)
            self._last = Finished(
                generation=world.generation,
                step=end.step,
                samples=end.samples,
                loss=end.loss,
                step_s=time.monotonic() - started_s,
            )
            self._on_step(world.generation, end)
            if world.rank == 0:
                self._channel.send(self._last)
            if end.stop and self._keeper.at() < self._steps and not self._ended():
                return "paused"
        self._finish(world)
        return "done"

    def _tell_idle(self, reason: Reason) -> None:
        # Its own store for each generation, in case this worker is the next rank 0: nothing of an
        # older group is in it.
        host = self._channel.own_host()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._channel.send(
            Idle(
                generation=self._generation,
                reason=reason,
                held=self._keeper.held(),
                host=host,
                port=self._store.port,
                detail=self._detail,
                last=self._last,
            )
        )
