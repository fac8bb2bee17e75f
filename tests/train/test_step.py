"""One curve for any number of workers, to 1e-9 in float64, and to the bit for the same number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.train import tiny
from tests.train.processes import on_ranks
from train.data.corpus import open_corpus
from train.data.stream import SampleStream
from train.weights import build_model, read_start
from train.world import LocalWorld, World

LIMIT = 1e-9


def curve(world: World, corpus: str, tables: dict[str, Any]) -> dict[str, Any]:
    """Losses, ids and final weights of a tiny job in a world."""
    training = tiny.trainer(tiny.job(**tables), open_corpus(Path(corpus)).train)
    reports = [training.step(world) for _ in range(training.job.steps)]
    return {
        "losses": [report.loss for report in reports],
        "ids": [report.ids for report in reports],
        "weights": training.flat.masters.clone().numpy(),
    }


def twice(world: World, corpus: str, tables: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, two times."""
    return [curve(world, corpus, tables) for _ in range(2)]


class Silent(LocalWorld):
    """One of two workers that hears nothing of the other."""

    size = 2


def plain(corpus: Path, tables: dict[str, Any]) -> list[float]:
    """Losses of the same job written plainly: whole batches, autograd, torch's AdamW, no flat
    buffers; for a constant learning rate."""
    job = tiny.job(**tables)
    training = tiny.trainer(job, open_corpus(corpus).train)
    model = build_model(job, read_start(job))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    table = job.optimizer
    groups: list[dict[str, Any]] = [{"params": matrices}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups,
        lr=table.learning_rate,
        betas=(table.beta1, table.beta2),
        eps=table.epsilon,
        weight_decay=table.weight_decay,
    )
    losses = []
    for step in range(job.steps):
        batch = training.stream.batch(step * job.batch_samples, job.batch_samples)
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus")
    tiny.corpus(path)
    return path


def test_losses_are_those_of_plain_pytorch(folder: Path):
    constant = {"schedule": {"name": "constant", "warmup": 0}}
    mine = curve(LocalWorld(), str(folder), constant)
    expected = plain(folder, constant)
    torch.testing.assert_close(mine["losses"], expected, rtol=LIMIT, atol=LIMIT)


def test_any_number_of_workers_has_one_curve(folder: Path):
    """Twelve samples a step over 5 workers: unequal shares, ragged micro-batches."""
    alone = curve(LocalWorld(), str(folder), {})
    ranks = on_ranks(5, curve, str(folder), {})
    for found in ranks:
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=LIMIT, atol=LIMIT)
        assert abs(found["weights"] - alone["weights"]).max() <= LIMIT
        assert (found["weights"] == ranks[0]["weights"]).all()
    ids = [[i for found in ranks for i in found["ids"][step]] for step in range(6)]
    assert ids == alone["ids"]


def test_the_same_workers_have_the_same_bits(folder: Path):
    tables = {"precision": {"compute": "bfloat16"}}
    (once, again), (other, _) = on_ranks(2, twice, str(folder), tables)
    assert once["losses"] == again["losses"] == other["losses"]
    assert (once["weights"] == again["weights"]).all()
    assert (once["weights"] == other["weights"]).all()


def test_a_gradient_that_is_not_summed_is_noticed(folder: Path):
    """The mutation: workers that do not talk."""
    alone = curve(LocalWorld(), str(folder), {})
    found = curve(Silent(), str(folder), {})
    assert abs(found["weights"] - alone["weights"]).max() > 1e-3


def test_a_state_goes_on_as_if_nothing_had_been(folder: Path):
    """Also in another trainer, whose own state is overwritten, and for both optimizers."""
    for tables in (
        {},
        {"optimizer": {"name": "adafactor"}},
        {"precision": {"compute": "bfloat16"}},
    ):
        tokens = open_corpus(folder).train
        first, world = tiny.trainer(tiny.job(**tables), tokens), LocalWorld()
        for _ in range(3):
            first.step(world)
        state = first.state()
        state.tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        expected = [first.step(world).loss for _ in range(3)]
        second = tiny.trainer(tiny.job(**tables), tokens)
        second.step(world)
        second.load(state)
        assert [second.step(world).loss for _ in range(3)] == expected
        assert torch.equal(second.flat.masters, first.flat.masters)


def test_a_state_of_another_model_is_refused(folder: Path):
    tokens = open_corpus(folder).train
    other = tiny.trainer(tiny.job(model={"feed_forward": 64}), tokens)
    with pytest.raises(ValueError, match="gate_proj"):
        tiny.trainer(tiny.job(), tokens).load(other.state())


def test_the_stream_is_shuffled(folder: Path):
    stream = SampleStream(open_corpus(folder).train, 16, seed=0)
    assert stream.ids(0, 12) != list(range(12))
