"""The script that `helm test` runs, as the chart renders it, against the service's real edge."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from tests.cluster_ray.machine import free_port
from tests.helm.chart import ROOT, Body, of


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The HTTP edge over scripted tokens."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.clients.server", str(port)], cwd=ROOT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(objects: list[Body], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the hook's container with another URL."""
    (container,) = of(objects, "Pod")["spec"]["containers"]
    assert container["command"] == ["python", "-c"]
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", *container["args"]]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


def test_it_gets_a_completion(rendered: Mapping[str, list[Body]], url: str):
    answer = ask(rendered["defaults"], URL=url, DEADLINE_S="200")
    assert answer.returncode == 0, answer.stderr
    assert "tokens)" in answer.stdout


def test_it_fails_where_nobody_answers(rendered: Mapping[str, list[Body]]):
    answer = ask(rendered["defaults"], URL=f"http://127.0.0.1:{free_port()}", DEADLINE_S="0.1")
    assert answer.returncode != 0 and "/ready" in answer.stderr


def test_it_shows_its_key(rendered: Mapping[str, list[Body]]):
    """From the Secret's file, as the values of A10G say."""
    (container,) = of(rendered["a10g-spot"], "Pod")["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["KEY_FILE"] == "/etc/key/api-key"
    assert container["volumeMounts"][0]["mountPath"] == "/etc/key"
