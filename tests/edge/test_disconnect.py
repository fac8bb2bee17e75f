"""A client that closes its socket ends its request at the service, streaming or not."""

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve.connection import EventStream
from serve.engine.sequence import Delta
from serve.http import EdgeSettings, build_app
from tests.edge.fakes import MODEL, ScriptedService, serving, spoken, tiny_text_model

PATIENCE_S = 5.0  # the scripts hang for ever; this only has to outlast a busy machine


def connect(url: str, stream: bool) -> socket.socket:
    """A raw connection that has sent a chat request and read nothing."""
    body = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
    content = json.dumps(body).encode()
    address = urlsplit(url)
    sock = socket.create_connection((address.hostname or "", address.port or 0), timeout=10)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    sock.sendall(head.encode() + content)
    return sock


def until(service: ScriptedService) -> None:
    assert service.delivered.wait(10), "the service was never asked for more"


@pytest.mark.parametrize(
    ("stream", "script"),
    [
        (True, [Delta((104,)), Delta((105,))]),  # in mid-stream
        (True, []),  # before the first token, so before the status
        (False, [Delta((104,)), Delta((105,))]),  # while the whole answer is being made
        (False, []),
    ],
)
def test_closing_the_socket_closes_the_request(stream, script):
    service = ScriptedService(script, hang=True)
    with serving(service) as url:
        sock = connect(url, stream)
        until(service)
        if stream and script:
            seen = b""
            while b'"content":"i"' not in seen:
                seen += sock.recv(4096)
        assert not service.closed.is_set(), "closed before the client left"
        sock.close()
        assert service.closed.wait(PATIENCE_S), "the request stayed open"
        # An aborted request is counted as one, and none is left open.
        metrics = settled(url, 'vllm:request_success_total{finished_reason="abort"')
        assert 'sanderling_requests_open{model_name="tiny"} 0.0' in metrics


async def stream_to(send, receive) -> list[str]:
    """Run an endless event stream over these ASGI callables; returns what happened at its end."""
    happened: list[str] = []

    async def events():
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0)
        finally:
            happened.append("events ended")

    async def close() -> None:
        await asyncio.sleep(0)  # a close that is cancelled again would not get past this
        happened.append("closed")

    response = EventStream(events(), close, {})
    await asyncio.wait_for(response({"type": "http"}, receive, send), 10)
    return happened


async def gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


def test_a_client_that_stopped_reading_is_noticed_when_it_leaves():
    async def blocked(message: object) -> None:
        await never()

    assert asyncio.run(stream_to(blocked, gone)) == ["closed"]  # the events had not begun


def test_a_server_that_reports_the_loss_by_an_error_of_send():
    async def broken(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            raise OSError("connection lost")

    assert asyncio.run(stream_to(broken, never)) == ["events ended", "closed"]


def test_cancelling_the_handler_closes_the_request():
    """How Ray Serve tells an ASGI app that the client has left."""
    service = ScriptedService([Delta((104,))], hang=True)
    assert asyncio.run(cancelled_request(service))


async def cancelled_request(service: ScriptedService) -> bool:
    """Cancel a request through the whole app while it waits for its second token."""
    app = build_app(service, tiny_text_model(), EdgeSettings(model=MODEL))
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await never()

    async def send(message: object) -> None:
        await asyncio.sleep(0)

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    task = asyncio.create_task(app(scope, receive, send))
    while not service.delivered.is_set():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return service.closed.is_set()


def test_a_finished_request_is_closed_too_and_the_connection_lives_on():
    service = ScriptedService(spoken("hi"))
    with serving(service) as url, httpx.Client(base_url=url) as client:
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        for _ in range(3):
            service.closed.clear()
            assert "[DONE]" in client.post("/v1/chat/completions", json=body).text
            assert service.closed.wait(PATIENCE_S)


class Unclosable(ScriptedService):
    """A service whose streams ignore being closed for a long time."""

    def generate(self, request):
        outer = self

        class Stream:
            def __aiter__(self):
                return self

            async def __anext__(self):
                return Delta((104,), "length")

            async def aclose(self):
                outer.closed.set()
                await asyncio.sleep(60)

        return Stream()


def test_a_close_that_hangs_does_not_hold_the_answer_for_ever():
    service = Unclosable()
    with serving(service, close_deadline_s=0.2) as url:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        assert answer.json()["choices"][0]["message"]["content"] == "h"
        assert service.closed.is_set()


def settled(url: str, sample: str) -> str:
    """The metrics once `sample` is among them; the last ones read otherwise."""
    text = ""
    for _ in range(100):
        text = httpx.get(f"{url}/metrics").text
        if sample in text:
            return text
        time.sleep(0.02)
    raise AssertionError(f"{sample} is not in\n{text}")
