"""One real service from `up` to `down`: answers, then a kill of every kind of actor, then nothing.

The tests run in this order on the same processes; the last one takes the service down.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from cluster.raylocal.record import load_record
from tests.cluster_ray.machine import living, outside_paths
from tests.live.service import (
    FRANCE,
    MODEL,
    LiveService,
    busy,
    idle,
    kill,
    sanderling,
    service,
    wait_for,
)

pytestmark = pytest.mark.live

STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a bird at the sea."}]
LONG_PROMPT = " ".join(f"Wave {n} brings {n * 7 % 31} shells." for n in range(180))
BACK_S = 60.0  # for a new replica to load its model on a busy machine


@pytest.fixture(scope="module")
def before() -> set[str]:
    return outside_paths()


@pytest.fixture(scope="module")
def live(before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with service(data_dir=tmp_path_factory.mktemp("live")) as running:
        yield running


def stream(live: LiveService, max_tokens: int) -> Iterator[str]:
    """The pieces of one seeded answer that goes on to its last token."""
    chunks = live.client().chat.completions.create(
        model=MODEL,
        messages=STORY,
        max_tokens=max_tokens,
        seed=7,
        temperature=0.8,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert isinstance(chunks, openai.Stream)
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def count(live: LiveService, name: str) -> int:
    """A counter of the decode replica."""
    [state] = live.states("decode").values()
    return int(state[name])


def test_answers(live: LiveService):
    whole = live.client().chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    text = whole.choices[0].message.content
    assert text and "Paris" in text
    chunks = live.client().chat.completions.create(
        model=MODEL,
        messages=FRANCE,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert isinstance(chunks, openai.Stream)
    *content, last = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in content) == text
    assert last.usage and whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_what_it_says_of_itself(live: LiveService):
    assert live.get("/health").status_code == 200
    assert live.get("/ready").json() == {"ready": True}
    roles = sorted(entry["role"] for entry in live.status()["replicas"])
    assert roles == ["decode", "prefill"]
    page = live.get("/metrics").text
    counted = [line for line in page.splitlines() if line.startswith("vllm:generation_tokens")]
    assert sum(float(line.split()[-1]) for line in counted) > 0, counted


def test_long_prompts_are_prefilled_elsewhere(live: LiveService):
    prompt = "Elsewhere. " + LONG_PROMPT
    live.client().completions.create(model=MODEL, prompt=prompt, max_tokens=2)

    def handed() -> bool:
        return count(live, "handed_bytes") > 0

    wait_for(handed, "a hand-off in /status")
    wait_for(lambda: idle(live), "pages and leases back")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_stops_its_work(live: LiveService, streamed: bool):
    # Headers and body in segments of their own, as common clients send them.
    body = json.dumps(
        {"model": MODEL, "messages": STORY, "max_tokens": 400, "ignore_eos": True}
        | {"stream": streamed}
    ).encode()
    address = urlsplit(live.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        client.sendall(body)
        wait_for(lambda: not idle(live), "the request at work")
    wait_for(lambda: idle(live), "pages free after the client left", 10)


def test_decode_replica_killed_in_mid_stream(live: LiveService):
    undisturbed = "".join(stream(live, 400))
    pid = live.pid("decode")
    pieces = stream(live, 400)
    seen = [next(pieces) for _ in range(8)]
    kill(pid)
    assert "".join([*seen, *pieces]) == undisturbed
    assert live.status()["resumed"] == 1
    wait_for(lambda: len(live.states()) == 2 and idle(live), "all replicas, idle", BACK_S)
    assert live.pid("decode") != pid


def test_prefill_replica_killed_during_a_hand_off(live: LiveService):
    pid = live.pid("prefill")
    handed = count(live, "remote_prefills")
    answers: list[str] = []

    def ask() -> None:
        create = live.client().completions.create
        answer = create(model=MODEL, prompt=LONG_PROMPT, max_tokens=8, temperature=0)
        answers.append(answer.choices[0].text)

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    wait_for(lambda: busy(live.states("prefill"))["sequences"] > 0, "a prompt at the prefill")
    kill(pid)
    client.join(BACK_S)
    [disturbed] = answers
    wait_for(lambda: len(live.states()) == 2 and idle(live), "all replicas, idle", BACK_S)
    assert count(live, "remote_prefills") == handed, "it was killed too late"
    ask()
    assert answers == [disturbed, disturbed]


def test_controller_killed(live: LiveService):
    before = live.pids()
    kill(before["controller"])

    def back() -> bool:
        return live.pids().get("controller") not in (None, before["controller"])

    wait_for(back, "another controller", BACK_S)
    wait_for(lambda: len(live.states()) == 2, "both replicas in /status", BACK_S)
    after = live.pids()
    assert {**after, "controller": 0} == {**before, "controller": 0}, (
        "replicas were found, not made"
    )
    assert "".join(stream(live, 5))


def test_scaled_up_and_down_while_a_stream_goes_on(live: LiveService):
    undisturbed = "".join(stream(live, 80))
    pieces = stream(live, 80)
    seen = [next(pieces)]
    data = f"data_dir={live.data_dir}"
    said = sanderling("scale", "decode=2", "prefill=0", "--set", data, timeout_s=120)
    assert said.strip() == "decode: 2 ready, prefill: 0 ready"
    assert len(live.states("decode")) == 2 and not live.states("prefill")
    said = sanderling("scale", "decode=1", "--drain-s", "0", "--set", data, timeout_s=120)
    assert "decode: 1 ready" in said
    assert "".join([*seen, *pieces]) == undisturbed


def test_hung_replica_is_replaced_and_its_stream_goes_on(live: LiveService):
    undisturbed = "".join(stream(live, 60))
    pid = live.pid("decode")
    pieces = stream(live, 60)
    seen = [next(pieces) for _ in range(8)]
    os.kill(pid, signal.SIGSTOP)
    assert "".join([*seen, *pieces]) == undisturbed
    wait_for(lambda: not living([pid]), "end of the hung process", BACK_S)
    wait_for(lambda: bool(live.states("decode")) and idle(live), "an idle replica", BACK_S)


def test_down_lets_streams_finish_and_leaves_nothing(live: LiveService, before: set[str]):
    undisturbed = "".join(stream(live, 60))
    pieces = stream(live, 60)
    seen = [next(pieces)]
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(pieces), daemon=True)
    reader.start()
    pids = live.processes()
    assert len(pids) > 6
    assert "stopped" in live.down()
    reader.join(10)
    assert "".join([*seen, *rest]) == undisturbed
    assert living(pids) == []
    assert load_record(live.data_dir) is None
    assert outside_paths() - before == set()
    assert not [p for p in Path("/proc").glob("[0-9]*") if _mentions(p, str(live.data_dir))]


def _mentions(process: Path, text: str) -> bool:
    if int(process.name) == os.getpid():
        return False
    try:
        return text in (process / "cmdline").read_text(errors="replace")
    except OSError:  # gone meanwhile
        return False
