"""ZeRO-Infinity's disk tier: the curve, the weights and the state of a run in memory; its bytes."""

import threading
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
PATIENCE_S = 60.0
TILES = {"offload": "disk", "tile_bytes": 16384}
"""Matrices of 64 x 96 float64 in three tiles each, embedding and output matrix in eight or nine."""


def job(**tables: Any) -> Job:
    values: dict[str, dict[str, Any]] = {"model": MODEL, "memory": {"offload": "disk"}, "run": {}}
    values |= tables
    values["run"] = {"tokens": 16 * 12 * 3} | values["run"]
    return tiny.job(**values)


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
    for tiles in disk.model.matrices.values():
        monkeypatch.setattr(tiles, "_touched", _Forgetful(disk.model.touched))
    found, expected = disk.step(LocalWorld()), plain.step(LocalWorld())
    assert abs(found.gradient_norm - expected.gradient_norm) > 1e-3
    disk.close()


class _Forgetful:
    """A set that takes what it is given and never has it."""

    def __init__(self, behind: set[int]) -> None:
        self.add = behind.add

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


def test_transfers_go_on_beside_computation(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a clock: a layer is not done before the next one's read has begun, and a gradient is
    not written before the layer below is done. Neither could be, if the caller waited."""
    for ahead in (True, False):
        disk = on_disk(job(), corpus, tmp_path)
        disk.tier.ahead = ahead
        seen = _Watched(disk, monkeypatch, PATIENCE_S if ahead else 0.05)
        disk.step(LocalWorld())
        disk.tier.settle()
        assert seen.read_meanwhile == [ahead] * 2 and seen.written_meanwhile == [ahead] * 2
        disk.close()


class _Watched:
    """Holds a step up where reads and writes are to go on meanwhile."""

    def __init__(self, disk: DiskTrainer, patch: pytest.MonkeyPatch, patience_s: float) -> None:
        layers = disk.layout.layers
        self.read_meanwhile: list[bool] = []
        self.written_meanwhile: list[bool] = []
        begun = [threading.Event() for _ in layers]
        done = [threading.Event() for _ in layers]
        numbers = {segment.number: number for number, segment in enumerate(layers)}
        transfer, forward = disk.tier._transfer, disk.model._forward
        turned = threading.Event()

        def transferred(call: Any, kind: str, segment: Any, buffer: Any, write: bool) -> None:
            number = numbers.get(segment.number)
            if number is not None and kind == "param" and not write:
                begun[number].set()
            if number and kind == "gradient" and write:
                self.written_meanwhile.append(done[number - 1].wait(patience_s))
            transfer(call, kind, segment, buffer, write)

        def computed(number: int, values: Any, x: Any) -> Any:
            out = compute(number, values, x)
            if not turned.is_set() and number + 1 < len(layers):
                found = begun[number + 1].wait(patience_s)
                self.read_meanwhile += [found] if len(self.read_meanwhile) == number else []
            return out

        def turn(micros: Any) -> Any:
            found = forward(micros)
            turned.set()
            return found

        def kept(segment: Any, *rest: Any) -> None:
            if segment.number in numbers:
                done[numbers[segment.number]].set()
            keep(segment, *rest)

        compute, keep = disk.model._layer, disk.model._keep
        patch.setattr(disk.tier, "_transfer", transferred)
        patch.setattr(disk.model, "_layer", computed)
        patch.setattr(disk.model, "_forward", turn)
        patch.setattr(disk.model, "_keep", kept)
