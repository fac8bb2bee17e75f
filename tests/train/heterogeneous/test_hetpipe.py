"""Workers that are ahead of each other: never further than the bound, as far as the bound where one
is slow, bulk-synchronous at 0, and as they learn otherwise."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from autoscale.placement.shares_pipeline import global_staleness
from tests.train.heterogeneous import hetpipe_ranks as ranks
from tests.train.processes import on_ranks
from train.heterogeneous.hetpipe_server import FACTS, Rule, Shard, Stretch
from train.heterogeneous.hetpipe_wire import Door, Servers, stretches
from train.job import Job, OptimizerTable, read_job
from train.step import Trainer
from train.weights import build_model, read_start
from train.world import LocalWorld


def together(wanted: Job) -> tuple[list[float], Any]:
    """One process, all samples of a step at once: losses and weights."""
    alone = Trainer(wanted, build_model(wanted, read_start(wanted)), ranks.stream(wanted))
    losses = [alone.step(LocalWorld()).loss for _ in range(wanted.steps)]
    return losses, alone.flat.masters.numpy()


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": ranks.SGD,
    "sgd with momentum": {**ranks.SGD, "beta1": 0.9, "weight_decay": 0.1, "learning_rate": 0.1},
    "adamw": {"learning_rate": 0.01, "clip_norm": 0.0},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bound_0_is_bulk_synchronous(name: str) -> None:
    losses, weights = together(ranks.job(None, optimizer=OPTIMIZERS[name]))
    for answer in on_ranks(3, ranks.trained, ranks.job(0, optimizer=OPTIMIZERS[name])):
        assert answer["losses"] == pytest.approx(losses, abs=1e-12)
        np.testing.assert_allclose(answer["weights"], weights, rtol=0, atol=1e-12)
        assert set(answer["stale"]) == {0}


def every_sample_once(answers: list[dict[str, Any]], wanted: Job) -> None:
    for step in range(wanted.steps):
        taken = [number for answer in answers for number in answer["ids"][step]]
        first = step * wanted.batch_samples
        assert taken == ranks.stream(wanted).ids(first, wanted.batch_samples)


@pytest.mark.parametrize("bound", [1, 4])
def test_nobody_is_further_ahead_than_the_bound_and_somebody_is_as_far(bound: int) -> None:
    wanted = ranks.job(bound, steps=14)
    answers = on_ranks(3, ranks.trained, wanted, 0.0, bound)
    for answer in answers:
        assert max(answer["stale"]) == bound and min(answer["stale"]) >= 0
        np.testing.assert_array_equal(answer["weights"], answers[0]["weights"])
    every_sample_once(answers, wanted)


def test_a_bound_that_nobody_keeps_is_noticed() -> None:
    """The mutation: servers that let everybody read."""
    answers = on_ranks(3, ranks.trained, ranks.job(1, steps=14), 0.0, 2, True)
    assert max(stale for answer in answers for stale in answer["stale"]) > 1


def test_what_a_worker_sends_is_counted() -> None:
    """As much as a sum in a ring: a push to two of three servers, and a third of the weights to
    each of two others; once more at the end, when all come together."""
    wanted = ranks.job(0)
    for answer in on_ranks(3, ranks.trained, wanted):
        assert answer["sent"] == pytest.approx((wanted.steps + 0.5) * answer["dense"], rel=0.01)


def test_bytes_are_those_of_the_wire() -> None:
    """Of two servers in one process: what one end sent is what the other end got."""
    shards = [shard(workers=1, bound=0, count=count) for count in (3, 4)]
    doors = [Door(each) for each in shards]
    parts = stretches(7, 2)
    assert parts == [Stretch(0, 3), Stretch(3, 7)]
    servers = Servers(0, parts, [door.port for door in doors], {})
    into = torch.empty(5, dtype=torch.float64)
    servers.push(0, 0, torch.ones(7, dtype=torch.float64), torch.zeros(FACTS).double())
    found = servers.pull(1, 1, into)
    assert into.tolist() == [-1.0] * 5 and [pulled.version for pulled in found] == [1, 1]
    head, facts, answer = 29, 8 * FACTS, 10
    assert servers.sent_bytes == 2 * (head + facts) + 7 * 8 + 2 * head
    assert servers.received_bytes == 2 * (answer + facts) + 5 * 8
    assert sum(door.received_bytes for door in doors) == servers.sent_bytes
    assert sum(door.sent_bytes for door in doors) == servers.received_bytes
    servers.close()
    for door in doors:
        door.close()


def shard(workers: int, bound: int, count: int = 1) -> Shard:
    """Weights from 0, SGD at rate 1."""
    table = OptimizerTable.model_validate({**ranks.SGD, "learning_rate": 1.0})
    return Shard(
        Rule(torch.zeros(count, dtype=torch.float64), [], table, lambda done: 1.0), workers, bound
    )


def pushed(server: Shard, worker: int, clock: int, value: float = 1.0) -> None:
    gradient = torch.full((1,), value, dtype=torch.float64)
    server.push(worker, clock, 0, gradient, torch.full((FACTS,), value).double())


def test_a_version_is_whole_clocks_only() -> None:
    """Who is ahead sees nothing of others' later waves, and waits at the bound."""
    server = shard(workers=2, bound=1)
    pushed(server, 0, 0)
    assert server.pull(0, 1, 0, 1, exact=False).version == 0  # one ahead: as far as it may be
    pushed(server, 0, 1, 10.0)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(server.pull(0, 2, 0, 1, exact=False)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not got
    pushed(server, 1, 0, 2.0)
    waiting.join(10)
    assert got[0].version == 1 and float(got[0].weights) == -3.0
    assert got[0].facts[:, 0].tolist() == [1.0, 2.0]  # of wave 0 = 2 - bound - 1
    assert [read.staleness for read in server.reads] == [1, 1]


def test_an_optimizer_of_whole_matrices_is_refused() -> None:
    table = OptimizerTable(name="adafactor")
    with pytest.raises(ValueError, match='"adafactor" sees whole matrices.*"adamw" or "sgd"'):
        Rule(torch.zeros(1), [], table, lambda done: 1.0)


LEARNING = {
    "sgd": {**ranks.SGD, "learning_rate": 0.1},
    "adamw": {"learning_rate": 0.001, "clip_norm": 0.0},
}
LEARNING_STEPS, LAST = 150, 8


def learnt(optimizer: str, bound: int) -> tuple[float, float]:
    """Loss of the last steps with one worker that is slower, as far apart as the bound lets them,
    and of the same steps all together."""
    chosen = LEARNING[optimizer]
    losses, _ = together(ranks.job(None, LEARNING_STEPS, optimizer=chosen))
    assert losses[-1] < 0.6 * losses[0]
    answers = on_ranks(3, ranks.trained, ranks.job(bound, LEARNING_STEPS, optimizer=chosen), 0.01)
    assert max(stale for answer in answers for stale in answer["stale"]) == bound
    told = slice(-LAST - bound, -bound or None)  # a report's loss is that of `bound` steps before
    late = float(np.mean(answers[0]["losses"][-LAST:])), float(np.mean(losses[told]))
    print(f"{optimizer}, bound {bound}: {late[0]:.3f}, all together {late[1]:.3f}")
    return late


@pytest.mark.slow
def test_it_learns_as_synchronous_training_does() -> None:
    """Plain SGD, whose own updates a worker does not wait for: within 5 %."""
    apart, all_together = learnt("sgd", 4)
    assert apart <= 1.05 * all_together


def delayed(chains: int, in_flight: int, waves: int) -> Any:
    """The same in one process at a bound of 0, minibatch by minibatch: what each may have seen."""
    _, model = ranks.layered()
    layers = [model.build(n) for n in range(model.count)]
    named = [(layer, dict(layer.named_parameters())) for layer in layers]
    shapes = [p.shape for _, all_ in named for p in all_.values()]
    first = ranks.flat_of(model)
    done: dict[tuple[int, int], torch.Tensor] = {}

    def gradient(weights: torch.Tensor, chain: int, number: int) -> torch.Tensor:
        sizes = [shape.numel() for shape in shapes]
        leaves = [
            part.view(shape).detach().clone().requires_grad_()
            for part, shape in zip(weights.split(sizes), shapes, strict=True)
        ]
        value, targets = ranks.batch(chain, number)
        left = iter(leaves)
        for layer, all_ in named:
            value = functional_call(layer, {name: next(left) for name in all_}, (value,))
        loss = model.loss(value, targets) * ranks.scale(chains, in_flight)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves)])

    for number in range(waves * in_flight):
        for chain in range(chains):
            seen = number - in_flight  # the chain's own last minibatch that may be in
            whole = (seen + 1) // in_flight * in_flight  # others' waves that this one ended
            weights = first.clone()
            for (other, past), value in done.items():
                if past <= seen if other == chain else past < whole:
                    weights -= ranks.RATE * value
            done[chain, number] = gradient(weights, chain, number)
    return (first - ranks.RATE * torch.stack(list(done.values())).sum(0)).numpy()


@pytest.mark.parametrize(("chains", "stages", "in_flight"), [(2, 2, 1), (1, 2, 2), (2, 2, 3)])
def test_chains_compute_with_the_weights_that_they_may_have(
    chains: int, stages: int, in_flight: int
) -> None:
    """Local staleness in_flight - 1, and at a bound of 0 all waves of others that have ended."""
    expected = delayed(chains, in_flight, 3)
    for answer in on_ranks(chains * stages, ranks.chained, chains, in_flight, 3):
        part = expected[answer["start"] : answer["start"] + len(answer["weights"])]
        np.testing.assert_allclose(answer["weights"], part, rtol=0, atol=1e-12)
        assert set(answer["stale"]) == {0}


def test_chains_are_as_far_apart_as_the_bound_lets_them() -> None:
    bound, in_flight, waves = 2, 2, 8
    answers = on_ranks(4, ranks.chained, 2, in_flight, waves, bound, 0.03)
    stale = [read for answer in answers for read in answer["stale"]]
    assert max(stale) == bound and min(stale) >= 0
    missed = [
        number - version * in_flight
        for answer in answers
        for number, version in enumerate(answer["versions"])
    ]
    assert max(missed) <= global_staleness(in_flight, bound)


REFUSED = {
    "sharding.stage = 1": "sharding.stage = 0 is accepted",
    "optimizer.clip_norm = 1.0": "optimizer.clip_norm = 0, since",
    "optimizer.name = 'adafactor'": '"adamw" or "sgd" is accepted',
    "run.deterministic = true": "run.deterministic = false, since",
    "workers.where = 'elastic'": "workers.where = 'local' is accepted",
    "compression.kind = 'powersgd'": 'compression.kind = "none" is accepted',
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_go_with_it_is_named(setting: str, tmp_path: Path) -> None:
    lines = {"workers.staleness": "2", "optimizer.clip_norm": "0", "run.deterministic": "false"}
    name, _, value = setting.partition(" = ")
    file = tmp_path / "job.toml"
    file.write_text("\n".join(f"{k} = {v}" for k, v in (lines | {name: value}).items()))
    with pytest.raises(ValueError) as error:
        read_job(file)
    assert "workers.staleness = 2 (HetPipe)" in str(error.value)
    assert REFUSED[setting] in str(error.value)
