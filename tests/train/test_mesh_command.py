"""`sanderling train` of jobs with `[mesh]`: the curve, the held-out loss and the weights of one
worker, also where the run was stopped and went on with fewer workers."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_train_command import (
    DEADLINE_S,
    ROOT,
    _every_sample_once,
    _wait_for,
    command,
    sanderling,
    write_job,
)
from train.folder import RunFolder

STEPS = 200
MESHES = {
    "dp x tp": "tensor = 2",
    "fsdp x tp": "tensor = 2\nfull_shard = true",
    "ring x dp": "sequence = 2",
    "ulysses x dp": 'sequence = 2\nsequence_kind = "ulysses"',
    "tp and sp x dp": "tensor = 2\nsequence_parallel = true",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(MESHES)[1:]]


def write_mesh(path: Path, mesh: str) -> Path:
    file = write_job(path, STEPS)
    text = file.read_text().replace("[workers]", "[workers]\ncount = 4")
    file.write_text(f"{text}\n[mesh]\n{MESHES[mesh]}\n")
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One worker."""
    path = tmp_path_factory.mktemp("alone")
    done = sanderling(write_job(path, STEPS), "--workers", "1")
    assert done.returncode == 0, done.stderr
    return RunFolder(path / "t")


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.read_metrics() if "loss" in line]


def same(found: RunFolder, wanted: RunFolder) -> None:
    assert len(losses(found)) == STEPS
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-9)
    told, expected = found.status(), wanted.status()
    assert told.phase == "finished" == expected.phase
    assert told.bits_per_byte == pytest.approx(expected.bits_per_byte, abs=1e-9)
    ours, theirs = (load_file(run.path / "model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-9, rtol=0)


@pytest.mark.live
@pytest.mark.parametrize("mesh", ["dp x tp", *SLOW])
def test_a_mesh_trains_as_one_worker_does(mesh: str, tmp_path: Path, alone: RunFolder):
    done = sanderling(write_mesh(tmp_path, mesh))
    assert done.returncode == 0, done.stderr
    same(RunFolder(tmp_path / "t"), alone)
    _every_sample_once(RunFolder(tmp_path / "t"), STEPS)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp x tp", "ring x dp"])
def test_a_mesh_is_stopped_and_goes_on_with_fewer_workers(
    mesh: str, tmp_path: Path, alone: RunFolder
):
    """Four workers, then two, which make one replica; a number that makes none is refused."""
    file, folder = write_mesh(tmp_path, mesh), RunFolder(tmp_path / "t")
    running = subprocess.Popen(command(file), cwd=ROOT)
    try:
        _wait_for(lambda: folder.status().step >= 2)
        folder.ask_to_stop()
        assert running.wait(DEADLINE_S) == 0
    finally:
        running.kill()
    assert folder.status().phase == "stopped" and 2 <= folder.status().step < STEPS
    refused = sanderling("resume", tmp_path / "t", "--workers", "3")
    assert refused.returncode == 2 and "workers.count = 3 must be a multiple" in refused.stderr
    done = sanderling("resume", tmp_path / "t", "--workers", "2")
    assert done.returncode == 0, done.stderr
    same(folder, alone)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]


BROKEN = """
import train.parallel.tensor_exchange
train.parallel.tensor_exchange.total = lambda x, axis: x
"""


@pytest.mark.live
@pytest.mark.slow
def test_without_sums_over_a_matrix_the_curve_is_another(tmp_path: Path, alone: RunFolder):
    """The mutation, in the workers that the command starts."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        command(write_mesh(tmp_path, "dp x tp")),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    found = losses(RunFolder(tmp_path / "t"))
    assert len(found) == STEPS and found != pytest.approx(losses(alone), abs=1e-6)
