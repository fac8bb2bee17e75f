"""The instance metadata service of one machine, version 2 only: tokens with a lifetime, 401 without
one, 403 to a request that was forwarded, 404 where there is nothing, and 500 when it is told to."""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LONGEST_S = 21_600


class ImdsDouble:
    """wall: the calendar. documents: by path. fails: how many questions are answered by a 500.
    tokens: how many were handed out."""

    def __init__(self, instance: str, wall: Callable[[], float]) -> None:
        self.wall, self.fails, self.tokens = wall, 0, 0
        self.documents = {"instance-id": instance, "placement/region": "us-east-1"}
        self.valid_s: dict[str, float] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def interrupt(self, in_s: float = 120.0) -> None:
        action = {"action": "terminate", "time": self._time(self.wall() + in_s)}
        self.documents["spot/instance-action"] = json.dumps(action)

    def rebalance(self) -> None:
        told = {"noticeTime": self._time(self.wall())}
        self.documents["events/recommendations/rebalance"] = json.dumps(told)

    def forget_tokens(self) -> None:
        """As after a restart of the service."""
        self.valid_s.clear()

    def token(self, lifetime: str | None, forwarded: bool) -> tuple[int, str]:
        if forwarded:
            return 403, ""
        if not lifetime or not lifetime.isdigit() or not 1 <= int(lifetime) <= LONGEST_S:
            return 400, ""
        name = secrets.token_urlsafe(16)
        self.valid_s[name] = self.wall() + int(lifetime)
        self.tokens += 1
        return 200, name

    def answer(self, path: str, token: str) -> tuple[int, str]:
        if self.fails:
            self.fails -= 1
            return 500, ""
        if self.valid_s.get(token, 0.0) <= self.wall():
            return 401, ""
        found = self.documents.get(path.removeprefix("/latest/meta-data/"))
        return (404, "") if found is None else (200, found)

    @staticmethod
    def _time(at_s: float) -> str:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _handler(double) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
                self._say(*double.token(lifetime, "X-Forwarded-For" in self.headers))

            def do_GET(self) -> None:
                token = self.headers.get("X-aws-ec2-metadata-token", "")
                self._say(*double.answer(self.path, token))

            def _say(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def imds_double(instance: str, wall: Callable[[], float]) -> Iterator[ImdsDouble]:
    made = ImdsDouble(instance, wall)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()
