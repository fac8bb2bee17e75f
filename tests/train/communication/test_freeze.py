"""When 1-bit Adam freezes its variance: the rule against a plain one, the same on all ranks, and
over a restart."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.communication.learning import job, losses
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.checkpoint.local import LocalStorage
from train.checkpoint.states import StoredCheckpoints
from train.communication.freeze import UNDECIDED, Freeze
from train.communication.onebit import OneBitAdam
from train.data.corpus import open_corpus

BETA2 = 0.8
WINDOW = 5
AUTO: dict[str, Any] = {"compression": {"kind": "onebit"}, "optimizer": {"beta2": BETA2}}


def plainly(norms: list[float], rises: int, holds: int = WINDOW) -> int:
    """norms[k]: after k + 1 steps, without bias. The first step before which as many ratios in a
    row as `holds`, all after the rise, were stable."""
    good = [
        k + 1 > max(rises, WINDOW) and norms[k] / norms[k - WINDOW] >= 0.96
        for k in range(len(norms))
    ]
    for k in range(len(norms)):
        if k + 1 >= holds and all(good[k + 1 - holds : k + 1]):
            return k + 2
    return UNDECIDED


def decided(world: ThreadWorld, norms: list[float], rises: int, off: float = 0.0) -> int:
    """By the rule, from variances of such norms; off: what rank 0 measures too much, late."""
    freeze, link = Freeze(None, BETA2, rises), ThreadTransport(world)
    for step in range(1, len(norms) + 2):
        if step > 1:
            grown = norms[step - 2] * (1 - BETA2 ** (step - 1))
            variance = torch.full((10,), grown / 10, dtype=torch.float64)
            wrong = off if world.rank == 0 and step > 20 else 0
            freeze.agree(variance * (1 + wrong), step - 1, link)
        freeze.look(step)
    return freeze.steps


def series(kind: str) -> list[float]:
    chance = random.Random(kind)
    noise = [chance.uniform(0.98, 1.02) for _ in range(60)]
    if kind == "falling":
        return [0.98**k for k in range(60)]
    if kind == "held by clipping at first":
        return [1.0 if k < 8 else 0.3 + 0.7 * 0.9 ** (k - 8) for k in range(60)]
    return [(1 + 9 * 0.85**k) * noise[k] for k in range(60)]


@pytest.mark.parametrize("rises", [0, 30])
@pytest.mark.parametrize("kind", ["falling", "held by clipping at first", "noisy"])
def test_the_rule_is_the_plain_one(kind: str, rises: int):
    norms = series(kind)
    [mine] = on_threads(1, decided, norms, rises)
    assert mine == plainly(norms, rises)
    assert (mine == UNDECIDED) == (kind == "falling")
    assert mine > rises


def test_one_ratio_alone_is_too_early():
    """The mutation: the paper's rule to the letter is met while clipping holds the norm."""
    norms = series("held by clipping at first")
    assert plainly(norms, 0, holds=1) == WINDOW + 2 < plainly(norms, 0) - 20


def test_ranks_that_measure_differently_decide_alike():
    """Two ranks on either side of the threshold, of which alone only one would freeze."""
    norms = [(0.96 * (1 - 5e-5)) ** (k / WINDOW) for k in range(40)]
    alone = [on_threads(1, decided, norms, 0, off)[0] for off in (4e-4, 0.0)]
    assert alone[0] < alone[1] == UNDECIDED
    together = on_threads(2, decided, norms, 0, 4e-4)
    assert together[0] == together[1] < UNDECIDED


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus")
    tiny.corpus(path)
    return path


def test_a_job_freezes_by_its_own_variance(corpus: Path):
    """Adam's, measured from outside; and from then on it sends a thirtieth."""
    norms: list[float] = []

    def watched(training: Any) -> None:
        update = training.optimizer.update

        def also(step: int, rate: float) -> None:
            update(step, rate)
            if len(norms) < step:
                variance = training.optimizer.exp_avg_sq
                norms.append(float(variance.double().norm(1)) / (1 - BETA2**step))

        training.optimizer.update = also

    losses(corpus, job(60, optimizer={"beta2": BETA2}), watched, size=1)
    expected = plainly(norms, rises=3)
    assert 10 < expected < 55
    found = losses(corpus, job(60, **AUTO))
    assert found["freeze"].steps == expected
    assert found["dense"] / found["sent"] >= 30


def go(world: ThreadWorld, tokens: Any, folder: Path, steps: int, forget: bool = False) -> Any:
    """Losses of the next steps of a run, from its newest checkpoint, and when it freezes."""
    training = tiny.trainer(job(60, **AUTO), tokens)
    training.exchange.transport = ThreadTransport
    store = StoredCheckpoints(LocalStorage(folder))
    if (state := store.newest()) is not None:
        if forget:
            state.tensors["freeze/step"] = torch.zeros_like(state.tensors["freeze/step"])
        training.load(state)
    told = [training.step(world).loss for _ in range(steps)]
    store.save(training.state(), world)
    assert isinstance(training.optimizer, OneBitAdam)
    return told, training.optimizer.freeze.steps


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_run_goes_on_to_the_bit(cut: str, corpus: Path, tmp_path: Path):
    """Stopped before it freezes, or after; the mutation forgets that it has frozen."""
    tokens = open_corpus(corpus).train
    whole, frozen = on_threads(2, go, tokens, tmp_path / "whole", 50)[0]
    assert 10 < frozen < 45
    at = frozen - 3 if cut == "before" else frozen + 3
    first, _ = on_threads(2, go, tokens, tmp_path / cut, at)[0]
    second, again = on_threads(2, go, tokens, tmp_path / cut, 50 - at)[0]
    assert again == frozen and first + second == whole
    if cut == "after":
        on_threads(2, go, tokens, tmp_path / "torn", at)
        torn, _ = on_threads(2, go, tokens, tmp_path / "torn", 50 - at, True)[0]
        assert torn != second


def test_a_number_is_taken_as_it_is():
    wanted = job(compression={"kind": "onebit", "warmup_steps": 7})
    freeze = Freeze(wanted.compression.given_steps, BETA2, 0)
    assert freeze.steps == 7 and freeze.tensors() == {}
    assert job(compression={"kind": "onebit"}).compression.given_steps is None
    assert job(compression={"kind": "qsgd"}).compression.given_steps == 100


@pytest.mark.parametrize("value", [-1, "soon", 1.5])
def test_another_value_is_refused(value: Any):
    with pytest.raises(ValueError, match="warmup_steps"):
        job(compression={"kind": "onebit", "warmup_steps": value})
