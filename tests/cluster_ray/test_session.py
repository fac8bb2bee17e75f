"""A session of our own on this machine, from start to nothing left; real processes."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cluster.raylocal import actors
from cluster.raylocal.actors import Needs
from cluster.raylocal.front import (
    FrontError,
    front_environment,
    refuse_taken_port,
    start_front,
    stop_front,
)
from cluster.raylocal.record import MARK_VARIABLE, load_record
from cluster.raylocal.session import RaySession, attach
from cluster.raylocal.sweep import Swept, session_processes, sweep
from cluster.settings import Settings, resolve
from tests.cluster_ray import machine
from tests.cluster_ray.app import broken, ingress

pytestmark = pytest.mark.live


def settings_for(data_dir: Path, proxy: str) -> Settings:
    flags = {
        "data_dir": str(data_dir),
        "http.port": str(machine.free_port()),
        "http.proxy": proxy,
        "ray.object_store_bytes": str(100 << 20),
    }
    return resolve(flags=flags).settings


class Counter:
    def __init__(self, first: int = 0) -> None:
        self.count = first

    async def next(self) -> int:
        self.count += 1
        return self.count

    async def pid(self) -> int:
        return os.getpid()

    async def variable(self, name: str) -> str | None:
        return os.environ.get(name)


class Creator:
    def create(self, name: str) -> int:
        actors.start_named(Counter, name, 10)
        return os.getpid()

    def names(self, prefix: str) -> list[str]:
        return actors.list_named(prefix)


def check_actors() -> None:
    import ray

    creator = actors.start_named(Creator, "creator", restarts=-1)
    pid = ray.get(creator.create.remote("child/a"))
    child = actors.find("child/a")
    assert child is not None and ray.get(child.next.remote()) == 11
    os.kill(pid, 9)

    def creator_is_back() -> bool:
        try:
            return bool(ray.get(creator.names.remote("child/")) == ["child/a"])
        except ray.exceptions.ActorUnavailableError:
            return False

    assert machine.eventually(creator_is_back)
    assert ray.get(child.next.remote()) == 12, "the child kept its state through the crash"

    with pytest.raises(ValueError, match="'child/a' already lives"):
        actors.start_named(Counter, "child/a")
    needs = Needs(labels={"zone": "a"}, memory_bytes=1 << 20, environment={"GREETING": "hi"})
    placed = actors.start_named(Counter, "child/b", needs=needs)
    assert ray.get(placed.variable.remote("GREETING")) == "hi"
    nowhere = actors.start_named(Counter, "child/c", needs=Needs(labels={"zone": "b"}))
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(nowhere.pid.remote(), timeout=0.5)
    assert actors.list_named("child/") == ["child/a", "child/b", "child/c"]
    assert actors.kill("child/a") and actors.kill("child/c")
    assert machine.eventually(lambda: actors.list_named("child/") == ["child/b"])
    assert not actors.kill("child/a") and actors.find("child/a") is None
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(child.next.remote())


def check_front(settings: Settings, events: Path) -> None:
    port = settings.http.port
    assert machine.get(port, "/noop") == (200, b"ok")
    assert machine.get(port, "/busy")[0] == 503, "an error of ours passes the proxy as it is"
    assert b"child/b" in machine.get(port, "/names")[1]
    read_some(port)
    assert machine.eventually(lambda: "stream cancelled" in events.read_text())
    with pytest.raises(TimeoutError):
        machine.get(port, "/slow", timeout_s=0.5)
    assert machine.eventually(lambda: "slow cancelled" in events.read_text())
    with pytest.raises(ValueError, match=f"http.port = {port} is in use"):
        refuse_taken_port(settings)


def read_some(port: int) -> None:
    """Open a stream, see its first event, leave."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        seen = b""
        while b"data: x" not in seen:
            seen += connection.recv(65_536)


VISITOR = """
import ray, sys
from pathlib import Path
from cluster.raylocal.session import attach
from cluster.raylocal.actors import list_named
attach(Path(sys.argv[1]))
print(list_named("child/"))
ray.shutdown()
"""
RESTORED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_SERVE_ENABLE_HA_PROXY", MARK_VARIABLE)
STRANGER = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)), "node")
"""


def run(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if "RAY" not in name}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, **environment},
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def check_company(session: RaySession, data_dir: Path) -> None:
    """A visitor with the data folder gets in, a stranger without the token does not."""
    assert session.record
    visitor = run(VISITOR, str(data_dir))
    assert visitor.returncode == 0 and "child/b" in visitor.stdout, visitor.stderr
    address, token_file = session.record.address, session.record.token_file
    stranger = run(STRANGER, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)
    assert stranger.returncode != 0 and "token" in stranger.stderr
    stranger = run(STRANGER, address, RAY_AUTH_MODE="disabled")
    assert stranger.returncode != 0 and "token" in stranger.stderr
    # The question itself is a valid one: with the token it is answered.
    friend = run(STRANGER, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token_file)
    assert friend.stdout == "1 node\n", friend.stderr


def check_visit(address: str, data_dir: Path) -> None:
    """A session on a cluster that is not ours: used, left as it was, nothing swept."""
    flags = {"data_dir": str(data_dir), "ray.address": address, "ray.auth": "disabled"}
    with RaySession(resolve(flags=flags).settings) as session:
        assert session.record and not session.record.embedded
        assert session.pids() == []
        import ray

        assert ray.get(actors.start_named(Counter, "guest").next.remote()) == 1
        assert actors.kill("guest")
    assert load_record(data_dir) is None


def test_driver_killed(tmp_path: Path):
    """kill -9 of the driver: a later sweep by the record alone leaves nothing of the session."""
    before = machine.outside_paths()
    port = machine.free_port()
    command = [sys.executable, "-m", "tests.cluster_ray.driver", str(tmp_path), str(port), "python"]
    with subprocess.Popen(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        said = driver.stdout.readline().split()
        assert said[:2] == ["ready", "python"], said
        record = load_record(tmp_path)
        assert record and record.driver_pid == driver.pid
        pids = [process.pid for process in session_processes(record)]
        assert driver.pid in pids and len(pids) > 6
        found = machine.listeners(pids)
        assert ("127.0.0.1", port) in found
        assert [pair for pair in found if not machine.is_loopback(pair[0])] == []
        assert machine.get(port, "/noop") == (200, b"ok")
        driver.kill()
    left = [process.name() for process in session_processes(record)]
    print("right after kill -9:", left)
    swept = sweep(record, tmp_path)
    print(swept)
    assert swept.removed == (record.folder,) and not swept.left_pids
    assert machine.living(pids) == [] and session_processes(record) == []
    assert sweep(record, tmp_path) == Swept((), (), ())
    assert machine.outside_paths() - before == set()


def test_own_session_with_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start beside a foreign Ray, use everything, stop: ours is gone, the other lives."""
    before = machine.outside_paths()
    data_dir = tmp_path / "data"
    settings = settings_for(data_dir, "haproxy")
    events = tmp_path / "events"
    events.touch()
    monkeypatch.setenv("EVENTS_FILE", str(events))
    environment = {name: os.environ.get(name) for name in RESTORED}
    on_term = signal.getsignal(signal.SIGTERM)
    session = RaySession(
        settings, cpus=2, labels={"zone": "a"}, environment=partial(front_environment, settings)
    )
    with machine.foreign_ray() as foreign, session:
        assert foreign.stdout
        foreign_address = foreign.stdout.readline().strip()
        record = session.record
        assert record and signal.getsignal(signal.SIGTERM) is on_term
        with pytest.raises(ValueError, match="already runs"):
            RaySession(settings).start()
        with pytest.raises(FrontError, match="no weights here"):
            start_front(broken(), settings)
        front = start_front(ingress(), settings)
        print("front up after", round(front.start_s, 2), "s")
        check_actors()
        check_front(settings, events)
        check_company(session, data_dir)
        open_to_all = {
            pair for pair in machine.listeners(session.pids()) if not machine.is_loopback(pair[0])
        }
        assert open_to_all == set()
        assert ("127.0.0.1", settings.http.port) in machine.listeners(session.pids())
        assert stop_front() and stop_front()
        pids = session.pids()
        swept = session.stop()
        print("swept", swept, "of", len(pids))
        assert not swept.left_pids and session.pids() == []
        assert machine.living(pids) == []
        assert {name: os.environ.get(name) for name in RESTORED} == environment
        assert machine.foreign_answers(foreign) == "1 1"
        check_visit(foreign_address, tmp_path / "visit")
        assert machine.foreign_answers(foreign) == "1 1"
    assert machine.outside_paths() - before == set()
    assert load_record(data_dir) is None and not Path(record.folder).exists()
    assert list(data_dir.glob("ray/logs/session_*/gcs_server.out"))
    with pytest.raises(ValueError, match="no session runs"):
        attach(data_dir)
