"""The commands of train/README.md for a Ray cluster, as they stand there, on a Ray of this machine
that asks for a token: refused without it, stopped with a checkpoint, gone on, served, and
compressed."""

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.settings import Settings
from models.load import load_text
from serve.build import Model, load
from tests.cluster_ray.machine import living
from tests.live.service import clean_environment, wait_for
from tests.prove.raynodes import RayNodes, ray_nodes
from tests.serving import tiny as serving_tiny
from tests.train import tiny
from tests.train.test_run import losses, make
from train.folder import RunFolder, read_lines
from train.job import read_job
from train.world import LocalWorld

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
DOCUMENTED = "http://127.0.0.1:8265"
STEPS = 200
WAIT_S = 280.0
JOB = f"""
name = "t"
folder = "FOLDER"
[model]
layers = 1
hidden = 64
heads = 2
kv_heads = 2
feed_forward = 96
[data]
sources = ["texts"]
sequence_tokens = 32
held_out_every = 4
[run]
tokens = {512 * STEPS}
batch_tokens = 512
micro_batch_tokens = 128
[precision]
compute = "float64"
[resilience]
checkpoint_every_steps = 0
[workers]
count = 2
threads = 1
where = "ray"
[report]
evaluate_tokens = 320
"""


def commands(file: Path) -> list[str]:
    """Those of a document that ask Ray for something about a job, without what is said of them."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.partition("  #")[0].rstrip() for line in lines if line.startswith("ray job")]


def documented(what: str) -> str:
    """The README's command that holds these words, its address that of a cluster elsewhere."""
    found = [line for line in commands(ROOT / "train" / "README.md") if what in line]
    assert len(found) == 1, found
    return found[0]


@dataclass(frozen=True)
class Cluster:
    """A Ray with a job server, and the folder that jobs are submitted from."""

    nodes: RayNodes
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.nodes.dashboard_port}"

    def ray(self, command: str, **token: str) -> subprocess.CompletedProcess[str]:
        """A command of the README, by a person with the cluster's token (or other variables) who
        has no token in a home folder."""
        asked = command.replace(DOCUMENTED, self.address)
        assert asked != command, "it says the address"
        if not token:
            secret = Path(self.nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
        return subprocess.run(
            ["bash", "-c", asked],
            cwd=self.folder,
            env={**clean_environment(), **found_first(), **token, "HOME": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
        )

    def submit(self, command: str) -> str:
        """Submits without waiting; the job's id."""
        said = self.ray(command.replace(" -- ", " --no-wait -- ", 1))
        found = re.search(r"Job '(raysubmit_\w+)' submitted successfully", said.stdout)
        assert found, said.stdout
        return found[1]


def found_first() -> dict[str, str]:
    """This tree's `sanderling`, and the `ray` beside this Python, before any others."""
    bins = Path(sys.executable).parent
    return {"PATH": f"{bins}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node: Ray finds a job's log by its machine's address, which nodes here would share."""
    folder = tmp_path_factory.mktemp("submitted")
    tiny.write_texts(folder / "texts")
    (folder / "job.toml").write_text(JOB.replace("FOLDER", str(folder.parent / "runs")))
    patient = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(WAIT_S))}
    ours = found_first() | patient
    with ray_nodes({}, head_cpus=4, dashboard=True, variables=ours) as nodes:
        yield Cluster(nodes, folder)
        pids = nodes.pids("head")
    assert pids and not living(pids)


def test_the_other_document_has_the_same_commands():
    assert commands(ROOT / "docs" / "operations.md") == commands(ROOT / "train" / "README.md")


def test_without_the_token_nothing_is_taken(cluster: Cluster):
    answer = httpx.get(f"{cluster.address}/api/jobs/", timeout=30)
    assert answer.status_code == 401
    assert answer.text == "Unauthorized: Missing authentication token"
    command = documented("sanderling train")
    said = cluster.ray(command, RAY_AUTH_MODE="disabled")
    assert said.returncode and "Authentication required" in said.stdout, said.stdout
    said = cluster.ray(command, RAY_AUTH_MODE="token")
    assert said.returncode and "find an authentication token" in said.stdout, said.stdout
    said = cluster.ray(command, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert said.returncode and "authentication token is invalid" in said.stdout, said.stdout
    assert not (cluster.folder.parent / "runs").exists()


def test_a_stopped_job_goes_on_by_submitting_it_again(cluster: Cluster):
    """And its run is served and compressed."""
    folder = RunFolder(cluster.folder.parent / "runs" / "t")
    command = documented("sanderling train")
    job = cluster.submit(command)
    wait_for(lambda: folder.status().step >= 2, "a second step", WAIT_S)
    said = cluster.ray(documented("job stop").replace("JOB", job))
    assert f"Job '{job}' was stopped" in said.stdout, said.stdout
    step = folder.status().step
    assert folder.status().phase == "stopped" and 2 <= step < STEPS
    assert [p.name[:13] for p in folder.checkpoints.iterdir()] == [f"step-{step:08d}"]
    before = len(read_lines(folder.log / "events.jsonl"))

    said = cluster.ray(command)
    assert said.returncode == 0, said.stdout
    assert f"finished: step {STEPS}/{STEPS}" in said.stdout, said.stdout
    assert "succeeded" in said.stdout
    assert f"Serve it: sanderling up --model {folder.path}" in said.stdout
    events = [line["event"] for line in read_lines(folder.log / "events.jsonl")[before:]]
    resumed = [e["step"] for e in events if isinstance(e, dict) and e["kind"] == "resumed"]
    assert resumed == [step, step], "both workers, from the checkpoint of the stop"
    lines = [line for line in folder.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(undisturbed(cluster), abs=1e-9)
    refuse_silence(folder.path)
    _compress(cluster, folder.path)


def _compress(cluster: Cluster, run: Path) -> None:
    out = cluster.folder.parent / "models"
    command = documented("sanderling compress").replace("/mnt/runs/brown", str(run))
    command = command.replace("/mnt/models", str(out)) + " --windows 1 --window-tokens 32"
    said = cluster.ray(command)
    assert said.returncode == 0 and "after / before" in said.stdout, said.stdout
    made = out / "t-q8_0.gguf"
    assert load_text(str(made)).tokenizer.encode("gull") == list(b"gull")
    refuse_silence(made)


def undisturbed(cluster: Cluster) -> list[float]:
    """Losses of the same job on one worker, here."""
    wanted = read_job(cluster.folder / "job.toml")
    alone = make(wanted.model_copy(update={"folder": cluster.folder.parent / "alone"}))
    assert alone.run(LocalWorld()) == "finished"
    return losses(alone)


def refuse_silence(model: Path) -> None:
    """Served as `sanderling up --model` would, in this process: as many tokens as were asked."""
    chosen: Settings = serving_tiny.settings(prefill=0).model_copy(update={"model": str(model)})
    loaded: Model = load(chosen)

    async def ask() -> None:
        async with serving_tiny.serving(chosen, loaded) as service:
            one = serving_tiny.request("r", list(b"The gull "), 6, ignore_eos=True)
            assert len(await serving_tiny.collect(service, one)) == 6

    serving_tiny.run(ask())
