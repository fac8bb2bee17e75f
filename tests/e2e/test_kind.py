"""`make e2e-kind` where there is no Docker: it says so; and what it would run is what real helm and
kubectl take, against an API server's double."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e import kind
from tests.e2e.kind import NEEDED, VALUES, image, missing, play, steps
from tests.helm.chart import MAJORS
from tests.helm.live import release
from tests.helm.tools import Tools, tools

ROOT = Path(__file__).parents[2]


def command(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tests.e2e.kind", *arguments]
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def write_program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_without_docker_it_says_what_is_missing(tmp_path: Path):
    said = command(path=str(tmp_path))
    assert said.returncode == 2 and said.stdout == ""
    assert len(said.stderr.splitlines()) == 1
    assert all(name in said.stderr for name in NEEDED) and "on the PATH" in said.stderr


def test_a_daemon_that_does_not_answer_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in NEEDED:
        write_program(tmp_path, name, "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert missing().endswith("says: Cannot connect to the Docker daemon")
    for name in NEEDED:
        write_program(tmp_path, name, "exit 0")
    assert missing() == ""


def test_a_dry_run_shows_every_command_and_runs_none(tmp_path: Path):
    said = command("--dry-run", path=str(tmp_path))
    assert said.returncode == 0, said.stderr
    lines = [shlex.split(line) for line in said.stdout.splitlines()]
    verbs = [" ".join(words[:2]) for words in lines]
    wanted = ["docker build", "kind create", "kind load", "helm install", "helm install"]
    asked = ["kubectl wait", "helm test"]
    assert verbs == [*wanted, *asked, "helm upgrade", *asked, "helm uninstall"] + [
        "kubectl wait",
        "kind delete",
    ]
    others = [words for words in lines if words[0] in ("helm", "kubectl")]
    assert all("--kubeconfig" in words for words in others), "nobody else's cluster is touched"
    assert command("--wet").returncode == 2


def test_the_image_that_is_built_is_the_one_that_pods_ask_for(tmp_path: Path):
    from tests.helm.chart import Helm, containers, documents, pods

    helm = Helm(tools(), 4, tmp_path)
    asked = {
        container["image"]
        for _, pod in pods(documents(helm.template(f"--values={VALUES}")))
        for container in containers(pod)
    }
    assert asked == {image()}


@pytest.mark.parametrize("failing", ["", "helm upgrade"])
def test_the_cluster_is_deleted_whatever_happens(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With programs that only note what they were asked."""
    log = tmp_path / "log"
    for name in NEEDED:
        script = f'echo "{name} $1" >> {log}; [ "{name} $1" != "{failing}" ]'
        write_program(tmp_path, name, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert play(tmp_path / "kubeconfig") == bool(failing)
    done = log.read_text().splitlines()
    assert done[-1] == "kind delete" and done.count("kind delete") == 1
    assert ("helm uninstall" in done) == (not failing)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "major", [pytest.param(m, marks=pytest.mark.slow if m == 3 else ()) for m in MAJORS]
)
def test_real_helm_and_kubectl_take_the_commands(major: int, tmp_path: Path):
    """All of them that need no Docker, in their order, against the double; KubeRay's own chart is a
    small one here, since its repository is elsewhere."""
    found: Tools = tools()
    homes = {**os.environ, "HOME": str(tmp_path)}
    programs = {"helm": str(found.helm(major)), "kubectl": str(found.kubectl)}
    with release(found, major, tmp_path, waits=True) as live:
        config = live.double.kubeconfig(tmp_path / "config", namespace="models")
        for step in steps(config):
            name, *rest = step.words
            if name not in programs:
                continue
            if step.says == "install KubeRay":
                rest = here(rest, chart_of_nothing(tmp_path))
            done = subprocess.run(
                [programs[name], *rest], env=homes, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{shlex.join(step.words)}: {done.stderr}"
            if step.says == "ask a completion":
                assert "Succeeded" in done.stdout
        assert live.all("ray.io", "rayservices") == []


def here(words: list[str], chart: Path) -> list[str]:
    """The same with a chart of this machine."""
    at = words.index("--repo")
    shorter = words[:at] + words[at + 2 :]
    shorter[shorter.index("kuberay-operator", 2)] = str(chart)
    return shorter


def chart_of_nothing(folder: Path) -> Path:
    chart = folder / "operator"
    chart.mkdir()
    body = {"apiVersion": "v2", "name": "kuberay-operator", "version": kind.KUBERAY[1]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(body))
    return chart


def test_make_has_it():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    at = lines.index("e2e-kind: install-test")
    assert "tests.e2e.kind" in lines[at + 1]
