"""`make e2e-kind`: the chart's whole life on a real cluster, for whoever has Docker and kind.

    python -m tests.e2e.kind              # build, create, install, ask, upgrade, uninstall, delete
    python -m tests.e2e.kind --dry-run    # the commands, one a line, and nothing else

The cluster is one of its own, with a kubeconfig of its own, and is deleted whatever happens. Ends
with status 0 only if every command did; with 2 and a sentence where something is missing.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sanderling"
VALUES = CHART / "examples" / "cpu-dev.yaml"
CLUSTER = "sanderling-e2e"
RELEASE = "sanderling"
KUBERAY = ("https://ray-project.github.io/kuberay-helm/", "1.7.0")
NEEDED = {
    "docker": "https://docs.docker.com/engine/install/",
    "kind": "https://kind.sigs.k8s.io",
    "helm": "https://helm.sh",
    "kubectl": "https://kubernetes.io/docs/tasks/tools/",
}
DAEMON_S = 30.0
UP = "20m"


class Step(NamedTuple):
    """A command, and what it is for."""

    says: str
    words: tuple[str, ...]


def image() -> str:
    """The chart's own image of the CPU target, by its default name."""
    return f"sanderling:{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}-cpu"


def steps(kubeconfig: Path) -> list[Step]:
    """All commands but the last, which deletes the cluster."""
    of = ("--kubeconfig", str(kubeconfig))
    chart = (str(CHART), "--values", str(VALUES), *of, "--wait", "--timeout", UP)
    service = f"rayservice/{RELEASE}-serve"
    ready = ("kubectl", "wait", *of, "--for=condition=Ready", service, f"--timeout={UP}")
    ask = ("helm", "test", RELEASE, *of, "--timeout", UP, "--logs")
    repository, version = KUBERAY
    operator = ("kuberay-operator", "--repo", repository, "--version", version)
    create = ("kind", "create", "cluster", "--name", CLUSTER, *of, "--wait", "5m")
    gone = ("kubectl", "wait", *of, "--for=delete", service, f"--timeout={UP}")
    return [
        Step("build the image", ("docker", "build", "--target", "cpu", "-t", image(), str(ROOT))),
        Step("create a cluster", create),
        Step("give it the image", ("kind", "load", "docker-image", image(), "--name", CLUSTER)),
        Step(
            "install KubeRay",
            ("helm", "install", "kuberay-operator", *operator, *of, "--wait", "--timeout", UP),
        ),
        Step("install the chart", ("helm", "install", RELEASE, *chart)),
        Step("wait until it can make a token", ready),
        Step("ask a completion", ask),
        Step(
            "change a setting",
            ("helm", "upgrade", RELEASE, *chart, "--set", "settings.engine.max_running=16"),
        ),
        Step("wait until it can make a token", ready),
        Step("ask again", ask),
        Step("uninstall the chart", ("helm", "uninstall", RELEASE, *of, "--wait", "--timeout", UP)),
        Step("nothing of it is left", gone),
    ]


def deletion(kubeconfig: Path) -> Step:
    """The cluster's end."""
    words = ("kind", "delete", "cluster", "--name", CLUSTER, "--kubeconfig", str(kubeconfig))
    return Step("delete the cluster", words)


def missing() -> str:
    """What this machine lacks, in a sentence; empty where it has all."""
    absent = [f"{name} ({url})" for name, url in NEEDED.items() if shutil.which(name) is None]
    if absent:
        return f"e2e-kind needs {' and '.join(absent)} on the PATH"
    try:
        asked = subprocess.run(["docker", "info"], capture_output=True, timeout=DAEMON_S)
    except subprocess.TimeoutExpired:
        return f"e2e-kind needs Docker's daemon, and `docker info` says nothing for {DAEMON_S:g} s"
    if asked.returncode:
        said = asked.stderr.decode(errors="replace").strip().splitlines()
        return (
            f"e2e-kind needs Docker's daemon, and `docker info` says: {said[-1] if said else '-'}"
        )
    return ""


def play(kubeconfig: Path) -> int:
    """Runs all steps in turn until one fails; deletes the cluster; the exit status."""
    status = 0
    try:
        for step in steps(kubeconfig):
            status = run(step)
            if status:
                break
    finally:
        deleted = run(deletion(kubeconfig))
    return status or deleted


def run(step: Step) -> int:
    """One command, its output shown; 1 where it fails."""
    print(f"==> {step.says}: {shlex.join(step.words)}", flush=True)
    failed = subprocess.run(step.words, stdin=subprocess.DEVNULL).returncode
    if failed:
        print(f"==> failed with status {failed}: {step.says}", flush=True)
    return int(failed != 0)


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    if arguments not in ([], ["--dry-run"]):
        print(f"e2e-kind takes --dry-run or nothing, not {shlex.join(arguments)}", file=sys.stderr)
        return 2
    if arguments:
        kubeconfig = Path("KUBECONFIG")
        for step in [*steps(kubeconfig), deletion(kubeconfig)]:
            print(shlex.join(step.words))
        return 0
    lacks = missing()
    if lacks:
        print(f"{lacks}; --dry-run shows what would be run.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="e2e-kind-") as folder:
        return play(Path(folder) / "kubeconfig")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
