"""ZeRO-Offload: two tiers, what goes between them, and updates that come one step late."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.train import tiny
from train.data.corpus import Corpus
from train.data.stream import SampleStream
from train.job import Job
from train.memory.offload import OffloadTrainer
from train.schedule import factor
from train.weights import build_model, read_start
from train.world import LocalWorld


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    made: Path = tmp_path_factory.mktemp("corpus")
    return tiny.corpus(made)


def offloaded(wanted: Job, corpus: Corpus, folder: Path | None = None) -> OffloadTrainer:
    torch.set_num_threads(1)
    stream = SampleStream(corpus.train, wanted.data.sequence_tokens, wanted.run.seed)
    return OffloadTrainer(wanted, read_start(wanted), stream, folder)


def job(late_from_step: int = 0, **tables: Any) -> Job:
    return tiny.job(memory={"offload": "cpu", "late_from_step": late_from_step}, **tables)


def losses(trainer: Any) -> list[float]:
    left = trainer.job.steps - trainer.step_number
    return [trainer.step(LocalWorld()).loss for _ in range(left)]


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_run_is_that_of_one_memory(compute: str, mapped: bool, corpus: Corpus, tmp_path: Path):
    """To the bit: the same additions in the same order."""
    wanted = job(precision={"compute": compute})
    plain = tiny.trainer(wanted, corpus.train)
    mine = offloaded(wanted, corpus, tmp_path if mapped else None)
    assert losses(mine) == losses(plain)
    found, expected = mine.state().tensors, plain.state().tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def late_oracle(wanted: Job, corpus: Corpus) -> list[float]:
    """Losses of plain torch whose AdamW gets, from a step on, each gradient one step late. The last
    step applies all there is."""
    stream = tiny.trainer(wanted, corpus.train).stream
    model = build_model(wanted, read_start(wanted))
    table, first = wanted.optimizer, wanted.memory.late_from_step
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.dim() > 1]}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups,
        betas=(table.beta1, table.beta2),
        eps=table.epsilon,
        weight_decay=table.weight_decay,
    )

    def apply(gradients: list[torch.Tensor], step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = table.learning_rate * factor(wanted.schedule, step - 1, wanted.steps)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, table.clip_norm)
        optimizer.step()

    found, waiting = [], None
    for step in range(1, wanted.steps + 1):
        batch = stream.batch((step - 1) * wanted.batch_samples, wanted.batch_samples)
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        gradients = [g.clone() for g in torch.autograd.grad(loss, parameters)]
        found.append(float(loss.detach()))
        if waiting is not None:
            apply(*waiting)
        waiting = (gradients, step) if first and first <= step < wanted.steps else None
        if waiting is None:
            apply(gradients, step)
    return found + [float(p.detach().sum()) for p in parameters]


@pytest.mark.parametrize("late_from_step", [0, 1, 3, 6])
def test_late_updates_are_the_oracles(late_from_step: int, corpus: Corpus):
    wanted = job(late_from_step)
    mine = offloaded(wanted, corpus)
    found = losses(mine)
    found += [float(mine.flat.view(mine.flat.masters, slot).sum()) for slot in mine.flat.slots]
    assert found == pytest.approx(late_oracle(wanted, corpus), rel=1e-9, abs=1e-9)


def test_being_late_is_noticed(corpus: Corpus):
    """The mutation: an oracle that is not late, or late from another step on."""
    found = losses(offloaded(job(3), corpus))
    for other in (0, 2):
        expected = late_oracle(job(other), corpus)[: len(found)]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 1e-3


def test_a_waiting_gradient_is_part_of_the_state(corpus: Corpus):
    wanted = job(2)
    first = offloaded(wanted, corpus)
    for _ in range(3):
        first.step(LocalWorld())
    state = first.state()
    state.tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    assert state.of_kind("pending").keys() == state.of_kind("param").keys()
    expected = losses(first)
    second = offloaded(wanted, corpus)
    second.step(LocalWorld())
    second.load(state)
    assert losses(second) == expected
    with pytest.raises(ValueError, match="late_from_step"):
        offloaded(job(), corpus).load(state)


def test_a_plain_state_goes_on(corpus: Corpus):
    """Offloading is switched on and off on the way."""
    plain = tiny.trainer(job(), corpus.train)
    plain.step(LocalWorld())
    state = plain.state()
    state.tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    mine = offloaded(job(), corpus)
    mine.load(state)
    assert losses(mine) == losses(plain)


@pytest.mark.parametrize("micro_samples", [12, 3])
def test_bytes_over_the_link(micro_samples: int, corpus: Corpus):
    """bfloat16: 4 bytes a parameter and step with one micro-batch, gradients down and weights up;
    the device has weights and never more than the largest gradient."""
    wanted = job(precision={"compute": "bfloat16"}, run={"micro_batch_tokens": 16 * micro_samples})
    mine = offloaded(wanted, corpus)
    elements = mine.flat.slots[-1].stop
    begun = mine.arena.to_device_bytes
    mine.step(LocalWorld())
    micros = 12 // micro_samples
    assert mine.arena.to_host_bytes == 2 * elements * micros
    assert mine.arena.to_device_bytes - begun == 2 * elements
    largest = max(slot.stop - slot.start for slot in mine.flat.slots)
    assert mine.arena.peak_bytes == 2 * (elements + largest)
    assert all(parameter.grad is None for parameter in mine.model.parameters())


def test_a_late_update_is_computed_beside_the_passes(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    """Without a clock: here an update does not end before a pass of the next step has begun, which
    it never would if the step waited for it first."""
    mine = offloaded(job(1), corpus)
    passes = threading.Semaphore(0)
    update, loss = mine.optimizer.update_with, mine.model.loss

    def slow(*arguments: Any) -> None:
        assert passes.acquire(timeout=60), "no pass begins beside it"
        update(*arguments)

    def begun(tokens: torch.Tensor) -> torch.Tensor:
        passes.release()
        return loss(tokens)

    mine.step(LocalWorld())
    monkeypatch.setattr(mine.optimizer, "update_with", slow)
    monkeypatch.setattr(mine.model, "loss", begun)
    losses(mine)
    assert len(mine.late_spans) == mine.job.steps - 1


def test_an_update_that_fails_is_told(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    mine = offloaded(job(1), corpus)
    mine.step(LocalWorld())

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(mine.optimizer, "update", fail)
    with pytest.raises(OSError, match="no space"):
        mine.step(LocalWorld())
