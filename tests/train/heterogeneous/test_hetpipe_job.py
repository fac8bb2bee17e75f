"""Jobs with `workers.staleness`: checkpoints that others go on from, a stop that all hear at one
step, real workers, and the memory that is said."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train import tiny
from tests.train.heterogeneous import hetpipe_ranks as ranks
from tests.train.processes import on_ranks
from tests.train.test_estimate import WORKERS, bytes_of
from tests.train.test_learners import all_kinds, curve
from tests.train.test_run import job, losses, make
from tests.train.test_train_command import sanderling
from train.commands import begin
from train.folder import RunFolder, read_lines
from train.job import Job, read_job
from train.local import launch
from train.view import console_of_nobody
from train.world import GlooWorld, LocalWorld

RANKS = 2
PLAIN = {
    "optimizer": {"learning_rate": 0.01, "clip_norm": 0.0},
    "schedule": {"name": "constant"},
}


def begun(path: Path, name: str, staleness: int | None, steps: int, **tables: Any) -> Job:
    workers = {"count": RANKS, "staleness": staleness}
    run = {"tokens": 16 * 12 * steps, "deterministic": not staleness}
    found = job(path, name, workers=workers, run=run, **{**PLAIN, **tables})
    begin(found, RunFolder(found.path), console_of_nobody())
    return found


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
def test_it_goes_on_from_anothers_checkpoint_and_others_from_its_own(
    compute: str, tmp_path: Path
) -> None:
    """A bound of 0 has the curve of all together, whoever made the first half."""
    tables: dict[str, Any] = {"precision": {"compute": compute}}
    halves = [begun(tmp_path, f"half-{kind}", kind, 3, **tables) for kind in (0, None)]
    on_ranks(RANKS, all_kinds, [str(each.path) for each in halves])
    rest = [begun(tmp_path, f"rest-{kind}", kind, 6, **tables) for kind in (None, 0)]
    for half, after in zip(halves, rest, strict=True):
        (half.path / "checkpoints").rename(after.path / "checkpoints")
    assert on_ranks(RANKS, all_kinds, [str(each.path) for each in rest]) == [[3, 3]] * RANKS
    reference = make(job(tmp_path, "reference", workers={"count": 1}, **PLAIN, **tables))
    reference.run(LocalWorld())
    near = 1e-12 if compute == "float64" else 0.02
    for half, after in zip(halves, rest, strict=True):
        found = curve(half.path) + curve(after.path)
        assert found == pytest.approx(losses(reference), abs=near), after.name


def parted(world: GlooWorld, steps: int) -> dict[str, Any]:
    """What a worker writes of a checkpoint while others are behind, and its weights then."""
    learner = ranks.entered(world, ranks.job(3, steps=12))
    for _ in range(steps):
        time.sleep(0.05 * (world.rank == 0))
        learner.step(world)
    ahead = learner.step_number - learner.member.shard.reads[-1].version
    pieces = [(p.name, p.start, p.stop, p.data.clone().numpy()) for p in learner.pieces(world)]
    exported = {name: t.clone().numpy() for name, t in learner.exported(world).items()}
    learner.step(world)
    return {"pieces": pieces, "weights": exported, "ahead": ahead}


def test_a_checkpoint_in_the_middle_is_of_one_version() -> None:
    """Workers that are apart come together for it: all shares are of one step, as are the weights
    of every worker; nothing is left out and nothing is there twice."""
    answers = on_ranks(RANKS, parted, 6)
    assert max(answer["ahead"] for answer in answers) > 0
    for name, weights in answers[0]["weights"].items():
        np.testing.assert_array_equal(weights, answers[1]["weights"][name])
        found = [p[1:] for a in answers for p in a["pieces"] if p[0] == f"param/{name}"]
        parts = sorted(found, key=lambda part: part[0])
        assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])]
        np.testing.assert_array_equal(np.concatenate([p[2] for p in parts]), weights.ravel())


def stops(world: GlooWorld, bound: int, at: int) -> list[bool]:
    """Which steps say that somebody has asked for an end, after rank 1 did in step `at`."""
    learner = ranks.entered(world, ranks.job(bound, steps=12))
    return [learner.step(world, world.rank == 1 and n == at).stop for n in range(12)]


@pytest.mark.parametrize("bound", [0, 3])
def test_a_stop_is_heard_by_all_after_the_same_step(bound: int) -> None:
    for heard in on_ranks(3, stops, bound, 4):
        assert heard == [step == 4 + bound for step in range(12)]


FILE = """
name = "t"
folder = "."
[model]
layers = 1
tied_head = false
hidden = 32
heads = 2
kv_heads = 2
feed_forward = 48
[data]
sources = ["texts"]
sequence_tokens = 16
held_out_every = 4
[run]
tokens = {tokens}
batch_tokens = 128
micro_batch_tokens = 64
deterministic = false
[optimizer]
clip_norm = 0
[workers]
threads = 1
staleness = 2
{workers}
[report]
evaluate_tokens = 160
sample_ids = true
"""


MEASURED = 'count = 2\nshares = "measured"'
CHAINS = 'count = 4\n[pipeline]\nstages = 2\n[precision]\ncompute = "float32"'


def written(path: Path, workers: str, steps: int) -> Path:
    """A job's file, and text beside it."""
    tiny.write_texts(path / "texts")
    file = path / "job.toml"
    file.write_text(FILE.format(workers=workers, tokens=128 * steps))
    return file


def finished(folder: RunFolder, steps: int) -> list[float]:
    """Losses of a run that is at its end, where every step was made once."""
    assert [line["step"] for line in read_lines(folder.samples)] == list(range(1, steps + 1))
    assert folder.status().phase == "finished" and folder.status().sent_bytes > 0
    found = curve(folder.path)
    assert len(found) == steps
    return found


@pytest.mark.live
def test_workers_of_their_own_finish_a_job(tmp_path: Path) -> None:
    found = read_job(written(tmp_path, MEASURED, 12))
    folder = RunFolder(found.path)
    begin(found, folder, console_of_nobody())
    launch(found, folder, lambda: None)
    losses_ = finished(folder, 12)
    assert losses_[-1] < 0.95 * losses_[0]


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("workers", [MEASURED, CHAINS], ids=["measured shares", "chains"])
def test_the_command_finishes_a_job(workers: str, tmp_path: Path) -> None:
    done = sanderling(written(tmp_path, workers, 40))
    assert done.returncode == 0 and "finished: step 40/40" in done.stdout, done.stderr
    losses_ = finished(RunFolder(tmp_path / "t"), 40)
    assert losses_[-1] < 0.8 * losses_[0]


def test_a_workers_bytes() -> None:
    """Weights and masters as computed with, a gradient, a share of masters and moments, and
    bound + 1 waves; own waves too, where plain SGD adds them to what is pulled."""
    workers = tiny.job().workers.model_copy(update={"staleness": 2, "count": WORKERS})
    assert bytes_of(workers=workers) == pytest.approx(2 + 4 + 4 + 12 / WORKERS + 4 * 3, rel=1e-4)
    sgd = tiny.job(optimizer={"name": "sgd", "beta1": 0.0}).optimizer
    found = bytes_of(workers=workers, optimizer=sgd)
    assert found == pytest.approx(2 + 4 + 4 + 4 / WORKERS + 4 * 3 * 2, rel=0.02)
