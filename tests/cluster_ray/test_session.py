"""A session of our own on this machine, from start to nothing left; real processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
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
from cluster.raylocal.record import load_record
from cluster.raylocal.session import RaySession, attach
from cluster.raylocal.sweep import sweep
from cluster.settings import Settings, resolve
from tests.cluster_ray import machine
from tests.cluster_ray.app import Broken, Ingress

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
    for path, event in (("/stream", "stream cancelled"), ("/slow", "slow cancelled")):
        with pytest.raises(TimeoutError):
            machine.get(port, path, timeout_s=0.5) if path == "/slow" else read_some(port)
        assert machine.eventually(lambda event=event: event in events.read_text().splitlines())
    with pytest.raises(ValueError, match=f"http.port = {port} is in use"):
        refuse_taken_port(settings)


def read_some(port: int) -> None:
    """Open a stream, see its first event, leave."""
    import socket

    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        seen = b""
        while b"data: x" not in seen:
            seen += connection.recv(65_536)
    raise TimeoutError


VISITOR = """
import ray, sys
from pathlib import Path
from cluster.raylocal.session import attach
from cluster.raylocal.actors import list_named
attach(Path(sys.argv[1]))
print(list_named("child/"))
ray.shutdown()
"""
STRANGER = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False)
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
    """Other processes: a visitor with the data folder gets in, a stranger without token does not."""
    assert session.record
    visitor = run(VISITOR, str(data_dir))
    assert visitor.returncode == 0 and "child/b" in visitor.stdout, visitor.stderr
    for mode in ("disabled", "token"):
        stranger = run(
            STRANGER,
            session.record.address,
            RAY_AUTH_MODE=mode,
            RAY_AUTH_TOKEN="f" * 64,
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        )
        assert stranger.returncode != 0
    assert psutil.pid_exists(os.getpid()) and session.pids()


def test_own_session_with_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start beside a foreign Ray, use everything, stop: nothing of ours is left, the other lives."""
    before = machine.outside_paths()
    data_dir = tmp_path / "data"
    settings = settings_for(data_dir, "haproxy")
    events = tmp_path / "events"
    events.touch()
    monkeypatch.setenv("EVENTS_FILE", str(events))
    with machine.foreign_ray() as foreign:
        assert foreign.stdout and foreign.stdout.readline() == "ready\n"
        environment = dict(os.environ)
        session = RaySession(
            settings,
            cpus=2,
            labels={"zone": "a"},
            environment=partial(front_environment, settings),
        )
        record = session.start()
        with pytest.raises(ValueError, match="already runs"):
            RaySession(settings).start()
        front = start_front(Ingress.bind(), settings)
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
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert dict(os.environ) == environment
        assert machine.foreign_answers(foreign) == "1 1"
    assert machine.outside_paths() - before == set()
    assert load_record(data_dir) is None and not Path(record.folder).exists()
    assert list(data_dir.glob("ray/logs/session_*/gcs_server.out"))
    with pytest.raises(ValueError, match="no session runs"):
        attach(data_dir)
