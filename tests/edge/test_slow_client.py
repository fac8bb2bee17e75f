"""A client that stops reading: its stream waits within bounds, others go on, and in the end it is
let go and its request with it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

import httpx

from serve.engine.sequence import Delta, Request
from tests.edge.fakes import MODEL, ScriptedService, serving

STALLED_S = 0.5


class Endless(ScriptedService):
    """Tokens without end for "wait", a short answer for everybody else; counts what was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0
        self.left = threading.Event()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        if request.limits.max_tokens < 100:
            yield Delta((104,), "length")
            return
        try:
            while True:
                self.taken += 1
                await asyncio.sleep(0)
                yield Delta((104,))
        finally:
            self.left.set()


def stalled(url: str) -> socket.socket:
    """A stream of which only the first bytes are read."""
    body = {"model": MODEL, "stream": True, "max_tokens": 150, "prompt": "wait"}
    content = json.dumps(body).encode()
    address = urlsplit(url)
    sock = socket.socket()
    sock.connect((address.hostname or "", address.port or 0))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)
    assert sock.recv(64).startswith(b"HTTP/1.1 200")
    return sock


def test_a_stalled_client_holds_nobody_up_and_is_let_go():
    service = Endless()
    with serving(service, stalled_s=STALLED_S) as url, stalled(url) as sock:
        body = {"model": MODEL, "max_tokens": 5, "prompt": "x"}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        assert service.left.wait(20 * STALLED_S), "the request was kept for a client that is stuck"
        taken = service.taken
        time.sleep(STALLED_S)
        assert service.taken == taken
        while sock.recv(1 << 16):  # the connection was closed, so reading comes to an end
            pass


def test_a_slow_client_that_goes_on_reading_is_kept():
    service = Endless()
    with serving(service, stalled_s=STALLED_S) as url, stalled(url) as sock:
        end_s = time.monotonic() + 4 * STALLED_S
        while time.monotonic() < end_s:
            assert sock.recv(1 << 20), "a client that reads was let go"
            time.sleep(STALLED_S / 200)
        assert not service.left.is_set()
