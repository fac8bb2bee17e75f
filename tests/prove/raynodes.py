"""A Ray of several nodes on this machine, each of which can be lost whole (`kill -9` of all of it).

A node is everything below one `ray start`: its raylet, its agents, its workers. They are known by a
variable in their environment that no other process has, and end by signals: `ray stop` would end
every Ray on the machine. The nodes ask each other for a token. Used by the proof of node deaths.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import psutil

from tests.cluster_ray.machine import free_port, living
from tests.live.service import clean_environment, wait_for

MARK_VARIABLE = "_SANDERLING_PROOF_NODE"
OBJECT_STORE_BYTES = 160 << 20
START_S = 240.0
LABEL = "sanderling-pool"


@dataclass(frozen=True)
class RayNodes:
    """The nodes of one cluster, by name; "head" has its directory of nodes and mostly no CPU.

    address: host:port for `ray.address`. environment: what a visitor needs to be let in. variables:
    that all processes of the nodes have beside it. dashboard_port: of the head's dashboard with its
    job server, on loopback; 0 for none.
    """

    folder: Path
    address: str
    environment: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)
    dashboard_port: int = 0

    def start(self, name: str, cpus: float, *, head: bool = False) -> None:
        """Start a node, labelled with its name. RuntimeError with Ray's words when it fails."""
        where = (
            ("--head", "--port", self.address.rpartition(":")[2])
            if head
            else ("--address", self.address)
        )
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *where),
            *("--num-cpus", f"{cpus:g}", "--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--labels", f"{LABEL}={name}", "--temp-dir", str(self.folder / name)),
            *("--dashboard-agent-listen-port", str(free_port())),
            *("--disable-usage-stats", "--include-log-monitor", "false"),
        ]
        if head:
            command += self._head()
        done = subprocess.run(
            command,
            env=self._environment(name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_S,
        )
        if done.returncode:
            raise RuntimeError(f"the node {name} did not start: {done.stdout[-2000:]}")

    def _head(self) -> list[str]:
        port = self.dashboard_port
        board = ["--include-dashboard", "true" if port else "false"]
        if port:
            board += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)]
        return [*board, "--ray-client-server-port", str(free_port())]

    def _environment(self, name: str) -> dict[str, str]:
        ours = {**self.variables, **self.environment, MARK_VARIABLE: self._mark(name)}
        return clean_environment() | ours

    def pids(self, name: str) -> list[int]:
        """Every living process of a node."""
        return [p.pid for p in psutil.process_iter() if _marked(p, self._mark(name))]

    def kill(self, name: str) -> None:
        """SIGKILL to all of a node in one go, and again to what was being started meanwhile."""
        while pids := self.pids(name):
            _end(pids)
            wait_for(partial(_gone, pids), f"end of node {name}", 20)

    def _mark(self, name: str) -> str:
        return str(self.folder / name)


@contextmanager
def ray_nodes(
    cpus: Mapping[str, float],
    *,
    head_cpus: float = 0,
    dashboard: bool = False,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[RayNodes]:
    """A head and one node for each name of `cpus`; all of them ended whatever happens. See
    `RayNodes`."""
    with TemporaryDirectory(prefix="nodes-", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        port = free_port() if dashboard else 0
        address = f"{_own_address()}:{free_port()}"
        nodes = RayNodes(Path(folder), address, environment, variables, port)
        try:
            nodes.start("head", head_cpus, head=True)
            for name, count in cpus.items():
                nodes.start(name, count)
            yield nodes
        finally:
            for name in (*cpus, "head"):
                nodes.kill(name)


def _own_address() -> str:
    """The address by which Ray knows this machine."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(MARK_VARIABLE) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _end(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _gone(pids: list[int]) -> bool:
    return not living(pids)
