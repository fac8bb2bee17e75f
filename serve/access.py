"""One log line per request, at its end: who, what, how long, how many tokens; never its text.

An ASGI layer around the app, so that it sees streams to their end and every kind of error answer.
Where requests are traced (trace.py), the traces are told the same. `configure` sets the format of
all our log lines; the ingress process calls it.
"""

import asyncio
import json
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.clock import Clock
from serve.observe import RequestMetrics
from serve.service import Service

log = logging.getLogger("serve.access")
MEASURED = "sanderling.measured"  # in the ASGI scope: the edge's RequestMetrics of each choice
OURS = ("serve", "models", "cluster", "kernels", "opentelemetry")  # its word on lost traces
Format = Literal["text", "json"]


def configure(form: Format, level: str) -> None:
    """Let our loggers write to stderr in this format, from this level on; idempotent."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """The same for the eye: fields as name=value after the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        fields = getattr(record, "fields", {})
        words = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
        return " ".join([super().formatMessage(record), *words])


@dataclass
class Exchange:
    """One HTTP request and what became of it, noted while it goes on; times by the layer's clock.

    status: None while no answer was begun. cancelled: how Ray Serve says that the client has left.
    """

    scope: Scope
    began_s: float
    ended_s: float = 0.0
    status: int | None = None
    request_id: str | None = None
    cancelled: bool = False

    @property
    def route(self) -> str:
        """The name of the handler, never what was sent."""
        return getattr(self.scope.get("endpoint"), "__name__", "unknown")

    @property
    def measured(self) -> list[RequestMetrics]:
        """Of each choice; empty where the request was refused, or makes no tokens."""
        measured: list[RequestMetrics] = self.scope.get(MEASURED, [])
        return measured


class Traces(Protocol):
    """Who makes traces of the requests. None of its calls raises, waits or slows a request."""

    def watch(self, service: Service) -> Service:
        """The same service, seen at its work."""
        ...

    def began(self) -> None:
        """A request begins, in the task that is to call `ended`."""
        ...

    def ended(self, exchange: Exchange) -> None:
        """It is over just now, and all that is known of it is noted."""
        ...

    def lifespan(self, app: Any) -> AbstractAsyncContextManager[None]:
        """Around the app's life; at its end, what was not sent yet is sent, within a deadline."""
        ...


class AccessLog:
    """The ASGI layer. Requests that make no tokens are logged at level debug: probes are many."""

    def __init__(self, app: ASGIApp, clock: Clock, traces: Traces | None = None) -> None:
        self.app = app
        self.clock = clock
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = Exchange(scope, self.clock.now_s())
        if self.traces is not None:
            self.traces.began()

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                names = dict(message.get("headers", ()))
                exchange.request_id = names.get(b"x-request-id", b"").decode() or None
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except asyncio.CancelledError:
            exchange.cancelled = True
            raise
        finally:
            exchange.ended_s = self.clock.now_s()
            _say(exchange)
            if self.traces is not None:
                self.traces.ended(exchange)


def _say(exchange: Exchange) -> None:
    measured = exchange.measured
    fields: dict[str, Any] = {
        "request_id": exchange.request_id,
        "method": exchange.scope["method"],
        "route": exchange.route,
        "status": exchange.status or 500,
        "duration_s": round(exchange.ended_s - exchange.began_s, 4),
    }
    if measured:
        first = measured[0]
        fields["request_id"] = first.request_id
        fields["reason"] = first.reason
        fields["ttft_s"] = None if first.ttft_s is None else round(first.ttft_s, 4)
        fields["prompt_tokens"] = first.prompt_tokens
        fields["generated_tokens"] = sum(choice.tokens for choice in measured)
    level = logging.INFO if measured or exchange.scope["method"] == "POST" else logging.DEBUG
    log.log(level, "request", extra={"fields": fields})
