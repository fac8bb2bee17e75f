"""The measuring side of protocol.py: a process that holds an engine and is asked for figures, and
llama.cpp's own benchmark programs behind the same questions.

A child that does not answer in time, or ends, is a ChildError with the last words of its log; its
whole process group ends with the context. Called by tests/peers/inprocess/contenders.py.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import psutil

from tests.peers.inprocess.protocol import THREADS, Cell

ROOT = Path(__file__).parents[3]
START_S = 300.0  # vLLM compiles
CELL_S = 90.0


class ChildError(RuntimeError):
    """An engine gave no figure; the sentence says why."""


class Asked(Protocol):
    """An engine that is asked for figures."""

    version: str

    def figures(self, cell: Cell) -> Mapping[str, float]:
        """Tokens per second of a cell, by way of measuring. ChildError when there is none."""
        ...

    def cpu_s(self) -> float:
        """Processor time that its processes have taken so far, of those that stay."""
        ...


class Child:
    """A started process of run_*.py; `child` makes and ends it."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: IO[bytes], start_s: float) -> None:
        self._process = process
        self._log = log
        self._seen = b""
        self._psutil = psutil.Process(process.pid)
        self.version = str(self._answer(start_s)["ready"])

    def figures(self, cell: Cell, deadline_s: float = CELL_S) -> Mapping[str, float]:
        """As Asked says. A child that is too late is ended: what it says next would be taken for
        the answer to another question."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(cell._asdict()).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(f"it ended: {self._last_words()}") from None
        found: dict[str, float] = self._answer(deadline_s)["figures"]  # type: ignore[assignment]
        return found

    def cpu_s(self) -> float:
        """With its children."""
        spent = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._psutil, *self._psutil.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    spent += times.user + times.system
        return spent

    def _answer(self, deadline_s: float) -> dict[str, object]:
        line = self._line(deadline_s)
        while not line.startswith(b"{"):  # printed before the process had its output to itself
            line = self._line(deadline_s)
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise ChildError(str(answer["error"]))
        return answer

    def _line(self, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        until_s = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._seen:
                if not ready.select(max(until_s - time.monotonic(), 0.0)):
                    _kill(self._process)
                    raise ChildError(f"no answer within {deadline_s:g} s")
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise ChildError(f"it ended: {self._last_words()}")
                self._seen += read
        line, _, self._seen = self._seen.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


@contextlib.contextmanager
def child(
    command: Sequence[str], settings: Mapping[str, str], start_s: float = START_S
) -> Iterator[Child]:
    """A process that speaks protocol.py. ChildError when it does not get ready in time."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="peer-") as folder, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **offline, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Child(process, log, start_s)
        finally:
            _end(process)


class LlamaCpp:
    """llama-batched-bench and llama-bench on one file: each cell is a run of one of them, which
    loads the file anew and times none of that. There is no process in between."""

    def __init__(self, programs: Path, weights: Path, version: str) -> None:
        self._programs = programs
        self._weights = weights
        self.version = version

    def figures(self, cell: Cell) -> Mapping[str, float]:
        """Decode from llama-batched-bench, prefill from llama-bench; the sampler of neither is
        timed."""
        if cell.new_tokens:
            made = self._run(self._batched(cell))
            return {"step": float(made["speed_tg"])}
        made = self._run(self._prefill(cell))
        return {"step": float(made["avg_ts"])}

    def cpu_s(self) -> float:
        return 0.0

    def _batched(self, cell: Cell) -> list[str]:
        room = cell.batch * (cell.prompt_tokens + cell.new_tokens)
        shape = ["-npp", cell.prompt_tokens, "-ntg", cell.new_tokens, "-npl", cell.batch]
        sizes = ["-c", room, "-b", 2048, "-ub", 512, "-t", THREADS, "-tb", THREADS]
        options = [*shape, *sizes, "--output-format", "jsonl"]
        return ["llama-batched-bench", *(str(option) for option in options)]

    def _prefill(self, cell: Cell) -> list[str]:
        options = ["-p", cell.prompt_tokens, "-n", 0, "-r", 1, "-t", THREADS, "-o", "jsonl"]
        return ["llama-bench", *(str(option) for option in options)]

    def _run(self, command: list[str]) -> dict[str, float]:
        program, *options = command
        given = [str(self._programs / program), "-m", str(self._weights), *options]
        try:
            done = subprocess.run(
                given, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=CELL_S
            )
        except subprocess.TimeoutExpired:
            raise ChildError(f"{program} took more than {CELL_S:g} s") from None
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1][:300]
            raise ChildError(f"{program} ended with {done.returncode}: {said}")
        made: dict[str, float] = json.loads(lines[-1])
        return made


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(process: "subprocess.Popen[bytes]") -> None:
    _kill(process)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was still to be written to it
                stream.close()
