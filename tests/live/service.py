"""A real service for tests and proofs: `sanderling up`, what can be seen of it, `sanderling down`.

`service(...)` always ends what it started. Used by tests/live and by the proof rows that need a
client, kills or a whole life of the service.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai

from cluster.raylocal.record import load_record
from cluster.raylocal.sweep import session_processes
from tests.cluster_ray.machine import free_port, living

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
UP_S = 400.0
DOWN_S = 120.0


@dataclass(frozen=True)
class LiveService:
    """One running service: where it listens (`url` without /v1) and where its data is.

    environment: variables by which somebody else's Ray lets a visitor in; our own needs none.
    """

    url: str
    data_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def client(self, timeout_s: float = 300.0) -> openai.OpenAI:
        """OpenAI's client, without retries that would hide failures."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout_s
        )

    def get(self, path: str) -> httpx.Response:
        """GET below `url`; a status of 4xx or 5xx is the caller's to judge."""
        return httpx.get(self.url + path, timeout=30)

    def status(self) -> dict[str, Any]:
        """GET /status, which must answer."""
        answer: dict[str, Any] = self.get("/status").raise_for_status().json()
        return answer

    def states(self, role: str = "") -> dict[str, dict[str, Any]]:
        """The last known state of each ready replica (of one role), by replica id."""
        return {
            entry["replica_id"]: entry["state"]
            for entry in self.status()["replicas"]
            if entry["phase"] == "ready" and entry["state"] and role in ("", entry["role"])
        }

    def pids(self) -> dict[str, int]:
        """Process ids by actor name: "controller", "replica/decode-2", ...; takes 2 s."""
        command = [sys.executable, "-m", "tests.live.actors", str(self.data_dir)]
        environment = {**clean_environment(), **self.environment}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"no actor table: {done.stderr[-2000:]}"
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    def pid(self, role: str) -> int:
        """The process of the one living replica of a role, or of the "controller"."""
        found = [pid for name, pid in self.pids().items() if _is(name, role)]
        assert len(found) == 1, f"{len(found)} actors are {role}"
        return found[0]

    def processes(self) -> list[int]:
        """Every process of the service, Ray's included."""
        record = load_record(self.data_dir)
        return [process.pid for process in session_processes(record)] if record else []

    def down(self) -> str:
        """`sanderling down`; what it said. Idempotent."""
        flags = ("--set", f"data_dir={self.data_dir}")
        return sanderling("down", *flags, timeout_s=DOWN_S, environment=self.environment)


def busy(states: dict[str, dict[str, Any]]) -> dict[str, int]:
    """What replicas hold for requests: sequences, leases, and pages that are not merely cached.

    All zero for an idle service.
    """
    stats = [state["stats"] for state in states.values()]
    return {
        "sequences": sum(s["running"] + s["waiting"] + s["reserved"] + s["held"] for s in stats),
        "pages": sum(s["pages"] - s["free_pages"] - s["evictable_pages"] for s in stats),
        "leases": sum(state["leases"] for state in states.values()),
    }


def idle(service: LiveService) -> bool:
    """Nothing is held for any request, on any replica that is ready."""
    return not any(busy(service.states()).values())


def wait_for(holds: Callable[[], bool], what: str, deadline_s: float = 30.0) -> float:
    """Seconds until a condition held; AssertionError naming `what` after the deadline."""
    started_s = time.monotonic()
    while not holds():
        waited_s = time.monotonic() - started_s
        assert waited_s < deadline_s, f"{what}: not after {deadline_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - started_s


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not living([pid]), f"end of process {pid}", 10)


def sanderling(
    *arguments: str, timeout_s: float, environment: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Run the command as a person would; its output. RuntimeError with the output if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", *arguments],
        cwd=ROOT,
        env={**clean_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(f"`sanderling {' '.join(arguments)}` failed: {done.stdout}")
    return done.stdout


@contextlib.contextmanager
def service(
    *settings: str,
    data_dir: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[LiveService]:
    """A service with `settings` ("decode.replicas=2", ...) on a free port; ended whatever happens.

    data_dir: where its files go; None is a temporary folder that ends with it. environment: see
    LiveService.
    """
    with contextlib.ExitStack() as stack:
        if data_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="live-"))
            data_dir = Path(folder)
        port = free_port()
        given = [f"data_dir={data_dir}", *settings]
        live = LiveService(f"http://127.0.0.1:{port}", data_dir, environment)
        stack.callback(live.down)
        flags = [word for setting in given for word in ("--set", setting)]
        sanderling("up", "--port", str(port), *flags, timeout_s=UP_S, environment=environment)
        yield live


def clean_environment() -> dict[str, str]:
    """Ours, without what would make it another's Ray, or other settings than those given."""
    foreign = ("RAY", "SANDERLING")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _is(name: str, role: str) -> bool:
    return name == role or name.startswith(f"replica/{role}-")
