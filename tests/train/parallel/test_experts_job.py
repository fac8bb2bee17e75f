"""Jobs with `model.experts`: replicas that share them have the curve of one worker that holds all,
whatever travels; go on from each other's checkpoints; and export what Mixtral's readers read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.parallel.test_mesh_job import curve, follow, going_on, laid
from tests.train.processes import on_ranks
from tests.train.test_run import job, losses, make
from train.checkpoints import open_checkpoints
from train.folder import RunFolder
from train.job import Job
from train.learner import Learner
from train.parallel import mesh_trainer
from train.parallel.mesh_job import MeshLearner
from train.parallel.mesh_state import Replicated
from train.parallel.tensor_exchange import total
from train.run import Run
from train.world import GlooWorld, LocalWorld

RANKS, STEPS = 4, 6
MIXTURE = {"experts": 4, "experts_per_token": 2, "balance": 0.0}
"""Without the loss for balance, which is of each worker's own tokens."""
MESHES: dict[str, dict[str, Any]] = {
    "ep x dp": {"expert": 2},
    "ep, weights travel": {"expert": 4, "expert_travel": "weights"},
    "ep x ring": {"expert": 2, "sequence": 2},
}


def wanted(path: Path, kind: str, **tables: Any) -> Job:
    name = kind.replace(" ", "-").replace(",", "")
    settings = {"workers": {"count": RANKS}, "mesh": MESHES[kind], "model": MIXTURE, **tables}
    return laid(job(path, name, **settings))


def mixture(learner: Learner) -> MeshLearner:
    assert isinstance(learner, MeshLearner)
    return learner


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One worker that has all experts, to the end."""
    run = make(job(tmp_path_factory.mktemp("alone"), "alone", model=MIXTURE))
    run.run(LocalWorld())
    return run


def test_one_curve_and_each_goes_on_from_another(tmp_path: Path, alone: Run):
    going_on(tmp_path, tuple(MESHES), alone, wanted, MIXTURE)


def unshared(world: GlooWorld, path: str) -> None:
    """With gradients of experts summed over all replicas, as if all had the same ones."""

    def reduce(state: Replicated) -> None:
        for axis in (state.model.mesh.data, state.model.mesh.sequence):
            total(state.flat.gradient, axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicated, "reduce", reduce)
        follow(world, path)


def test_with_gradients_of_other_experts_the_curve_is_another(tmp_path: Path, alone: Run):
    wrong = wanted(tmp_path, "ep x dp")
    on_ranks(RANKS, unshared, str(wrong.path))
    found = curve(wrong.path)
    assert len(found) == STEPS and found != pytest.approx(losses(alone), abs=1e-6)


def uneven_passes(world: GlooWorld, path: str) -> list[int]:
    """Rows of each pass of a rank."""
    sizes: list[int] = []
    real = mesh_trainer.MeshTrainer._portions

    def counted(trainer: Any, *given: int) -> Any:
        for tokens, weight in real(trainer, *given):
            sizes.append(len(tokens) if weight else 0)
            yield tokens, weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_trainer.MeshTrainer, "_portions", counted)
        follow(world, path)
    return sizes


def test_who_has_fewer_samples_helps_in_the_passes_of_others(tmp_path: Path):
    """Five samples for four replicas: two passes for each, one of them without weight for three."""
    tables: dict[str, Any] = {"run": {"tokens": 16 * 5 * 2, "batch_tokens": 16 * 5}}
    tables["run"] |= {"micro_batch_tokens": 16}
    run = make(job(tmp_path / "one", "one", model=MIXTURE, **tables))
    run.run(LocalWorld())
    shared = wanted(tmp_path, "ep x dp", **tables)
    passes = on_ranks(RANKS, uneven_passes, str(shared.path))
    assert sorted(passes) == [[1, 0, 1, 0]] * 3 + [[1, 1, 1, 1]]
    assert curve(shared.path) == pytest.approx(losses(run), abs=1e-9)


def tuned(world: GlooWorld, path: str) -> list[int | None]:
    """Degrees of parallelism by step."""
    folder = RunFolder(Path(path))
    job_ = folder.job()
    run = Run(job_, folder, open_checkpoints(job_, folder.checkpoints))
    trainer = mixture(run.trainer)
    trainer.enter(world)
    degrees: list[int | None] = []
    for _ in range(STEPS):
        run.trainer.step(world)
        degrees.append(trainer.trainer.travel.degree)
    return degrees


def test_what_travels_is_tried_and_chosen_alike(tmp_path: Path):
    mesh = {"expert": 2, "expert_travel": "auto"}
    auto = wanted(tmp_path, "ep x dp", mesh=mesh, run={"deterministic": False})
    degrees = on_ranks(RANKS, tuned, str(auto.path))
    assert degrees == degrees[:1] * RANKS
    assert degrees[0][:4] == [0, 0, 1, 1] and degrees[0][4] in (0, 1)


def test_transformers_reads_the_export(alone: Run):
    """As Mixtral: the same held-out text costs the same."""
    from transformers import MixtralForCausalLM

    path = alone.folder.path
    theirs, told = MixtralForCausalLM.from_pretrained(
        path, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
        cost = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="sum"
        )
        ours = mixture(alone.trainer).trainer.model.loss(tokens, balanced=False)
    assert float(ours) == pytest.approx(float(cost), abs=1e-6)


def test_balance_is_in_the_loss_that_steps_go_by(tmp_path: Path):
    """And left out where that is asked for, as evaluations do."""
    run = make(job(tmp_path, "balanced", model={**MIXTURE, "balance": 0.5}))
    run.run(LocalWorld())
    model = mixture(run.trainer).trainer.model
    tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        more = float(model.loss(tokens) - model.loss(tokens, balanced=False)) / (2 * 16)
    assert more >= 0.5 - 1e-9, "it is least where all are seen alike, and 1 there"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "uneven": ({"mesh": {"expert": 3}, "workers": {"count": 6}}, "a divisor of 4 is accepted"),
    "few replicas": (
        {"mesh": {"expert": 4}, "workers": {"count": 2}},
        "must be a divisor of the 2",
    ),
    "tensor": ({"mesh": {"tensor": 2}, "workers": {"count": 2}}, "mesh.tensor = 1 is accepted"),
    "shards": ({"mesh": {"full_shard": True}}, "mesh.full_shard = false is accepted"),
    "auto": (
        {"mesh": {"expert": 2, "expert_travel": "auto"}, "workers": {"count": 2}},
        "run.deterministic = false is accepted",
    ),
    "travel of nothing": ({"mesh": {"expert_travel": "weights"}}, "mesh.expert is 2 or more"),
    "no experts": ({"model": {"experts": 0}, "mesh": {"expert": 2}}, "model.experts is 2 or more"),
    "one": ({"model": {"experts": 1, "experts_per_token": 1}}, "0, or 2 and more, is accepted"),
    "too many": ({"model": {"experts_per_token": 5}}, "at most experts = 4 is accepted"),
    "a start": ({"model": {"start_from": "default"}}, "0 is accepted"),
    "pipeline": ({"pipeline": {"stages": 2}, "workers": {"count": 2}}, "0 is accepted"),
    "stale": ({"workers": {"staleness": 1, "count": 2}}, "model.experts = 0 is accepted"),
    "zero": ({"sharding": {"stage": 1}, "workers": {"count": 2}}, "model.experts = 4 does not go"),
    "memory": ({"memory": {"activations": "mesa"}}, '"keep" is accepted'),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_go_together(name: str, tmp_path: Path):
    tables, sentence = REFUSALS[name]
    base = {"experts": 4} if tables.get("model", {}).get("experts") != 0 else {}
    with pytest.raises(ValueError, match=sentence):
        job(tmp_path, "refused", **{**tables, "model": {**base, **tables.get("model", {})}})
