"""A real replica gets notice and is killed; its streams go on elsewhere, from their KV."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest

from tests.live.service import (
    MODEL,
    ROOT,
    LiveService,
    clean_environment,
    idle,
    kill,
    sanderling,
    service,
    wait_for,
)

pytestmark = [pytest.mark.live, pytest.mark.slow]

TOKENS = 400
STREAMS = 4
BACK_S = 120.0


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("live")
    with service("decode.replicas=2", "prefill.replicas=0", data_dir=folder) as running:
        yield running


class Stream:
    """One seeded answer that goes on to its last token, read by a thread."""

    def __init__(self, live: LiveService, seed: int) -> None:
        self.live, self.seed = live, seed
        self.text = ""
        self.pieces = 0
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        asked: list[Any] = [{"role": "user", "content": f"Tell me story number {self.seed}."}]
        chunks = self.live.client().chat.completions.create(
            model=MODEL,
            messages=asked,
            max_tokens=TOKENS,
            seed=self.seed,
            temperature=0.8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert isinstance(chunks, openai.Stream)
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                self.text += chunk.choices[0].delta.content
                self.pieces += 1

    def whole(self) -> str:
        self.thread.join(BACK_S)
        assert not self.thread.is_alive(), "the stream did not end"
        return self.text


@contextmanager
def visitor(live: LiveService) -> Iterator[subprocess.Popen[str]]:
    """Somebody who drains when told, and is at the controller already."""
    command = [sys.executable, "-m", "tests.live.drain", str(live.data_dir)]
    pipe = subprocess.PIPE
    environment = clean_environment()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline().strip() == "here"
        try:
            yield process
        finally:
            process.kill()


def streams(live: LiveService) -> list[Stream]:
    return [Stream(live, seed) for seed in range(STREAMS)]


def metric(live: LiveService, name: str) -> float:
    return float(live.status()["metrics"].get(f"migrated_{name}", 0.0))


def settled(live: LiveService) -> None:
    wait_for(lambda: len(live.states("decode")) == 2 and idle(live), "two idle replicas", BACK_S)


def disturbed(live: LiveService, deadline_s: float, kill_after_s: float) -> list[str]:
    """The streams' texts when the busier replica is told to go and killed so much later."""
    with visitor(live) as process:
        assert process.stdin
        pids = live.pids()
        running = streams(live)
        wait_for(lambda: min(s.pieces for s in running) > 8, "tokens of every stream", 60)
        states = live.states("decode")
        leaving = max(states, key=lambda name: states[name]["stats"]["running"])

        def end() -> None:
            with suppress(ProcessLookupError):
                kill(pids[f"replica/{leaving}"])

        killer = threading.Timer(kill_after_s, end)
        killer.start()
        print(leaving, deadline_s, file=process.stdin, flush=True)
        texts = [each.whole() for each in running]
        killer.join()
        process.wait(BACK_S)
    return texts


def test_notice_then_sigkill_at_the_deadline(live: LiveService):
    undisturbed = [each.whole() for each in streams(live)]
    settled(live)
    assert disturbed(live, deadline_s=3.0, kill_after_s=3.0) == undisturbed
    settled(live)
    moved, again = metric(live, "requests"), metric(live, "recomputed_tokens")
    print(f"{moved:.0f} moved, {metric(live, 'bytes'):.0f} bytes, {again:.0f} tokens again")
    assert moved >= 1 and metric(live, "bytes") > 0
    assert again <= 0.1 * metric(live, "tokens"), "more than a tenth was computed again"


def test_sigkill_in_the_middle_of_the_moves(live: LiveService):
    undisturbed = [each.whole() for each in streams(live)]
    settled(live)
    assert disturbed(live, deadline_s=3.0, kill_after_s=1.6) == undisturbed
    settled(live)


def test_an_idle_replica_is_drained_by_command(live: LiveService):
    data = f"data_dir={live.data_dir}"
    with pytest.raises(RuntimeError, match="there is no replica 'decode-99'; running are: decode"):
        sanderling("drain", "decode-99", "--set", data, timeout_s=60)
    leaving = next(iter(live.states("decode")))
    said = sanderling("drain", leaving, "--set", data, timeout_s=120)
    assert said.strip() == f"{leaving} is gone"
    settled(live)
    assert leaving not in live.states("decode")
    assert "from their KV" in sanderling("status", "--set", data, timeout_s=60)
