"""The client's connection: reading a body with a bound, and noticing that the client has left.

Whoever waits for tokens waits in `until_gone`, which ends the wait when the connection closes.
Called by http.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve.errors import RequestError

log = logging.getLogger(__name__)
T = TypeVar("T")
STALLED_S = 60.0  # a stream that takes nothing for so long is nobody's any more


class ClientGone(Exception):
    """The client closed its connection before it had the whole answer."""


async def read_body(http: HttpRequest, max_bytes: int) -> bytes:
    """The request's body; RequestError 413 as soon as it is known to be longer than max_bytes."""
    body = bytearray()
    declared = http.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    if size <= max_bytes:
        async for chunk in http.stream():
            body += chunk
            size = len(body)
            if size > max_bytes:
                break
    if size > max_bytes:
        text = f"The body has {size} bytes or more; at most {max_bytes} are accepted."
        raise RequestError(413, "invalid_request_error", None, text, "body_too_large")
    return bytes(body)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or ClientGone, with `work` cancelled, when the client leaves first.

    When this returns or raises, `work` has ended; so whatever it used may be closed.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


class EventStream(Response):
    """An SSE response that always closes its source.

    Starlette's StreamingResponse drops an iterator without aclose() when the server's ASGI version
    is below 2.4 (uvicorn says 2.3), and cancels again while a close is under way; so this one
    watches the connection itself, and `close` runs outside any cancelled scope.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        headers: dict[str, str],
        stalled_s: float = STALLED_S,
    ) -> None:
        """stalled_s: a client that takes nothing for so long is let go. Until then its events wait
        here and the tokens behind them at the ingress, never more than it asked for."""
        # no-cache and no buffering: proxies would otherwise hold events back
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(None, 200, headers, self.media_type)
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._stalled_s = stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone, OSError):  # OSError: how ASGI 2.4 says gone
                await until_gone(receive, self._send_all(send))
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await self._give(
                    {"type": "http.response.body", "body": event, "more_body": True}, send
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _give(self, message: Message, send: Send) -> None:
        """Send, which waits while the client's side of the connection is full."""
        try:
            async with asyncio.timeout(self._stalled_s):
                await send(message)
        except TimeoutError:
            log.info("a client took nothing for %g s and was let go", self._stalled_s)
            raise ClientGone from None
