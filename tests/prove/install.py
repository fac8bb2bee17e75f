"""Proof rows of a fresh clone: `make up` to its first token, `make down` to nothing, `.ci/run`.

Clones HEAD of this repository twice into a temporary folder; installing needs the package index.
Nothing else may start or write files in the temporary and home folders meanwhile.
"""

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from cluster.raylocal.record import load_record
from cluster.raylocal.sweep import session_processes
from tests.cluster_ray.machine import free_port, living
from tests.live.service import FRANCE, MODEL, ROOT
from tests.prove.attempt import attempt
from tests.prove.row import Row

FIRST_TOKEN_S = 90.0
INSTALL_LIMIT_S = 1800.0
CI_LIMIT_S = 2400.0
PREFIX = "prove-"
QUESTION = "What is the capital of France?"
CLOSING = re.compile(r"^=== (.+): (\d+) s$", re.MULTILINE)
SUMMARY = re.compile(r"^=+ (.*\b(?:passed|failed|error).*?) =+$", re.MULTILINE)


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; ten to forty minutes."""
    with clone() as tree:
        yield from attempt("make up, make down", lambda: life(tree))
    with clone() as tree:
        yield from attempt(".ci/run", lambda: ci(tree))


@contextlib.contextmanager
def clone() -> Iterator[Path]:
    """A fresh clone of HEAD; removed at the end, after a `make down` to be sure."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    tree = folder / "sanderling"
    try:
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(tree)], check=True)
        yield tree
    finally:
        if tree.is_dir():
            _make(tree, "down")
        shutil.rmtree(folder)


def life(tree: Path) -> Iterator[Row]:
    """A whole life of the service: install, start, answer, stop, and what is left afterwards."""
    before = outside()
    port = 8000 if _is_free(8000) else free_port()
    heard = _make_up(tree, port)
    text = heard.text.partition(f"> {QUESTION}")[2]
    answer = text.partition("\n(first token")[0].strip()
    took_s = heard.first_token_s - heard.installed_s
    measured = f"{took_s:.0f} s, installation {heard.installed_s - heard.started_s:.0f} s"
    name = "make up: first token after installation"
    yield Row(name, f"<= {FIRST_TOKEN_S:g} s", measured, took_s <= FIRST_TOKEN_S)
    said, again = repr(answer), _ask(port)
    yield Row(f"make up: answer, and on port {port}", "Paris", said, "Paris" in answer and again)
    record = load_record(tree / ".sanderling")
    assert record
    pids = {*(p.pid for p in session_processes(record)), *related(tree, record.folder)}
    down = _make(tree, "down")
    left = {*living(sorted(pids)), *related(tree, record.folder)}
    names = f"{len(left)} of {len(pids)}" + "".join(f", {_name(pid)}" for pid in sorted(left))
    ok = not left and len(pids) > 6 and "stopped" in down
    yield Row("make down: processes left", "0", names, ok)
    files = sorted(outside() - before)
    names = ", ".join([str(len(files)), *files[:5]])
    yield Row("make down: new files outside the project", "0", names, not files)


class Heard(NamedTuple):
    """What `make up` printed; times are seconds since the epoch."""

    text: str
    started_s: float
    installed_s: float
    first_token_s: float


def _make_up(tree: Path, port: int) -> Heard:
    """Run `make up` and note when the answer's first characters come. RuntimeError if it fails."""
    started_s, first_s, seen = time.time(), 0.0, b""
    with subprocess.Popen(
        ["make", "up", f"UP=--port {port}"],
        cwd=tree,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout
        pipe = process.stdout.fileno()
        while time.time() - started_s < INSTALL_LIMIT_S:
            if not select.select([pipe], [], [], 1.0)[0]:
                continue
            piece = os.read(pipe, 65_536)
            sys.stderr.buffer.write(piece)
            if not piece:
                break
            seen += piece
            if not first_s and seen.partition(f"> {QUESTION}".encode())[2].strip():
                first_s = time.time()
        else:
            process.kill()
    text = seen.decode(errors="replace")
    if process.returncode or not first_s:
        raise RuntimeError(f"`make up` ended with {process.returncode}: {text[-500:]}")
    installed_s = (tree / ".venv" / ".installed").stat().st_mtime
    return Heard(text, started_s, installed_s, first_s)


def _make(tree: Path, target: str) -> str:
    done = subprocess.run(
        ["make", target],
        cwd=tree,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def _ask(port: int) -> bool:
    """Whether the service is ready now and says Paris again."""
    url = f"http://127.0.0.1:{port}"
    body = {"model": MODEL, "messages": FRANCE, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    ready = httpx.get(f"{url}/ready", timeout=30).status_code == 200
    return ready and "Paris" in answer.json()["choices"][0]["message"]["content"]


def ci(tree: Path) -> Iterator[Row]:
    """`.ci/run` as CI runs it: nothing installed, nobody at the keyboard."""
    log = tree.parent / "ci.log"
    started_s = time.monotonic()
    with log.open("wb") as file:
        status = subprocess.run(
            [".ci/run"],
            cwd=tree,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            timeout=2 * CI_LIMIT_S,
        ).returncode
    took_s = time.monotonic() - started_s
    text = log.read_text(errors="replace")
    if status:
        print(text[-8000:], file=sys.stderr)
    parts = ", ".join(f"{name} {seconds} s" for name, seconds in CLOSING.findall(text))
    measured = f"exit {status} after {took_s / 60:.1f} min ({parts})"
    ok = status == 0 and took_s <= CI_LIMIT_S
    yield Row(".ci/run from a fresh clone", f"exit 0 in {CI_LIMIT_S / 60:g} min", measured, ok)
    summary = (SUMMARY.findall(text) or ["no summary"])[-1]
    passed = re.match(r"\d+ passed", summary) is not None
    yield Row("make test from a fresh clone", "passes", summary, passed)


def environment() -> dict[str, str]:
    """Of a new terminal: nothing of Ray, of our settings, of this virtual environment or make."""
    ours = re.compile("RAY|SANDERLING|PYTHON(PATH|HOME)|VIRTUAL_ENV|MAKE|MFLAGS")
    return {name: value for name, value in os.environ.items() if not ours.match(name)}


def outside() -> set[str]:
    """Everything in the temporary and home folders that a program might leave there."""
    home = Path.home()
    folders = [Path("/tmp"), Path(tempfile.gettempdir()), Path("/dev/shm"), home]
    folders += [home / name for name in (".ray", ".config", ".cache", ".local", ".triton")]
    found = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    caches = {p for p in found if p.parent.name in (".config", ".cache") and p.is_dir()}
    found |= {path for folder in caches if folder.name != "pip" for path in folder.iterdir()}
    return {str(path) for path in found if path.name != "pip" and not path.name.startswith(PREFIX)}


def related(tree: Path, folder: str) -> set[int]:
    """Living processes in whose command, folder or environment the clone or its Ray is named."""
    return {process.pid for process in psutil.process_iter() if _names(process, str(tree), folder)}


def _names(process: psutil.Process, *texts: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        words = [*process.cmdline(), process.cwd(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or another user's
        return False
    return any(text in word for text in texts for word in words)


def _name(pid: int) -> str:
    return psutil.Process(pid).name() if psutil.pid_exists(pid) else "gone"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
