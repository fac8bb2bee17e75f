"""One log line per request, at its end: who, what, how long, how many tokens; never its text.

An ASGI layer around the app, so that it sees streams to their end and every kind of error answer.
`configure` sets the format of all our log lines; the ingress process calls it.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.clock import Clock
from serve.observe import RequestMetrics

log = logging.getLogger("serve.access")
MEASURED = "sanderling.measured"  # in the ASGI scope: the edge's RequestMetrics of each choice
OURS = ("serve", "models", "cluster", "kernels")
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


class AccessLog:
    """The ASGI layer. Requests that make no tokens are logged at level debug: probes are many."""

    def __init__(self, app: ASGIApp, clock: Clock) -> None:
        self.app = app
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began_s = self.clock.now_s()
        seen: dict[str, Any] = {"status": 500, "request_id": None}

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                names = dict(message.get("headers", ()))
                seen["request_id"] = names.get(b"x-request-id", b"").decode() or None
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            _say(scope, seen, self.clock.now_s() - began_s)


def _say(scope: Scope, seen: dict[str, Any], duration_s: float) -> None:
    measured: list[RequestMetrics] = scope.get(MEASURED, [])
    fields: dict[str, Any] = {
        "request_id": seen["request_id"],
        "method": scope["method"],
        "route": getattr(scope.get("endpoint"), "__name__", "unknown"),  # never what was sent
        "status": seen["status"],
        "duration_s": round(duration_s, 4),
    }
    if measured:
        first = measured[0]
        fields["request_id"] = first.request_id
        fields["reason"] = first.reason
        fields["ttft_s"] = None if first.ttft_s is None else round(first.ttft_s, 4)
        fields["prompt_tokens"] = first.prompt_tokens
        fields["generated_tokens"] = sum(choice.tokens for choice in measured)
    level = logging.INFO if measured or scope["method"] == "POST" else logging.DEBUG
    log.log(level, "request", extra={"fields": fields})
