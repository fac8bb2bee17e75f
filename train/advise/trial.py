"""Seconds of a micro-batch of a job's model on this machine, tried once for each size."""

import time

import torch

from train.job import Job
from train.precision import COMPUTE
from train.weights import Start, build_model

ROUNDS = 3
MOST_TRIED_TOKENS = 1 << 13
"""Larger micro-batches are taken to cost as much a sample as one of this size."""


class Trial:
    """The whole model on one worker, forward and backward; nothing is updated."""

    def __init__(self, job: Job, start: Start) -> None:
        self._job, self._start = job, start
        self._model = build_model(job, start).to(COMPUTE[job.precision.compute])
        self._known: dict[int, float] = {}

    def pass_s(self, samples: int) -> float:
        """Of so many samples at once: the best of some rounds."""
        most = max(1, MOST_TRIED_TOKENS // self._job.data.sequence_tokens)
        tried = min(samples, most)
        if tried not in self._known:
            self._known[tried] = self._best_s(tried)
        return self._known[tried] * samples / tried

    def _best_s(self, samples: int) -> float:
        shape = (samples, self._job.data.sequence_tokens + 1)
        tokens = torch.arange(shape[0] * shape[1]).view(shape) % self._start.config.vocab
        best_s = float("inf")
        for _ in range(ROUNDS):
            started_s = time.perf_counter()
            self._model.loss(tokens).backward()  # type: ignore[no-untyped-call]
            best_s = min(best_s, time.perf_counter() - started_s)
        return best_s
