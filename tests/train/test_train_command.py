"""`sanderling train` with real workers: train, stop, look, go on; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from tests.train import tiny
from train.commands import train
from train.folder import RunFolder

ROOT = Path(__file__).parents[2]
DEADLINE_S = 280.0

JOB = """
name = "t"
folder = "."
[model]
layers = 1
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
[precision]
compute = "float64"
[resilience]
checkpoint_every_steps = 4
[workers]
threads = 1
[report]
evaluate_tokens = 160
sample_ids = true
"""


def command(*arguments: str | Path) -> list[str]:
    code = "import sys; from cluster.cli import main; main(sys.argv[1:])"
    return [sys.executable, "-c", code, "train", *map(str, arguments)]


def sanderling(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )


def write_job(path: Path, steps: int) -> Path:
    tiny.write_texts(path / "texts")
    file = path / "job.toml"
    file.write_text(JOB.format(tokens=128 * steps))
    return file


@pytest.mark.live
def test_a_run_is_stopped_shown_and_finished(tmp_path: Path):
    """On two workers, then one; each step once, each sample once, and no process stays."""
    job = write_job(tmp_path, 300)
    folder = RunFolder(tmp_path / "t")
    running = subprocess.Popen(command(job), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: folder.status().step >= 2)
        with pytest.raises(ValueError, match="being trained already"), folder.locked():
            pass
        stopped = CliRunner().invoke(train, ["stop", str(tmp_path / "t")])
        assert stopped.exit_code == 0 and "/300" in stopped.output
        assert running.wait(DEADLINE_S) == 0
    finally:
        running.kill()
    step = folder.status().step
    assert folder.status().phase == "stopped" and 2 <= step < 300
    shown = CliRunner().invoke(train, ["status", str(job)])
    assert f"{step} of 300" in shown.output and "stopped" in shown.output
    done = sanderling("resume", tmp_path / "t", "--workers", "1")
    assert done.returncode == 0 and "finished: step 300/300" in done.stdout, done.stderr
    steps = [line["step"] for line in folder.read_metrics() if "loss" in line]
    assert steps == list(range(1, 301))
    _every_sample_once(folder, 300)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]


def _every_sample_once(folder: RunFolder, steps: int) -> None:
    """Over all epochs: counts differ by at most one."""
    counts: dict[int, int] = {}
    for file in folder.log.glob("samples.jsonl"):
        for line in file.read_text().splitlines():
            for number in json.loads(line)["ids"]:
                counts[number] = counts.get(number, 0) + 1
    assert sum(counts.values()) == steps * 8 and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.live
def test_a_killed_worker_ends_all_and_the_run_goes_on(tmp_path: Path):
    job = write_job(tmp_path, 400)
    folder = RunFolder(tmp_path / "t")
    running = subprocess.Popen(command(job), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: folder.status().step >= 5)
        workers = psutil.Process(running.pid).children()
        os.kill(workers[1].pid, signal.SIGKILL)
        _, told = running.communicate(timeout=DEADLINE_S)
    finally:
        running.kill()
    assert running.returncode == 1 and "ended by signal 9" in told
    assert not any(worker.is_running() for worker in workers)
    assert folder.status().phase == "failed"
    lost = folder.status().step
    resumed = subprocess.Popen(command(job), cwd=ROOT)
    try:
        _wait_for(lambda: folder.status().step > lost)
        resumed.send_signal(signal.SIGINT)
        assert resumed.wait(DEADLINE_S) == 0
    finally:
        resumed.kill()
    steps = [line["step"] for line in folder.read_metrics()]
    assert steps == list(range(1, len(steps) + 1)) and folder.status().phase == "stopped"


@pytest.mark.live
@pytest.mark.parametrize("where", ["local", pytest.param("elastic", marks=pytest.mark.slow)])
def test_a_stop_that_every_process_hears_leaves_a_checkpoint(where: str, tmp_path: Path):
    """As `ray job stop` does it: SIGTERM to the command and to all below it."""
    job, folder = write_job(tmp_path, 300), RunFolder(tmp_path / "t")
    text = job.read_text().replace("checkpoint_every_steps = 4", "checkpoint_every_steps = 0")
    job.write_text(text.replace("[workers]", f'[workers]\nwhere = "{where}"'))
    running = subprocess.Popen(command(job), cwd=ROOT)
    try:
        _wait_for(lambda: folder.status().step >= 2)
        below = psutil.Process(running.pid).children(recursive=True)
        assert len(below) >= 2
        for process in [*below, psutil.Process(running.pid)]:
            process.terminate()
        assert running.wait(DEADLINE_S) == 0
    finally:
        running.kill()
    step = folder.status().step
    assert folder.status().phase == "stopped" and 2 <= step < 300
    assert [path.name[:13] for path in folder.checkpoints.iterdir()] == [f"step-{step:08d}"]


def test_a_run_that_would_go_with_its_ray_job_is_refused(tmp_path: Path):
    home = tmp_path / "working_dir_files" / "_ray_pkg_1"
    home.mkdir(parents=True)
    said = sanderling(write_job(home, 10))
    assert said.returncode == 2 and "Ray deletes when the job ends" in said.stderr
    assert not (home / "t" / "job.json").exists()


UNTIED = "[model]\ntied_head = false"
BY_COMMAND = {
    "checkfreq": ("", 'mode = "checkfreq"\nslowdown = 1.0', "count = 2"),
    "sharded": ("[sharding]\nstage = 3", "", "count = 4"),
    "gemini": ("[sharding]\nstage = 1", 'mode = "gemini"', "count = 3"),
    "bamboo": ("[pipeline]\nstages = 3", 'mode = "bamboo"', "count = 3"),
    "oobleck": ("[pipeline]\nstages = 1", 'mode = "oobleck"', "count = 3"),
    "varuna": ("[pipeline]\nstages = 2", 'mode = "varuna"', "count = 3"),
}
"""Tables of a job, its resilience, its workers."""
IN_PLACE = ("gemini", "bamboo", "oobleck", "varuna")


def write_mode(path: Path, mode: str, steps: int) -> Path:
    table, resilience, workers = BY_COMMAND[mode]
    file = write_job(path, steps)
    text = file.read_text().replace("[model]", UNTIED).replace("[workers]", f"[workers]\n{workers}")
    where = 'where = "elastic"' if mode in IN_PLACE else ""
    text = text.replace("[workers]", f"[workers]\n{where}")
    text = text.replace("[resilience]", f"[resilience]\n{resilience}")
    file.write_text(f"{text}\n{table}\n")
    return file


@pytest.mark.live
def test_a_worker_without_its_command_ends_at_once(tmp_path: Path):
    """Also if the command was gone before the worker had come so far as to ask."""
    line = [sys.executable, "-m", "train.worker", str(tmp_path), "0", "1", "store", "1", "1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1 and "not the folder" not in done.stderr


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", BY_COMMAND)
def test_a_mode_survives_a_kill_by_the_command(mode: str, tmp_path: Path):
    """A worker is killed by -9; where that ends the run, the command is given once more (ZeRO's
    with one worker fewer). In the end losses are those of an undisturbed run of one worker."""
    steps = 120
    plain = write_job(tmp_path / "plain", steps)
    plain.write_text(plain.read_text().replace("[model]", UNTIED))
    assert sanderling(plain).returncode == 0
    file, folder = write_mode(tmp_path, mode, steps), RunFolder(tmp_path / "t")
    running = subprocess.Popen(command(file), cwd=ROOT)
    try:
        _wait_for(lambda: folder.status().step >= 15)
        victim = _workers(running.pid)[-1]
        victim.kill()
        code = running.wait(DEADLINE_S)
    finally:
        running.kill()
    if mode in IN_PLACE:
        assert code == 0
    else:
        assert code == 1 and folder.status().phase == "failed"
        fewer = ("--workers", "3") if mode == "sharded" else ()
        done = sanderling(file, *fewer)
        assert done.returncode == 0, done.stderr
    assert folder.status().phase == "finished"
    found, expected = (
        [line["loss"] for line in run.read_metrics() if "loss" in line]
        for run in (folder, RunFolder(tmp_path / "plain" / "t"))
    )
    assert len(found) == steps and found == pytest.approx(expected, abs=1e-9)
    _every_sample_once(folder, steps)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]


def _workers(pid: int) -> list[psutil.Process]:
    """Processes that train: of the local launcher, or what the elastic one's server has forked."""
    children = psutil.Process(pid).children(recursive=True)
    leaves = [child for child in children if not child.children()]
    return [leaf for leaf in leaves if "resource_tracker" not in str(leaf.cmdline())]


def _wait_for(condition) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_dry_run_says_what_it_takes(tmp_path: Path):
    """Bytes by hand: 8-byte weights, gradients and two moments, for each of so many weights."""
    job = write_job(tmp_path, 10)
    said = sanderling(job, "--dry-run")
    weights = 272 * 32 + 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert said.returncode == 0, said.stderr
    assert f"{weights:,}" in said.stdout
    assert f"{weights * 8 * 4 / 2**20:.1f} MiB per worker" in said.stdout
    assert "memory, measured" in said.stdout  # of a rehearsal
    assert not (tmp_path / "t").exists()


def test_mistakes_are_the_users(tmp_path: Path):
    (tmp_path / "job.toml").write_text("run.tokens = 0")
    said = sanderling(tmp_path / "job.toml")
    assert said.returncode == 2 and "run, tokens = 0 is not accepted" in said.stderr
    asked = CliRunner().invoke(train, ["status", str(tmp_path)])
    assert "not the folder of a training run" in str(asked.exception)
    (tmp_path / "job.toml").write_text("workers.where = 'moon'")
    asked = CliRunner().invoke(train, [str(tmp_path / "job.toml")])
    assert "known: elastic, local, ray" in str(asked.exception)
