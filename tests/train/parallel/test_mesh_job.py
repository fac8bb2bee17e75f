"""Jobs with `[mesh]` on four workers: the curve of one worker, checkpoints that anybody goes on
from, what the dry run says; and these with the mechanism behind them turned off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.train.processes import on_ranks
from tests.train.test_run import job, losses, make
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.estimate import estimate
from train.folder import RunFolder
from train.job import Job
from train.parallel import mesh_pieces, tensor_exchange
from train.parallel.mesh import Axis
from train.parallel.mesh_job import MeshLearner
from train.run import Run
from train.view import console_of_nobody, estimate_table
from train.world import GlooWorld, LocalWorld, World

RANKS, STEPS = 4, 6
FOUR_HEADS = {"kv_heads": 4}
MESHES: dict[str, dict[str, Any]] = {
    "dp x tp": {"tensor": 2},
    "fsdp x tp": {"tensor": 2, "full_shard": True},
    "ring x dp": {"sequence": 2},
    "tp of four and sp": {"tensor": 4, "sequence_parallel": True},
    "fsdp": {"full_shard": True},
    "ulysses x tp": {"tensor": 2, "sequence": 2, "sequence_kind": "ulysses"},
    "fsdp x ring": {"sequence": 2, "full_shard": True},
}
QUICK = ("fsdp x tp", "ring x dp", "tp of four and sp")


def wanted(path: Path, kind: str, **tables: Any) -> Job:
    name = kind.replace(" ", "-")
    settings = {"workers": {"count": RANKS}, "mesh": MESHES[kind], "model": FOUR_HEADS, **tables}
    return laid(job(path, name, **settings))


def laid(found: Job) -> Job:
    begin(found, RunFolder(found.path), console_of_nobody())
    return found


def follow(world: World, path: str, stop_at: int = 0) -> int:
    """A worker of the run in a folder, from where it is to its end, or to a step; the step it went
    on from."""
    folder = RunFolder(Path(path))
    job_ = folder.job()
    run = Run(job_, folder, open_checkpoints(job_, folder.checkpoints))
    run.resume(world)
    found = run.trainer.step_number
    if not stop_at:
        run.run(world)
        return found
    while run.trainer.step_number < stop_at:
        run.trainer.step(world)
    run.save_now(world)
    return found


def follow_all(world: GlooWorld, folders: list[str], stop_at: int = 0) -> list[int]:
    """One after another, so that the processes start once."""
    return [follow(world, path, stop_at) for path in folders]


def curve(path: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(path).read_metrics() if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One worker that holds everything, to the end."""
    run = make(job(tmp_path_factory.mktemp("alone"), "alone", model=FOUR_HEADS))
    run.run(LocalWorld())
    return run


def going_on(
    path: Path, kinds: tuple[str, ...], alone: Run, wanted: Callable[[Path, str], Job], model: Any
) -> None:
    """Each mesh from the beginning to the end; then each from the half-way checkpoint of another,
    the first one from one worker's; and one worker from the last one's. All with one curve.
    wanted: the job of a kind, below a folder; model: its table."""
    whole = [wanted(path / "whole", kind) for kind in kinds]
    on_ranks(RANKS, follow_all, [str(each.path) for each in whole])
    half = [wanted(path / "half", kind) for kind in kinds]
    on_ranks(RANKS, follow_all, [str(each.path) for each in half], STEPS // 2)
    one = laid(job(path / "half", "one", model=model))
    follow(LocalWorld(), str(one.path), STEPS // 2)
    rest = [wanted(path / "rest", kind) for kind in kinds]
    for before, after in zip([one, *half[:-1]], rest, strict=True):
        (before.path / "checkpoints").rename(after.path / "checkpoints")
    steps = on_ranks(RANKS, follow_all, [str(each.path) for each in rest])
    assert steps == [[STEPS // 2] * len(kinds)] * RANKS
    last = laid(job(path / "rest", "last", model=model))
    (half[-1].path / "checkpoints").rename(last.path / "checkpoints")
    assert follow(LocalWorld(), str(last.path)) == STEPS // 2
    expected, bits = losses(alone), alone.folder.status().bits_per_byte
    for each in (*whole, *rest, last):
        found = curve(each.path)
        assert found == pytest.approx(expected[-len(found) :], abs=1e-9), each.name
        assert RunFolder(each.path).status().bits_per_byte == pytest.approx(bits, abs=1e-9)
        assert len(found) == (STEPS if each in whole else STEPS // 2)
        same_weights(each, alone)


def same_weights(found: Job, alone: Run) -> None:
    """Both what a mesh has exported and what another reads of its last checkpoint."""
    from safetensors.torch import load_file

    exported = load_file(found.path / "model.safetensors")
    for name, tensor in load_file(alone.folder.path / "model.safetensors").items():
        torch.testing.assert_close(exported[name], tensor, atol=1e-9, rtol=0)
    checkpoint = open_checkpoints(found, found.path / "checkpoints").find()
    assert checkpoint is not None and checkpoint.step == STEPS
    for piece in alone.trainer.pieces(LocalWorld()):
        read = checkpoint.tensor(piece.name)
        torch.testing.assert_close(read.flatten(), piece.data, atol=1e-9, rtol=0)


def test_one_curve_and_each_goes_on_from_another(tmp_path: Path, alone: Run):
    going_on(tmp_path, QUICK, alone, wanted, FOUR_HEADS)


@pytest.mark.slow
def test_all_meshes_go_on_from_each_other(tmp_path: Path, alone: Run):
    going_on(tmp_path, tuple(reversed(MESHES)), alone, wanted, FOUR_HEADS)


def faulty(world: GlooWorld, path: str, fault: str) -> None:
    """The same with something turned off, from the beginning or from where the run is."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "no sum":  # what comes out of a split matrix is not added up
            patch.setattr(tensor_exchange, "total", lambda x, axis: x)
        elif fault == "no exchange":  # each writes its own columns all over the row
            patch.setattr(mesh_pieces, "whole_rows", own_columns)
        follow(world, path)


def own_columns(block: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, int]:
    cuts = [len(block) * rank // axis.size for rank in range(axis.size + 1)]
    first, last = cuts[axis.rank], cuts[axis.rank + 1]
    return block[first:last].repeat(1, axis.size), first


def test_without_the_sums_of_matrices_the_curve_is_another(tmp_path: Path, alone: Run):
    job_ = wanted(tmp_path, "dp x tp")
    on_ranks(RANKS, faulty, str(job_.path), "no sum")
    found = curve(job_.path)
    assert len(found) == STEPS and found != pytest.approx(losses(alone), abs=1e-6)


def test_without_the_exchange_of_columns_a_checkpoint_is_another(tmp_path: Path, alone: Run):
    """The run itself is not changed by it."""
    job_ = wanted(tmp_path, "dp x tp")
    on_ranks(RANKS, faulty, str(job_.path), "no exchange")
    assert curve(job_.path) == pytest.approx(losses(alone), abs=1e-9)
    with pytest.raises(AssertionError, match="not close"):
        same_weights(job_, alone)


BFLOAT16 = {"precision": {"compute": "bfloat16"}}


@pytest.mark.parametrize("kind", ["dp x tp", pytest.param("fsdp x tp", marks=pytest.mark.slow)])
def test_the_same_mesh_goes_on_to_the_bit_in_bfloat16(kind: str, tmp_path: Path):
    """Masters and weights come back as they were."""
    whole, parts = (wanted(tmp_path / name, kind, **BFLOAT16) for name in ("whole", "parts"))
    on_ranks(RANKS, follow, str(whole.path))
    on_ranks(RANKS, follow, str(parts.path), STEPS // 2)
    assert on_ranks(RANKS, follow, str(parts.path)) == [STEPS // 2] * RANKS
    assert curve(parts.path) == curve(whole.path)[STEPS // 2 :]


def test_replicas_with_fewer_samples_share_weights_too(tmp_path: Path):
    """Ten samples for four replicas, two at once: who has none left still makes its passes."""
    uneven = {"run": {"tokens": 160 * 3, "batch_tokens": 160}}
    one = make(job(tmp_path, "one", model=FOUR_HEADS, **uneven))
    one.run(LocalWorld())
    job_ = wanted(tmp_path, "fsdp", **uneven)
    on_ranks(RANKS, follow, str(job_.path))
    assert curve(job_.path) == pytest.approx(losses(one), abs=1e-9) and len(losses(one)) == 3


@pytest.mark.slow
def test_checkpoints_beside_training_change_nothing(tmp_path: Path):
    """`resilience.mode = "checkfreq"`: pieces are copied while the next step is computed."""
    long = {"run": {"tokens": 16 * 12 * 24}}
    plain = wanted(tmp_path / "plain", "dp x tp", **long)
    beside = wanted(
        tmp_path / "beside", "dp x tp", resilience={"mode": "checkfreq", "slowdown": 1.0}, **long
    )
    on_ranks(RANKS, follow_all, [str(plain.path), str(beside.path)])
    assert curve(beside.path) == curve(plain.path) and len(curve(plain.path)) == 24
    told = (RunFolder(beside.path).log / "checkpoints.jsonl").read_text()
    assert '"persist_s"' in told and '"failure": ""' in told


def announced(world: GlooWorld, path: str) -> int:
    """How often the state was still as before when a change of it was announced."""
    folder = RunFolder(Path(path))
    job_ = folder.job()
    run = Run(job_, folder, open_checkpoints(job_, folder.checkpoints))
    run.resume(world)

    def weights() -> torch.Tensor:
        return torch.cat([piece.data.flatten().clone() for piece in run.trainer.pieces(world)])

    seen: list[torch.Tensor] = []
    run.trainer.before_update = lambda: seen.append(weights())
    count = 0
    for _ in range(2):
        before = weights()
        run.trainer.step(world)
        count += torch.equal(seen[-1], before) and not torch.equal(weights(), before)
    return count


def test_the_state_changes_after_it_was_announced(tmp_path: Path):
    for kind in ("dp x tp", "fsdp x tp"):
        assert on_ranks(RANKS, announced, str(wanted(tmp_path, kind).path)) == [2] * RANKS


def other_models(world: GlooWorld, path: str) -> str:
    folder = RunFolder(Path(path))
    job_ = folder.job()
    run = Run(job_, folder, open_checkpoints(job_, folder.checkpoints))
    try:
        run.resume(world)
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    one = laid(job(tmp_path, "one", model=FOUR_HEADS | {"feed_forward": 64}))
    follow(LocalWorld(), str(one.path), 1)
    job_ = wanted(tmp_path, "dp x tp")
    (one.path / "checkpoints").rename(job_.path / "checkpoints")
    for said in on_ranks(RANKS, other_models, str(job_.path)):
        assert "needs (48, 32), found shape (64, 32)" in said


def test_one_worker_is_a_mesh_of_one(tmp_path: Path, alone: Run):
    """`full_shard` with nobody to share with: what a run of four goes on as on one."""
    run = make(job(tmp_path, "one", model=FOUR_HEADS, workers={"count": 1}, mesh=MESHES["fsdp"]))
    assert isinstance(run.trainer, MeshLearner)
    run.run(LocalWorld())
    assert losses(run) == pytest.approx(losses(alone), abs=1e-9)


@pytest.mark.usefixtures("unrehearsed")
def test_the_dry_run_says_it(tmp_path: Path):
    """Bytes of the state by hand: two workers to a matrix, in float64 weights, gradients and two
    moments; half of every matrix and all of the norms."""
    wanted_ = job(tmp_path, "dry", model=FOUR_HEADS, workers={"count": 4}, mesh={"tensor": 2})
    told = estimate(wanted_)
    half = 272 * 32 // 2 + 2 * (4 * 32 * 32 + 3 * 32 * 48) // 2
    assert told.state_bytes == 8 * 4 * (half + 5 * 32)
    assert told.parameters == 2 * half + 5 * 32 and told.step_s == 2.0
    console = Console(record=True, width=200)
    console.print(estimate_table(wanted_, told))
    said = console.export_text()
    for words in ("2 replicas, each of 2 workers to a matrix", "MiB replicas", "MiB of a matrix"):
        assert words in said
    assert "of tensors per worker at their most" in said and "of a sequence" not in said
    assert "700 MiB per worker at most" in said and "a rehearsal of 5 steps" in said
