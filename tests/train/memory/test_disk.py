"""ZeRO-Infinity's disk tier: the curve, the weights and the state of a run in memory; its bytes."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.processes import on_ranks
from train.data.corpus import Corpus, open_corpus
from train.data.stream import SampleStream
from train.job import Job
from train.memory.disk import DiskTrainer
from train.memory.plan import disk_traffic
from train.precision import COMPUTE
from train.step import StepReport
from train.weights import read_start
from train.world import LocalWorld, World

MODEL = {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "feed_forward": 96}
TILES = {"offload": "disk", "tile_bytes": 16384}
"""Matrices of 64 x 96 float64 in three tiles each, embedding and output matrix in eight or nine."""


def job(**tables: Any) -> Job:
    tables = {"model": MODEL, "memory": {"offload": "disk"}} | tables
    tables["run"] = {"tokens": 16 * 12 * 3} | tables.get("run", {})
    return tiny.job(**tables)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    made: Path = tmp_path_factory.mktemp("corpus")
    return tiny.corpus(made)


def on_disk(wanted: Job, corpus: Corpus, folder: Path) -> DiskTrainer:
    torch.set_num_threads(1)
    stream = SampleStream(corpus.train, wanted.data.sequence_tokens, wanted.run.seed)
    return DiskTrainer(wanted, read_start(wanted), stream, folder)


def steps(trainer: Any, world: World | None = None) -> list[StepReport]:
    left = trainer.job.steps - trainer.step_number
    return [trainer.step(world or LocalWorld()) for _ in range(left)]


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - expected[name].double()).abs().max()) for name in expected
    )


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "tiles": {"memory": TILES},
    "untied": {"model": MODEL | {"tied_head": False}},
    "no clipping": {"optimizer": {"clip_norm": 0.0}},
    "one micro-batch": {"run": {"micro_batch_tokens": 16 * 12}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_that_of_memory(name: str, corpus: Corpus, tmp_path: Path):
    """Float64: losses, norms, weights and moments to 1e-12."""
    wanted = job(**CASES[name])
    plain, disk = tiny.trainer(wanted, corpus.train), on_disk(wanted, corpus, tmp_path)
    for found, expected in zip(steps(disk), steps(plain), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-12)
        assert (found.ids, found.learning_rate) == (expected.ids, expected.learning_rate)
    assert furthest(disk.state().tensors, plain.state().tensors) < 1e-12
    row = disk.stream.batch(0, 2)
    with torch.no_grad():
        assert float(disk.model.loss(row)) == pytest.approx(float(plain.model.loss(row)), rel=1e-12)
    disk.close()


def test_masters_of_bfloat16(corpus: Corpus, tmp_path: Path):
    wanted = job(precision={"compute": "bfloat16"})
    plain, disk = tiny.trainer(wanted, corpus.train), on_disk(wanted, corpus, tmp_path)
    for found, expected in zip(steps(disk), steps(plain), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
    state = disk.state()
    assert state.tensors.keys() == plain.state().tensors.keys()
    for name, master in state.of_kind("master").items():
        assert torch.equal(state.of_kind("param")[name], master.bfloat16())
    disk.close()


def test_a_gradient_that_is_lost_is_noticed(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The mutation: tiles whose gradient replaces the one before it."""
    wanted = job(memory=TILES)
    plain, disk = tiny.trainer(wanted, corpus.train), on_disk(wanted, corpus, tmp_path)
    monkeypatch.setattr(disk.model.touched, "__contains__", lambda _: False, raising=False)
    for tiles in disk.model.matrices.values():
        monkeypatch.setattr(tiles, "_touched", _Never())
    found, expected = disk.step(LocalWorld()), plain.step(LocalWorld())
    assert abs(found.gradient_norm - expected.gradient_norm) > 1e-3
    disk.close()


class _Never(set[int]):
    def __contains__(self, _: object) -> bool:
        return False


def test_a_state_goes_on_with_or_without_files(corpus: Corpus, tmp_path: Path):
    """Memory to files to memory, and a checkpoint of files in other files."""
    wanted = job()
    first = on_disk(wanted, corpus, tmp_path / "1")
    first.step(LocalWorld())
    state = first.state()
    state.tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    expected = [report.loss for report in steps(first)]
    second, plain = on_disk(wanted, corpus, tmp_path / "2"), tiny.trainer(wanted, corpus.train)
    for other in (second, plain):
        other.load(state)
        assert [r.loss for r in steps(other)] == pytest.approx(expected, rel=1e-12)
    for trainer in (first, second):
        trainer.close()


def test_a_state_of_another_model_is_refused(corpus: Corpus, tmp_path: Path):
    disk = on_disk(job(), corpus, tmp_path)
    other = tiny.trainer(job(model=MODEL | {"feed_forward": 128}), corpus.train)
    with pytest.raises(ValueError, match="gate_proj"):
        disk.load(other.state())
    disk.close()


def curve(world: World, corpus: str, folder: str) -> list[float]:
    """Losses of one of several workers."""
    wanted = job(memory=TILES)
    disk = on_disk(wanted, open_corpus(Path(corpus)), Path(folder))
    losses = [report.loss for report in steps(disk, world)]
    disk.close()
    return losses


def test_workers_sum_their_gradients(corpus: Corpus, tmp_path: Path):
    wanted = job(memory=TILES)
    tiny.corpus(tmp_path / "corpus")
    expected = [report.loss for report in steps(tiny.trainer(wanted, corpus.train))]
    for found in on_ranks(2, curve, str(tmp_path / "corpus"), str(tmp_path / "files")):
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["whole", "tiles", "untied", "one micro-batch"])
def test_bytes_are_the_plans(name: str, compute: str, corpus: Corpus, tmp_path: Path):
    wanted = job(**CASES[name] | {"precision": {"compute": compute}})
    disk = on_disk(wanted, corpus, tmp_path)
    disk.step(LocalWorld())
    disk.tier.settle()
    micros = -(-wanted.batch_samples // wanted.micro_samples)
    plan = disk_traffic(disk.layout, COMPUTE[compute], micros, workers=1)
    assert (disk.tier.read_bytes, disk.tier.written_bytes) == (plan.read_bytes, plan.written_bytes)
    disk.close()


def test_transfers_go_on_beside_computation(corpus: Corpus, tmp_path: Path):
    """On a disk that takes 20 ms for each transfer, which nobody's processor time is spent on: with
    read-ahead and write-behind a step waits for a good part of them less."""
    wanted = job(run={"micro_batch_tokens": 16 * 12})
    disk = on_disk(wanted, corpus, tmp_path)
    disk.tier.delay_s = 0.02
    waited = {}
    for ahead in (True, False):
        disk.tier.ahead = ahead
        begin, before_s = len(disk.tier.spans), time.monotonic()
        disk.step(LocalWorld())
        disk.tier.settle()
        took_s = time.monotonic() - before_s
        moved_s = sum(s.ended_s - s.started_s for s in list(disk.tier.spans)[begin:])
        waited[ahead] = took_s / moved_s
    assert waited[True] < 0.8 and waited[False] > 1
    disk.close()
