"""Runs from the worker's side: interrupted and whole ones are the same; records say what was."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.train import tiny
from train.checkpoints import open_checkpoints
from train.commands import begin, forget, refuse_changes
from train.folder import RunFolder, Status
from train.job import Job
from train.learner import Whole
from train.run import Run
from train.view import console_of_nobody
from train.world import LocalWorld, WorldChanged


def job(path: Path, name: str, **tables) -> Job:
    texts = tiny.write_texts(path / "texts")
    return tiny.job(
        name=name,
        folder=path,
        data={"sources": (str(texts),)},
        **{"report": {"sample_ids": True, "evaluate_tokens": 160}, **tables},
    )


def make(wanted: Job) -> Run:
    folder = RunFolder(wanted.path)
    begin(wanted, folder, console_of_nobody())
    run = Run(wanted, folder, open_checkpoints(wanted, folder.checkpoints))
    run.resume()
    return run


def held(run: Run) -> Whole:
    assert isinstance(run.trainer, Whole)
    return run.trainer


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.folder.read_metrics() if "loss" in line]


class Failing(LocalWorld):
    """A world that is lost in one of its sums, or in which somebody asks to stop."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise WorldChanged(frozenset({1}))


def test_a_run_that_is_stopped_goes_on_to_the_same_end(tmp_path: Path):
    whole = make(job(tmp_path, "whole"))
    assert whole.run(LocalWorld()) == "finished"
    parts = make(job(tmp_path, "parts"))
    parts.folder.ask_to_stop()
    assert parts.run(LocalWorld()) == "stopped" and parts.trainer.step_number == 1
    assert parts.folder.status().phase == "stopped"
    parts = make(job(tmp_path, "parts"))
    assert parts.trainer.step_number == 1
    assert parts.run(LocalWorld()) == "finished"
    assert losses(parts) == losses(whole) and len(losses(whole)) == 6
    assert torch.equal(held(parts).flat.masters, held(whole).flat.masters)
    assert parts.folder.status().bits_per_byte == whole.folder.status().bits_per_byte
    assert (parts.folder.path / "model.safetensors").is_file()


def test_a_lost_world_costs_the_step_under_way_only(tmp_path: Path):
    """And after the loss of the process, what was since the checkpoint; metrics tell it once."""
    whole = make(job(tmp_path, "whole"))
    whole.run(LocalWorld())
    often = {"resilience": {"checkpoint_every_steps": 2}}
    run = make(job(tmp_path, "parts", **often))
    with pytest.raises(WorldChanged):
        run.run(Failing(at=4))
    assert run.trainer.step_number == 3
    run.run(LocalWorld(generation=1))  # the same process goes on
    assert losses(run) == losses(whole)
    run = make(job(tmp_path, "again", **often))
    with pytest.raises(WorldChanged):
        run.run(Failing(at=4))
    run = make(job(tmp_path, "again", **often))  # another process
    assert run.trainer.step_number == 2
    run.run(LocalWorld())
    assert losses(run) == losses(whole)


def test_a_used_up_budget_pauses_the_run(tmp_path: Path):
    run = make(job(tmp_path, "dear", budget={"usd": 1e-12, "usd_per_worker_h": 1.0}))
    assert run.run(LocalWorld()) == "out of budget" and run.trainer.step_number == 2
    status = run.folder.status()
    assert "budget.usd" in status.reason and 0 < status.usd < 1
    run = make(job(tmp_path, "dear"))
    assert run.run(LocalWorld()) == "finished"
    assert run.folder.status().usd == status.usd  # what was spent is remembered


def test_bits_per_byte_are_counted_by_hand(tmp_path: Path):
    """Each held-out token's log-probability, one sequence after the other, per byte of text."""
    run = make(job(tmp_path, "bits"))
    corpus, length = run.corpus, 16
    nats, tokens = 0.0, 0
    for start in range(0, 160, length):
        row = torch.from_numpy(corpus.held_out[start : start + length + 1].astype("int64"))
        logits = held(run).model(row[None, :-1])[0].detach()
        logs = logits - logits.exp().sum(-1, keepdim=True).log()
        nats -= sum(float(logs[i, row[i + 1]]) for i in range(length))
        tokens += length
    texts = [tiny.text(20, n).encode() for n in (3, 7)]  # every fourth document
    held_bytes, held_tokens = sum(map(len, texts)), sum(map(len, texts)) + len(texts)
    expected = nats / tokens / 0.6931471805599453 * held_tokens / held_bytes
    assert run.evaluate(LocalWorld()) == pytest.approx(expected, rel=1e-9)


def test_checkpoints_of_other_text_are_refused(tmp_path: Path):
    wanted = job(tmp_path, "other")
    run = make(wanted)
    run.run(LocalWorld())
    (tmp_path / "texts" / "0.txt").write_text(tiny.text(20, 99))
    for file in run.folder.corpus.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="--fresh"):
        make(wanted)
    forget(run.folder)
    assert make(wanted).trainer.step_number == 0


def test_a_changed_curve_is_refused_and_more_workers_are_not(tmp_path: Path):
    old = job(tmp_path, "old")
    for tables in ({"workers": {"count": 3}}, {"run": {"micro_batch_tokens": 64}}):
        refuse_changes(old, job(tmp_path, "old", **tables))
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.01 .* 0.02"):
        refuse_changes(old, job(tmp_path, "old", optimizer={"learning_rate": 0.02}))
    with pytest.raises(ValueError, match="precision"):
        refuse_changes(old, job(tmp_path, "old", precision={"compute": "float32"}))


def test_old_checkpoints_go(tmp_path: Path):
    often = {"resilience": {"checkpoint_every_steps": 1, "keep": 2}}
    run = make(job(tmp_path, "many", **often))
    run.run(LocalWorld())
    names = sorted(path.name for path in run.folder.checkpoints.iterdir())
    assert [int(name[5:13]) for name in names if name.startswith("step-")] == [5, 6]


def test_a_run_without_a_process_has_failed(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_status(Status("training", step=3))
    assert folder.status().phase == "failed"
    with folder.locked():
        assert folder.status().phase == "training"
        with pytest.raises(ValueError, match="train stop"), folder.locked():
            pass


def test_sample_ids_are_logged(tmp_path: Path):
    import json

    run = make(job(tmp_path, "ids"))
    run.run(LocalWorld())
    lines = (run.folder.log / "samples.jsonl").read_text().splitlines()
    found = list(itertools.chain(*(json.loads(line)["ids"] for line in lines)))
    assert found == run.stream.ids(0, 72)
