"""A job for tests of elastic training: a small regression in float64, whole or shared out.

Its state counts how often each sample was part of an update, which no log can be wrong about. It
shares no code with train/step.py.
"""

import json
import math
import os
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.local import LocalStorage
from train.elastic.durable import StoredShards
from train.elastic.keeper import Fetched, Replicas
from train.elastic.messages import Plan, Version
from train.elastic.peers import PeerMemory
from train.elastic.process import Part
from train.elastic.trainee import Flat, StepEnd
from train.state import TrainState
from train.world import LocalWorld, World

BATCH = 12
INPUTS, HIDDEN = 5, 11
WEIGHTS = INPUTS * HIDDEN + 2 * HIDDEN + 1
RATE, BETAS, TINY = 1e-2, (0.9, 0.99), 1e-8


@dataclass(frozen=True)
class End:
    """A finished step."""

    step: int
    samples: int
    loss: float
    stop: bool
    ids: list[int]


def example(number: int) -> tuple[Tensor, Tensor]:
    """Sample `number` of an endless data set."""
    x = torch.sin(torch.arange(1, INPUTS + 1, dtype=torch.float64) * (number + 1) * 0.731)
    return x, torch.tanh(x.sum() + x[0] * x[1]).reshape(1)


def initial() -> Tensor:
    return 0.3 * torch.cos(torch.arange(WEIGHTS, dtype=torch.float64) * 1.7)


def gradient(weights: Tensor, ids: range) -> tuple[Tensor, float]:
    """Summed over the samples, with their summed loss."""
    leaf = weights.clone().requires_grad_()
    first, bias, second, last = torch.split(leaf, [INPUTS * HIDDEN, HIDDEN, HIDDEN, 1])
    total = torch.zeros((), dtype=torch.float64)
    for number in ids:
        x, y = example(number)
        hidden = torch.tanh(first.reshape(HIDDEN, INPUTS) @ x + bias)
        total = total + ((second @ hidden + last - y) ** 2).sum()
    if len(ids):
        total.backward()
        assert leaf.grad is not None
        return leaf.grad, float(total.detach())
    return torch.zeros_like(weights), 0.0


def adam(step: int, slope: Tensor, weights: Tensor, mean: Tensor, square: Tensor) -> None:
    """In place, on whole vectors or shares."""
    mean.mul_(BETAS[0]).add_(slope, alpha=1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
    scale = math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
    weights.sub_(RATE * scale * mean / (square.sqrt() + TINY))


def cut(length: int, rank: int, size: int) -> slice:
    return slice(length * rank // size, length * (rank + 1) // size)


class Moment:
    """A place in a step at which a worker dies, once: the first to make the file does."""

    def __init__(self, folder: Path, worker: str, kill: tuple[int, str] | None) -> None:
        self._path, self._worker, self._kill = folder / "killed", worker, kill

    def attempt(self, generation: int, step: int, ids: range) -> None:
        """Logged before anybody can have used these samples: a kill may come at any time."""
        _write(self._path.parent, self._worker, {"generation": generation, "try": [step, *ids]})

    def at(self, step: int, place: str) -> None:
        if self._kill == (step, place):
            try:
                self._path.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


class Whole:
    """Every worker holds all of it."""

    def __init__(self, samples: int, pause_s: float = 0.0, moment: Moment | None = None) -> None:
        self.weights, self.mean = initial(), torch.zeros(WEIGHTS, dtype=torch.float64)
        self.square = torch.zeros_like(self.mean)
        self.seen = torch.zeros(samples, dtype=torch.int64)
        self.step_number = self.samples = 0
        self._pause_s, self._moment = pause_s, moment

    def summed(self, world: World, stop: bool) -> tuple[Tensor, float, bool, range]:
        """Mean gradient, mean loss, whether any asked to stop, own ids; `seen` not yet counted."""
        self._at("start")
        mine = cut(BATCH, world.rank, world.size)
        ids = range(self.samples + mine.start, self.samples + mine.stop)
        if self._moment:
            self._moment.attempt(world.generation, self.step_number + 1, ids)
        slope, loss = gradient(self.weights, ids)
        time.sleep(self._pause_s)
        everything = torch.cat([slope, torch.tensor([loss, float(stop)], dtype=torch.float64)])
        self._at("gradient")
        world.all_reduce(everything)
        counted = torch.zeros_like(self.seen)
        counted[ids.start : ids.stop] = 1
        world.all_reduce(counted)
        self.counted = counted
        self._at("reduced")
        return everything[:-2] / BATCH, float(everything[-2]) / BATCH, bool(everything[-1]), ids

    def _at(self, place: str) -> None:
        if self._moment:
            self._moment.at(self.step_number + 1, place)

    def step(self, world: World, stop: bool = False) -> StepEnd:
        slope, loss, asked, ids = self.summed(world, stop)
        self.step_number += 1
        self.samples += BATCH
        adam(self.step_number, slope, self.weights, self.mean, self.square)
        self.seen += self.counted
        if self._moment:
            self._moment.at(self.step_number, "updated")
        return End(self.step_number, self.samples, loss, asked, list(ids))

    def state(self) -> TrainState:
        tensors = {"param/w": self.weights, "exp_avg/w": self.mean, "exp_avg_sq/w": self.square}
        meta = {"job": "tiny"} if self.step_number else {}
        return TrainState(self.step_number, self.samples, tensors | {"seen": self.seen}, meta)

    def load(self, state: TrainState) -> None:
        for name, tensor in self.state().tensors.items():
            tensor.copy_(state.tensors[name])
        self.step_number, self.samples = state.step, state.samples
        assert not state.step or state.meta == {"job": "tiny"}, "the meta came along"


class Shared(Whole):
    """Weights are everywhere; masters, moments and counts are shared out."""

    def __init__(self, samples: int, pause_s: float = 0.0, moment: Moment | None = None) -> None:
        super().__init__(samples, pause_s, moment)
        self.own = TrainState(0, 0, {})

    def _initial(self) -> dict[str, Tensor]:
        return {
            "master": initial(),
            "exp_avg": torch.zeros(WEIGHTS, dtype=torch.float64),
            "exp_avg_sq": torch.zeros(WEIGHTS, dtype=torch.float64),
            "seen": torch.zeros(len(self.seen), dtype=torch.int64),
        }

    def flats(self) -> dict[str, Flat]:
        return {name: Flat(len(t), t.dtype) for name, t in self._initial().items()}

    def shard(self) -> TrainState:
        return TrainState(self.step_number, self.samples, self.own.tensors)

    def load_shard(self, world: World, state: TrainState | None) -> None:
        if state is None:
            whole = self._initial()
            tensors = {n: t[cut(len(t), world.rank, world.size)] for n, t in whole.items()}
            state = TrainState(0, 0, tensors)
        self.own = TrainState(0, 0, {n: t.clone() for n, t in state.tensors.items()})
        self.step_number, self.samples = state.step, state.samples
        self._publish(world)

    def _publish(self, world: World) -> None:
        """Everybody's masters into everybody's weights: a sum with zeros, exact."""
        self.weights = torch.zeros(WEIGHTS, dtype=torch.float64)
        self.weights[cut(WEIGHTS, world.rank, world.size)] = self.own.tensors["master"]
        world.all_reduce(self.weights)

    def step(self, world: World, stop: bool = False) -> StepEnd:
        slope, loss, asked, ids = self.summed(world, stop)
        own = self.own.tensors
        mine = cut(WEIGHTS, world.rank, world.size)
        adam(self.step_number + 1, slope[mine], own["master"], own["exp_avg"], own["exp_avg_sq"])
        own["seen"] += self.counted[cut(len(self.seen), world.rank, world.size)]
        self._at("torn")  # some shares are a step ahead of others
        self._publish(world)
        self.step_number += 1
        self.samples += BATCH
        return End(self.step_number, self.samples, loss, asked, list(ids))


class ForgetfulReplicas(Replicas):
    """Lacks the hand-over: a newcomer claims the state without having got it."""

    def fetch(self, plan: Plan, world: World) -> Fetched:
        assert plan.version is not None
        state = self._trainee.state()
        state.meta = {"job": "tiny"}
        self._trainee.load(replace(state, step=plan.version.step, samples=plan.version.samples))
        return Fetched()


class HastyMemory(PeerMemory):
    """Lacks the commit: gives the last version up before the next one is with everybody."""

    def step(self, world: World, stop: bool) -> StepEnd:
        self._memory.clear()
        return super().step(world, stop)


class LiveMemory(PeerMemory):
    """Lacks the snapshot: what it keeps of its own share is the share that steps change."""

    def _copy(self, world: World) -> None:
        super()._copy(world)
        state = self._trainee.shard()
        version = Version(step=state.step, samples=state.samples, shards=world.size)
        self._memory[version, world.rank] = state.tensors


FAULTS: dict[str, type[PeerMemory]] = {"no commit": HastyMemory, "no snapshot": LiveMemory}


@dataclass(frozen=True)
class Tiny:
    """What a test wants of the job. kill: step and place of a worker's end. copies: 0 for whole
    state on every worker. store_every: steps between versions in folder/store."""

    folder: Path
    steps: int
    pause_s: float = 0.0
    kill: tuple[int, str] | None = None
    copies: int = 0
    store_every: int = 0
    fault: str = ""

    @property
    def samples(self) -> int:
        return self.steps * BATCH


def build(job: Tiny, worker: str) -> Part:
    """A worker's part of the job."""
    torch.set_num_threads(1)
    moment = Moment(job.folder, worker, job.kill)
    if job.copies:
        shared = Shared(job.samples, job.pause_s, moment)
        storage = LocalStorage(job.folder / "store")
        store = StoredShards(storage, shared.flats()) if job.store_every else None
        peers = FAULTS.get(job.fault, PeerMemory)(shared, job.copies, store, job.store_every)
        return Part(peers, job.steps, partial(_log_peers, job, worker, peers, shared))
    whole = Whole(job.samples, job.pause_s, moment)
    keeper = ForgetfulReplicas(whole) if job.fault == "nothing fetched" else Replicas(whole)
    return Part(keeper, job.steps, partial(_log, job, worker, whole))


def _log(job: Tiny, worker: str, whole: Whole, generation: int, end: StepEnd) -> None:
    line: dict[str, object] = {"generation": generation, "step": end.step}
    if end.step == job.steps:
        line["seen"] = whole.seen.tolist()
    _write(job.folder, worker, line)


def _log_peers(
    job: Tiny, worker: str, peers: PeerMemory, shared: Shared, generation: int, end: StepEnd
) -> None:
    line: dict[str, object] = {"generation": generation, "step": end.step}
    own = shared.own.tensors
    line |= {"copied": peers.traffic.copied_bytes, "copies": peers.traffic.copies}
    line |= {"share": sum(tensor.nbytes for tensor in own.values())}
    if end.step == job.steps:
        line["seen"] = own["seen"].tolist()
    _write(job.folder, worker, line)


def _write(folder: Path, worker: str, line: dict[str, object]) -> None:
    line["pid"] = os.getpid()
    with (folder / f"{worker}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def logged(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Each worker's lines."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def alone(steps: int) -> list[float]:
    """The losses of one plain process."""
    trainee = Whole(steps * BATCH)
    return [trainee.step(LocalWorld()).loss for _ in range(steps)]
