"""Sending while computing: a stretch of the gradient leaves, on a thread of its own, as soon as a
backward pass has completed it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import nn

from train.layout import FlatModel

Span = tuple[int, int]


def spans_of(flat: FlatModel, bucket_bytes: int) -> list[Span]:
    """Stretches of the flat gradient of at least so many bytes (but the last), in about the order
    in which a backward pass completes them: matrices from the last layer to the first; all vectors
    before the last of these, which is the embedding's."""
    least = bucket_bytes // flat.gradient.element_size()
    found: list[Span] = []
    stop = flat.decayed
    for slot in reversed([slot for slot in flat.slots if slot.stop <= flat.decayed]):
        if stop - slot.start >= least or not slot.start:
            found.append((slot.start, stop))
            stop = slot.start
    elements = flat.gradient.numel()
    if flat.decayed < elements:
        found.insert(max(len(found) - 1, 0), (flat.decayed, elements))
    return found


class Overlap:
    """Calls `send(number)` for each bucket, in their order, on one thread: early for those that a
    backward pass after `follow` completes, and for the rest in `finish`."""

    def __init__(
        self, buckets: Sequence[Sequence[nn.Parameter]], send: Callable[[int], None]
    ) -> None:
        self._counts, self._send = [len(bucket) for bucket in buckets], send
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gradient")
        self._armed, self._failed = False, False
        self._left: list[int] = []
        self._sent: list[Future[None]] = []
        for number, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._arrived, number)
                )

    def begin(self) -> None:
        """A step begins; what an abandoned one has left is waited for."""
        wait(self._sent)
        self._armed, self._failed = False, False
        self._left, self._sent = list(self._counts), []

    def follow(self) -> None:
        """The next backward pass is the step's last."""
        self._armed = True

    def finish(self) -> None:
        """Returns when all is sent; raises what sending raised."""
        self._armed = False
        while len(self._sent) < len(self._counts):
            self._submit()
        wait(self._sent)
        for sent in self._sent:
            sent.result()

    def _arrived(self, number: int, _parameter: torch.Tensor) -> None:
        if not self._armed:
            return
        self._left[number] -= 1
        while len(self._sent) < len(self._counts) and not self._left[len(self._sent)]:
            self._submit()

    def _submit(self) -> None:
        self._sent.append(self._pool.submit(self._run, len(self._sent)))

    def _run(self, number: int) -> None:
        if self._failed:
            return  # the group is broken, and the first failure tells
        try:
            self._send(number)
        except BaseException:
            self._failed = True
            raise
