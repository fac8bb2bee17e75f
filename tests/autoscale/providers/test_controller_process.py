"""`sanderling autoscale --config` as its Deployment runs it: a process of its own, in real time,
over the API server's double and a served model behind HTTP."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn

from tests.autoscale.providers.rights import roles
from tests.autoscale.providers.stage import FLOOR, GROUPS, USER
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.rbac import granted, unused
from tests.kubernetes_double.served import KEY, Served
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import install
from tests.kubernetes_double.store import At

ROOT = Path(__file__).parents[3]
LEASE = At("coordination.k8s.io", "v1", "leases", "default", "sanderling-controller")
TOML = """
[autoscale]
provider = "kubernetes"
policy = "on_demand"
period_s = 1.0
up_delay_s = 0.0
down_delay_s = 5.0
drain_s = 3.0
service_url = "{url}"
service_key_file = "{key}"
health_port = {port}
[autoscale.decode]
floor = 3
on_demand = 1
tokens_per_s = 100.0
[autoscale.prefill]
cap = 0
[autoscale.kubernetes]
kubeconfig = "{kubeconfig}"
namespace = "default"
lease_s = 5.0
"""


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextmanager
def served_at(served: Served) -> Iterator[str]:
    port = free_port()
    config = uvicorn.Config(served.app(), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process(folder: Path, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [str(Path(sys.executable).with_name("sanderling")), "autoscale", "--config"]
    environ = {**os.environ, "POD_NAME": name}
    with (folder / f"{name}.log").open("wb") as log:
        made = subprocess.Popen(
            [*command, str(folder / f"{name}.toml")], env=environ, stderr=log, cwd=ROOT
        )
        try:
            yield made
        finally:
            made.kill()
            made.wait()


def until(so: Callable[[], object], what: str, within_s: float = 120.0) -> None:
    end_s = time.monotonic() + within_s
    while not so():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


def read(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.live
def test_two_processes_lead_in_turn_and_replace_what_is_taken(tmp_path: Path):
    with ExitStack() as stack:
        double = stack.enter_context(Double(enforce=True))
        cluster = Cluster(double.store, Cloud(notice_s=90.0, startup_s=1.0))
        served = Served(cluster, starts_s=1.0, leaves_s=1.0)
        install(double, *GROUPS)
        for role in roles("default", USER):
            double.add(role)
        stack.enter_context(cluster.thread())
        url = stack.enter_context(served_at(served))
        (tmp_path / "key").write_text(KEY)
        ports = {name: free_port() for name in ("one", "two")}
        config = double.kubeconfig(tmp_path / "kubeconfig", USER)
        for name, port in ports.items():
            text = TOML.format(url=url, key=tmp_path / "key", port=port, kubeconfig=config)
            (tmp_path / f"{name}.toml").write_text(text)
        one = stack.enter_context(process(tmp_path, "one"))
        until(lambda: len(served.answering()) >= FLOOR, "the first places three replicas")
        assert "sanderling_autoscale_leader 1.0" in read(ports["one"], "/metrics")
        two = stack.enter_context(process(tmp_path, "two"))
        until(lambda: read(ports["two"], "/healthz") == "ok\n", "one that follows is well")
        assert "sanderling_autoscale_leader 0.0" in read(ports["two"], "/metrics")
        doomed = served.answering()[0]
        cluster.doom(f"node-of-{doomed}", 90.0)
        until(
            lambda: doomed not in {pod["metadata"]["name"] for pod in cluster.workers()},
            "what is doomed is given back",
            within_s=89.0,
        )
        until(lambda: len(served.answering()) >= FLOOR, "and replaced")
        one.send_signal(signal.SIGTERM)
        assert one.wait(60) == 0
        holder = double.store.get(LEASE)["spec"]["holderIdentity"]
        assert not holder.startswith("one"), "the lease is given back"
        until(
            lambda: "sanderling_autoscale_leader 1.0" in read(ports["two"], "/metrics"),
            "the other leads",
        )
        two.send_signal(signal.SIGTERM)
        assert two.wait(60) == 0
        assert [a.line() for a, code in double.attempts if code == 403] == []
        left = unused(granted(double.store, USER), double.of(USER))
        assert {right.resource for right in left} <= {"events"}, "no pod waited for a machine"
