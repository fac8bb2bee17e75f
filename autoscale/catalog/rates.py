"""From times of steps to requests per second within an SLO, by queueing formulas.

Prompts queue as M/D/1 with an exponential tail. Sequences in decode share the replica's time, and
their number has the variance of a processor-sharing queue: mean / ((1 - busy) (1 - elasticity)). A
mixed replica stretches its decode steps by the share of time that prompts take. The simulation in
`placement/simulation.py` knows none of this and is what these formulas are checked against.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Protocol

from autoscale.catalog.memory import STEP_TOKENS
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape, Role

MOST_BUSY = 0.9  # of the time; nearer to 1, queues grow without bound
CAUSES = 3  # no room, a slow step, a queue of prompts: each may cost its share of the misses
LEAST_MISSED = 1e-4
LONE = 0.85  # of what the formulas say: a lone replica has no other to send a crowd to
HALVINGS = 30

StepS = Callable[[float, float, float], float]  # prompt tokens, sequences, context -> seconds


class TimedRoom(Protocol):
    """What a profile has to know for `shape_rate`."""

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float: ...

    def kv_tokens(self, shape: ReplicaShape) -> int: ...


@dataclass(frozen=True)
class Replica:
    """One replica as the formulas see it. kv_tokens: its room."""

    step_s: StepS
    kv_tokens: int
    role: Role = "mixed"


def shape_rate(profile: TimedRoom, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
    """`ThroughputProfile.requests_per_s` for a profile that knows its steps."""
    replica = Replica(partial(profile.step_s, shape), profile.kv_tokens(shape), shape.role)
    return replica_rate(replica, bucket, slo)


def replica_rate(replica: Replica, bucket: Bucket, slo: Slo) -> float:
    """Most requests of the bucket each second; 0 where not even one is served in time."""
    if replica.kv_tokens < sum(bucket) or not math.isfinite(replica.step_s(1, 1, 1)):
        return 0.0
    if replica.role == "prefill":
        prompt_s = replica.step_s(bucket.input_tokens, 0, 0)
        most = MOST_BUSY / prompt_s
        return LONE * _largest(lambda rate: _first_in_time(rate, prompt_s, prompt_s, slo), most)
    most = replica.kv_tokens / sum(bucket)
    decoding = _largest(lambda n: _kept(_Load(replica, bucket, n), slo, most), most)
    return LONE * _Load(replica, bucket, decoding).rate if decoding > 0 else 0.0


def _largest(kept: Callable[[float], bool], most: float) -> float:
    """The largest figure in 0..most that is kept, as all below it are; 0 where none is."""
    if kept(most):
        return most
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class _Load:
    """A replica with `decoding` sequences in decode on average."""

    replica: Replica
    bucket: Bucket
    decoding: float

    def alone_s(self, sequences: float) -> float:
        """A step of decodes half-way through their answers, no prompt among them."""
        return self.replica.step_s(0, max(1.0, sequences), self._context)

    @property
    def _context(self) -> float:
        return self.bucket.input_tokens + self.bucket.output_tokens / 2

    @property
    def prompt_s(self) -> float:
        """What a prompt adds to the steps that compute it. The first in a step may hide behind the
        weights that are read anyway; under load a step is full of them, and they do not."""
        if self.replica.role == "decode":
            return 0.0
        prompt, context = self.bucket.input_tokens, self._context
        running, alone_s = max(1.0, self.decoding), self.alone_s(self.decoding)
        together = max(1, STEP_TOKENS // prompt)
        full_s = self.replica.step_s(together * prompt, running, context)
        return max(
            self.replica.step_s(prompt, running, context) - alone_s,
            (full_s - alone_s) / together,
        )

    @property
    def elasticity(self) -> float:
        """By how many per cent a step grows when there is one per cent more in decode."""
        if self.decoding < 1:
            return 0.0
        alone_s = self.alone_s(self.decoding)
        return min(1.0, (self.alone_s(1.1 * self.decoding) - alone_s) / (0.1 * alone_s))

    @property
    def rate(self) -> float:
        """By Little's law, the decodes being stretched by the time that prompts take."""
        answer_s = max(1, self.bucket.output_tokens) * self.alone_s(self.decoding)
        return self.decoding / (answer_s + self.decoding * self.prompt_s)


def _kept(load: _Load, slo: Slo, most: float) -> bool:
    """Whether `slo.attained` of the requests keep the SLO. most: sequences that have room."""
    missed = (1 - slo.attained) / CAUSES
    rate, prompt_s, busy = load.rate, load.prompt_s, load.rate * load.prompt_s
    slack = (1 - busy) * (1 - load.elasticity)
    if busy >= MOST_BUSY or slack < 1 - MOST_BUSY:
        return False
    tail = NormalDist().inv_cdf(1 - max(missed, LEAST_MISSED))
    crowd = max(1.0, load.decoding + tail * math.sqrt(load.decoding / slack))
    if crowd > max(1.0, most):
        return False
    token_s = load.alone_s(crowd) / (1 - busy)
    if slo.tpot_s is not None and token_s > slo.tpot_s:
        return False
    if load.replica.role == "decode":
        return True
    # A prompt waits for the step that runs, and its own steps carry the decodes along.
    steps = 1 + math.ceil(load.bucket.input_tokens / STEP_TOKENS)
    return _first_in_time(rate, prompt_s, prompt_s + steps * load.alone_s(crowd), slo)


def _first_in_time(rate: float, prompt_s: float, own_s: float, slo: Slo) -> bool:
    """Waiting of M/D/1 at the attained share plus one's own time, against the limit."""
    busy = rate * prompt_s
    if slo.ttft_s is None:
        return True
    missed = max((1 - slo.attained) / CAUSES, LEAST_MISSED)
    scale_s = prompt_s / (2 * (1 - busy))
    waiting_s = scale_s * math.log(busy / missed) if busy > missed else 0.0
    return own_s + waiting_s <= slo.ttft_s
