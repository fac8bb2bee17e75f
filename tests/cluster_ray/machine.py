"""What the live tests look at on this machine: listeners, leftovers, another person's Ray."""

import contextlib
import http.client
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PORTS = range(20_000, 30_000)

FOREIGN = """
import os, sys, time
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20,
         _temp_dir=sys.argv[1], log_to_driver=False, logging_level="error")
alive = ray.remote(num_cpus=0)(lambda: os.getpid())
print(ray.get_runtime_context().gcs_address, flush=True)
for line in sys.stdin:
    print(len({ray.get(alive.remote())}), len(ray.nodes()), flush=True)
ray.shutdown()
"""


def free_port() -> int:
    """A port that nobody has, out of those that nobody takes by chance: Ray's workers use 10002 to
    19999, Serve's ingress 30000 to 31000, and whatever asks the system for any port gets a higher
    one, as do Ray's agents (52365 among them)."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listeners(pids: list[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket the processes listen on."""
    return {
        (str(connection.laddr[0]), int(connection.laddr[1]))
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids and connection.laddr
    }


def is_loopback(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def outside_paths() -> set[str]:
    """What Ray, Serve and HAProxy leave outside a session's folder unless they are told not to."""
    home = Path.home()
    found = [home / ".ray", home / ".config" / "ray", *Path("/dev/shm").glob("plasma*")]
    for folder in {Path("/tmp"), Path(tempfile.gettempdir())}:
        for pattern in ("ray", "ray_*", "haproxy*", "plasma*"):
            found += folder.glob(pattern)
    return {str(path) for path in found if path.exists()}


def living(pids: list[int]) -> list[int]:
    """Those that run; one that ended and waits for its parent to notice does not."""
    found = [p for p in psutil.process_iter(["status"]) if p.pid in pids]
    return [p.pid for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]


def get(port: int, path: str, timeout_s: float = 10) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def eventually(holds: Callable[[], bool], deadline_s: float = 20) -> bool:
    end = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def foreign_ray() -> Iterator["subprocess.Popen[str]"]:
    """Somebody else's local Ray, in its own process and temporary folder."""
    clean = {name: value for name, value in os.environ.items() if "RAY" not in name}
    with tempfile.TemporaryDirectory(prefix="foreign-") as folder:
        command = [sys.executable, "-c", FOREIGN, folder]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )
        try:
            yield process
        finally:
            process.communicate(timeout=60)


def foreign_answers(process: "subprocess.Popen[str]") -> str:
    """Have the foreign Ray run a task: "1 1" is one worker on one node."""
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()
