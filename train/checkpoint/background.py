"""Checkpoints while training goes on, in CheckFreq's two phases.

`step_done` begins one when it is due: a thread copies the state while the next step's forward and
backward passes only read it (the snapshot), `before_update` waits until that is done, and the same
thread then writes the copy and makes it durable (the persist). One is under way at a time.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.piece import Piece
from train.checkpoint.storage import StorageError
from train.checkpoint.writer import CheckpointWriter, NotCommitted
from train.resilience.checkfreq import FIRST_INTERVAL, CheckFreq

FAILURES_IN_A_ROW = 3
State = Callable[[], tuple[dict[str, Any], Sequence[Piece]]]
"""Meta and this rank's pieces, which may be views of live tensors."""


class CheckpointsFail(RuntimeError):
    """Several checkpoints in a row could not be written; the message says why the last could not.
    Training on would put at risk more than was agreed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint, on this rank. reason: of a failure, "" for none."""

    step: int
    persist_s: float
    reason: str


class BackgroundCheckpoints:
    """One rank's. All ranks call `step_done` with the same steps.

    agree: rank 0's number on every rank (a broadcast). every_steps: a fixed interval instead of the
    policy's, 0 for none. outcomes: of all that have ended, in order.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        rank: int,
        size: int,
        policy: CheckFreq,
        agree: Callable[[int], int] = lambda value: value,
        every_steps: int = 0,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._writer, self._rank, self._size = writer, rank, size
        self.policy, self._agree, self._every = policy, agree, every_steps
        self._now_s = now_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._copied, self._abandoned = Event(), Event()
        self._copied.set()
        self._under_way: Future[Outcome] | None = None
        self._last_end_s: float | None = None
        self._busy = False
        self._begun_step: int | None = None
        self._ask_step = 0
        self._due_step: int | None = None
        self.outcomes: list[Outcome] = []

    def before_update(self) -> None:
        """To be called between the backward pass and the first change of a tensor."""
        self._copied.wait()

    def step_done(self, step: int, state: State) -> bool:
        """To be called after each step; True when a checkpoint of it was begun. CheckpointsFail."""
        now_s = self._now_s()
        if self._last_end_s is not None:
            self.policy.iteration(now_s - self._last_end_s, self._busy)
        self._collect()
        begun = self._due(step)
        if begun:
            self.begin(step, state)
        self._busy = self._under_way is not None
        self._last_end_s = now_s  # what stalled in here is the next iteration's
        return begun

    def _due(self, step: int) -> bool:
        """The next step to write at is agreed on once the last checkpoint has been measured: at
        steps that all ranks know, rank 0 says the interval, or 0 for not yet."""
        if self._every:
            return step % self._every == 0
        if self._begun_step is None:
            self._begun_step, self._ask_step = step - 1, step - 1 + FIRST_INTERVAL
            self._due_step = self._ask_step
        if self._due_step is None and step >= self._ask_step:
            measured = self.policy.known and self._under_way is None
            chosen = self._agree(self.policy.interval() if measured else 0)
            self._ask_step = step + FIRST_INTERVAL
            self._due_step = self._begun_step + chosen if chosen else None
        if self._due_step is None or step < self._due_step:
            return False
        self._begun_step, self._due_step = step, None
        self._ask_step = step + FIRST_INTERVAL
        return True

    def begin(self, step: int, state: State) -> None:
        """Begins a checkpoint of this step now, after the one under way."""
        self._collect(wait=True)
        meta, pieces = state()
        self._copied.clear()
        began_s = self._now_s()
        self._under_way = self._thread.submit(self._both_phases, step, meta, pieces, began_s)

    def finish(self) -> None:
        """Waits for the one under way. CheckpointsFail."""
        self._collect(wait=True)

    def close(self, abandon: bool = False) -> None:
        """Ends the thread, after the one under way; abandon: rank 0 waits for nobody any more."""
        if abandon:
            self._abandoned.set()
        self._thread.shutdown(wait=True)

    def _both_phases(
        self, step: int, meta: dict[str, Any], pieces: Sequence[Piece], began_s: float
    ) -> Outcome:
        try:
            copies = [self._copy(piece) for piece in pieces]
        finally:
            self._copied.set()
        reason = ""
        try:
            self._writer.write(step, meta, copies, self._rank, self._size)
            if self._rank == 0:
                self._writer.commit(step, self._size, abandoned=self._abandoned.is_set)
        except (StorageError, NotCommitted) as error:
            reason = str(error)
        return Outcome(step, self._now_s() - began_s, reason)

    def _copy(self, piece: Piece) -> Piece:
        key = (piece.name, piece.start)
        held = self._copies.get(key)
        if held is None or held.shape != piece.data.shape or held.dtype != piece.data.dtype:
            held = self._copies[key] = torch.empty_like(piece.data, device="cpu")
        held.copy_(piece.data)
        return replace(piece, data=held)

    def _collect(self, wait: bool = False) -> None:
        if self._under_way is None or not (wait or self._under_way.done()):
            return
        outcome = self._under_way.result()
        self._under_way = None
        self.outcomes.append(outcome)
        if not outcome.reason:
            self.policy.persisted(outcome.persist_s)
        last = self.outcomes[-FAILURES_IN_A_ROW:]
        if len(last) == FAILURES_IN_A_ROW and all(outcome.reason for outcome in last):
            raise CheckpointsFail(
                f"{FAILURES_IN_A_ROW} checkpoints in a row failed; the last: {outcome.reason}"
            )
