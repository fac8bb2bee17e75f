"""`sanderling share` as a person has it: a tiny model, a small Llama in training, one terminal."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner

from autoscale.providers.local.bodies import MARK_VARIABLE
from autoscale.providers.share_command import share
from tests.autoscale.providers.test_drill import tiny_request
from tests.models.tiny import write_byte_level
from tests.train.test_run import job, make
from train.folder import RunFolder
from train.world import LocalWorld

ROOT = Path(__file__).parents[3]
PATIENCE_S = 150.0
STREAMS = 12
LONG = {"run": {"tokens": 16 * 12 * 100_000}, "schedule": {"decay": 0.0}}
SETTINGS = {
    "engine.page_tokens": 16,
    "engine.kv_tokens": 4096,
    "engine.budget_tokens": 64,
    "engine.max_running": 2,
    "decode.threads": 1,
    "controller.period_s": 0.1,
    "autoscale.period_s": 0.2,
    "autoscale.up_delay_s": 0.5,
    "autoscale.down_delay_s": 3,
    "autoscale.backlog_s": 0.1,
    "autoscale.drain_s": 6,
    "autoscale.short_usd_per_h": 200,
    "autoscale.decode.cap": 2,
    "autoscale.decode.tokens_per_s": 500,  # a queue is long wherever this runs
}


def toml(tmp_path: Path, **workers: object) -> Path:
    """The job's file."""
    wanted = job(
        tmp_path, "small", workers={"count": 2, "threads": 1, "where": "elastic", **workers}, **LONG
    )
    lines = [f'name = "{wanted.name}"', f'folder = "{wanted.folder}"']
    for table in ("model", "data", "run", "optimizer", "schedule", "precision", "workers"):
        lines.append(f"[{table}]")
        values = getattr(wanted, table).model_dump(mode="json", exclude_unset=True)
        lines += [f"{key} = {written(value)}" for key, value in values.items()]
    path = tmp_path / "job.toml"
    path.write_text("\n".join(lines))
    return path


def written(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(written, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


class Terminal:
    """The command in a process, and what it says."""

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from cluster.cli import main; main()", "share", path, *sets],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._heard.put(line.rstrip())
        self._heard.put("(the end)")

    def until(self, words: str) -> str:
        """The next line with these words."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            line = self._heard.get(timeout=max(0.1, end_s - time.monotonic()))
            self.lines.append(line)
            if words in line:
                return line
            assert line != "(the end)", "\n".join(self.lines)


def ask(url: str, number: int) -> list[int]:
    """One request, whole."""
    request = tiny_request(number)
    body = {
        "model": "tiny.gguf",
        "prompt": list(request.prompt),
        "max_tokens": request.limits.max_tokens,
        "temperature": request.sampling.temperature,
        "seed": number,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/completions", json=body, timeout=PATIENCE_S).raise_for_status()
    return list(answer.json()["choices"][0]["text"].encode())


def spike(url: str, over: Callable[[], bool]) -> tuple[int, list[BaseException]]:
    """Streams that ask until it is over; how many were answered, and what went wrong."""

    async def one(numbers: Iterator[int]) -> int:
        answered = 0
        while not over():
            await asyncio.to_thread(ask, url, next(numbers))
            answered += 1
        return answered

    async def every() -> list[int | BaseException]:
        numbers = iter(range(10_000))
        waiting = (one(numbers) for _ in range(STREAMS))
        return await asyncio.gather(*waiting, return_exceptions=True)

    found = asyncio.run(every())
    wrong = [each for each in found if isinstance(each, BaseException)]
    return sum(each for each in found if isinstance(each, int)), wrong


def patiently(condition: Callable[[], bool]) -> None:
    """Until it is so."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that"
        time.sleep(0.1)


def ready(url: str) -> int:
    """Replicas that answer."""
    status = httpx.get(f"{url.removesuffix('/v1')}/status", timeout=30).json()
    return sum(entry["phase"] == "ready" for entry in status["replicas"])


def marked(folder: Path) -> list[int]:
    """Processes of machines of a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE, "").startswith(str(folder.resolve())):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
@pytest.mark.live
def test_serving_borrows_from_training_and_gives_back(tmp_path: Path):
    port = free_port()
    model = write_byte_level(tmp_path / "tiny.gguf")
    data = tmp_path / "data"
    given = {**SETTINGS, "model": model, "data_dir": data, "http.port": port}
    terminal = Terminal(toml(tmp_path), given)
    try:
        terminal.until("Training small on 2 machines")
        terminal.until("What the loop decides")
        url = f"http://127.0.0.1:{port}/v1"
        assert ask(url, 0)
        folder = RunFolder(tmp_path / "small")
        patiently(lambda: folder.status().step >= 20)
        done = threading.Event()
        spiking = threading.Thread(target=lambda: found.append(spike(url, done.is_set)))
        found: list[tuple[int, list[BaseException]]] = []
        spiking.start()
        terminal.until("yield m-")
        patiently(lambda: ready(url) == 2)
        done.set()
        spiking.join()
        terminal.until("return m-")
        patiently(lambda: len(plans(folder)) == 3)
        [(answered, wrong)] = found
        assert answered >= STREAMS and wrong == []
        sizes = [line.count('"w') for line in plans(folder)]
        assert sizes == [2, 1, 2]
        terminal.process.send_signal(signal.SIGINT)
        last = terminal.until("small: stopped: step ")
        assert terminal.process.wait(PATIENCE_S) == 0, "\n".join(terminal.lines)
    finally:
        terminal.process.kill()
        terminal.process.wait()
        left = marked(data)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == [] and not folder.is_running()
    steps = int(last.partition("step ")[2].partition("/")[0])
    noted = {line["step"]: line["loss"] for line in folder.read_metrics() if "loss" in line}
    alone = make(job(tmp_path, "alone", **LONG)).trainer
    wanted = [alone.step(LocalWorld()).loss for _ in range(steps)]
    assert sorted(noted) == list(range(1, steps + 1))
    assert [noted[n] for n in sorted(noted)] == pytest.approx(wanted, abs=1e-9)


def plans(folder: RunFolder) -> list[str]:
    """Ranks of each generation, as the run's events have them."""
    lines = (folder.log / "events.jsonl").read_text().splitlines()
    return [line.partition('"ranks":')[2].partition("]")[0] for line in lines if '"plan"' in line]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_cannot_be_shared_is_refused(tmp_path: Path):
    def said(path: Path, *sets: str) -> str:
        port = f"--set=http.port={free_port()}"
        result = CliRunner().invoke(share, [str(path), port, *(f"--set={one}" for one in sets)])
        assert isinstance(result.exception, ValueError), result.output
        return str(result.exception)

    path = toml(tmp_path)
    assert "'on_demand' is accepted" in said(path, "autoscale.policy=spothedge")
    model = f"model={write_byte_level(tmp_path / 'tiny.gguf')}"
    assert 'workers.where = "elastic" is accepted' in said(toml(tmp_path, where="local"), model)
    assert "least = 3 workers of target = 2" in said(toml(tmp_path, least=3), model)
