"""Virtual workers on ranks, for tests: jobs whose workers are ahead of each other, and chains of
stages."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.train import tiny
from train.data.stream import SampleStream
from train.heterogeneous.hetpipe_chain import ChainPlan, ChainStage, Neighbours
from train.heterogeneous.hetpipe_job import HetPipeLearner
from train.heterogeneous.hetpipe_member import Member
from train.heterogeneous.hetpipe_pipeline import ChainLearner
from train.heterogeneous.hetpipe_server import Rule, Shard
from train.heterogeneous.hetpipe_wire import Door, Servers, open_doors, stretches
from train.job import Job, OptimizerTable
from train.parallel.pipeline_layout import even_spans
from train.parallel.pipeline_model import JobLayers
from train.weights import build_model, read_start
from train.world import GlooWorld

SGD = {"name": "sgd", "beta1": 0.0, "learning_rate": 0.3, "clip_norm": 0.0, "weight_decay": 0.0}


def job(
    staleness: int | None, steps: int = 8, samples: int = 12, micro: int = 2, **tables: Any
) -> Job:
    """staleness: None for all together."""
    tables.setdefault("optimizer", {"learning_rate": 0.01, "clip_norm": 0.0})
    shares = tables.pop("shares", "equal")
    return tiny.job(
        run={
            "tokens": 16 * samples * steps,
            "batch_tokens": 16 * samples,
            "micro_batch_tokens": 16 * micro,
            "deterministic": not staleness,
        },
        workers={"staleness": staleness, "shares": shares},
        **tables,
    )


def text() -> Any:
    """A text of which something can be learnt, as bytes."""
    return np.frombuffer(tiny.text(3000, 1).encode(), np.uint8).astype(np.uint16)


def stream(wanted: Job) -> SampleStream:
    return SampleStream(text(), wanted.data.sequence_tokens, wanted.run.seed)


def entered(world: GlooWorld, wanted: Job) -> Any:
    """A worker of a job, or a stage of one where the job has a pipeline, in its place."""
    start = read_start(wanted)
    made: HetPipeLearner | ChainLearner
    if wanted.pipeline.stages:
        made = ChainLearner(wanted, start, stream(wanted))
    else:
        made = HetPipeLearner(wanted, build_model(wanted, start), stream(wanted))
    made.enter(world)
    return made


def trained(
    world: GlooWorld, wanted: Job, slow_s: float = 0.0, ahead: int = 0, ignored: bool = False
) -> dict[str, Any]:
    """All steps. slow_s: of rank 0, more in each step; ahead: rank 0 makes none before the others
    are so many steps ahead of it; ignored: servers let everybody read."""
    learner = entered(world, wanted)
    member: Member = learner.member
    shard: Any = member.shard
    if ignored:
        shard.may_read = lambda clock, exact: not exact or shard.version >= clock
    reports = []
    for step in range(wanted.steps):
        if world.rank == 0:
            time.sleep(slow_s)
            if step:  # all begin together
                wait_for(shard, min(step + ahead, wanted.steps))
        reports.append(learner.step(world))
    learner.settle()
    world.barrier()
    weights = member.flat.masters.clone()
    return {
        "losses": [report.loss for report in reports],
        "ids": [report.ids for report in reports],
        "weights": weights.numpy(),
        "named": {name: part.numpy() for name, part in member.flat.named(weights).items()},
        "stale": [read.staleness for read in shard.reads],
        "sent": member.moved_bytes,
        "dense": reports[-1].dense_bytes,
    }


def wait_for(shard: Shard, clock: int) -> None:
    """Until all members but 0 have read what this server gives at a clock."""
    deadline_s = time.monotonic() + 200
    others = set(range(1, shard.workers)) if clock else set()
    while others - {read.worker for read in list(shard.reads) if read.clock >= clock}:
        assert time.monotonic() < deadline_s, f"nobody came to clock {clock}"
        time.sleep(0.002)


TOKENS, LAYERS = 16, 4
RATE = 0.2


def layered(dtype: str = "float64") -> Any:
    """A model of a few layers, and the job that it is of."""
    model = {"layers": LAYERS - 2, "tied_head": False}
    wanted = tiny.job(model=model, precision={"compute": dtype})
    return wanted, JobLayers(wanted, read_start(wanted)).layered()


def batch(chain: int, number: int) -> tuple[Tensor, Tensor]:
    """Two samples of a chain's minibatch."""
    random = np.random.default_rng([chain, number])
    ids = torch.from_numpy(random.integers(0, 255, (2, TOKENS + 1)))
    return ids[:, :-1], ids[:, 1:]


def flat_of(model: Any) -> Tensor:
    """First weights of all layers."""
    layers = [model.build(n) for n in range(model.count)]
    return torch.cat([p.detach().reshape(-1) for layer in layers for p in layer.parameters()])


def chained(
    world: GlooWorld, chains: int, in_flight: int, waves: int, bound: int = 0, slow_s: float = 0.0
) -> dict[str, Any]:
    """A stage of one of several chains of equal length; every rank is a server, too. slow_s: of a
    minibatch in chain 0."""
    _, model = layered()
    stages = world.size // chains
    chain, position = divmod(world.rank, stages)
    first = flat_of(model)
    parts = stretches(first.numel(), world.size)
    own = parts[world.rank]
    table = OptimizerTable.model_validate({**SGD, "learning_rate": RATE})
    shard = Shard(Rule(first[slice(*own)].clone(), [], table, lambda done: RATE), chains, bound)
    door = Door(shard)
    servers = Servers(chain, parts, open_doors(world, door), {world.rank: shard})

    def batches(number: int) -> tuple[Tensor, Tensor]:
        if chain == 0:
            time.sleep(slow_s)
        return batch(chain, number)

    stage = ChainStage(
        model,
        even_spans(model.count, stages)[position],
        servers,
        ChainPlan(in_flight, lambda wave: RATE, scale(chains, in_flight)),
        batches,
        Neighbours(
            world.rank - 1 if position else None,
            world.rank + 1 if position + 1 < stages else None,
            position,
        ),
    )
    stage.run(world, waves)
    world.barrier()
    return {
        "start": stage.start,
        "weights": stage.weights.numpy(),
        "losses": stage.losses,
        "stale": [read.staleness for read in shard.reads],
        "versions": stage.versions,
    }


def scale(chains: int, in_flight: int) -> float:
    """Of a minibatch's loss: a clock's is the mean over all of its tokens."""
    return 1 / (2 * TOKENS * chains * in_flight)
