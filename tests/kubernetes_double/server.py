"""A Kubernetes API server's double, over HTTP: what kubectl, helm and the official client ask for.

`with Double() as double:` starts it on a free port; `double.kubeconfig(path)` writes the way to it.
README.md says what it is not.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.kubernetes_double import protobuf, rbac
from tests.kubernetes_double.faults import Faults, answer
from tests.kubernetes_double.kinds import ApiError
from tests.kubernetes_double.rbac import ADMIN, Attempt
from tests.kubernetes_double.routes import Answer, Request, attempt_of, respond
from tests.kubernetes_double.store import At, Store
from tests.kubernetes_double.watching import Dropped

VERSION = "v1.37.0"


class Double:
    """store: its objects. attempts: every request on a resource, with the code that answered it,
    in their order. enforce: who has no right is told 403; ADMIN may everything. after: called when
    a request changed something, before its answer leaves (a controller that is never late)."""

    def __init__(
        self, store: Store | None = None, *, version: str = VERSION, enforce: bool = False
    ) -> None:
        self.store, self.version, self.enforce = store or Store(), version, enforce
        self.faults = Faults()
        self.attempts: list[tuple[Attempt, int]] = []
        self.after: Callable[[], None] | None = None
        self._users: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"double": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Double":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.drop_watches()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def token(self, user: str) -> str:
        """A bearer token that makes its bearer this user."""
        self._users[f"token-of-{user}"] = user
        return f"token-of-{user}"

    def user(self, authorization: str | None) -> str:
        """Who asks; the admin where nobody says."""
        return self._users.get((authorization or "").removeprefix("Bearer "), ADMIN)

    def kubeconfig(self, path: Path, user: str = ADMIN, namespace: str = "default") -> Path:
        """Write a kubeconfig for a user."""
        token = self.token(user)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [
                {
                    "name": "double",
                    "context": {"cluster": "double", "user": "user", "namespace": namespace},
                }
            ],
            "current-context": "double",
        }
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def note(self, attempt: Attempt, code: int) -> None:
        """Keep what was asked and answered."""
        self.attempts.append((attempt, code))

    def of(self, user: str) -> list[Attempt]:
        """What a user asked for, whatever was answered."""
        return [attempt for attempt, _ in self.attempts if attempt.user == user]

    def load(self, text: str) -> None:
        """Create every object of a YAML stream as the admin would, definitions first."""
        documents = [each for each in yaml.load_all(text, _LOADER) if each]
        documents.sort(key=lambda each: each["kind"] != "CustomResourceDefinition")
        for body in documents:
            self.add(body)

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create one object as the admin would, without HTTP."""
        return self.store.create(self.at(body), body)

    def at(self, body: dict[str, Any]) -> At:
        """Where an object belongs."""
        group, _, version = body["apiVersion"].rpartition("/")
        for name, kind in self.store.api[group, version].items():
            if kind.kind == body["kind"]:
                metadata = body["metadata"]
                namespace = metadata.get("namespace", "default") if kind.namespaced else None
                return At(group, version, name, namespace, metadata.get("name", ""))
        raise KeyError(body["kind"])


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    double: Double

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        try:
            content = self._content()
            self._send(self._answer(content))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Dropped:
            self.close_connection = True

    def _answer(self, content: bytes) -> Answer:
        double, attempt = self.double, None
        try:
            request = self._request(content)
            attempt = attempt_of(double.store, request, double.user(self._said("Authorization")))
            self._refuse(attempt)
            fault = None if attempt is None else double.faults.take(attempt)
            if fault == "no answer":
                raise Dropped
            if fault not in (None, "lost answer"):
                raise answer(fault)
            made = respond(double.store, double.version, request, double.faults, attempt)
            if self.command != "GET" and double.after is not None:
                double.after()
            if fault == "lost answer":
                raise Dropped
        except ApiError as error:
            made = Answer(error.code, error.status(), retry_after_s=error.retry_after_s)
        except Dropped:
            if attempt is not None:
                double.note(attempt, 0)
            raise
        if attempt is not None:
            double.note(attempt, made.code)
        return made

    def _refuse(self, attempt: Attempt | None) -> None:
        double = self.double
        if attempt is None or not double.enforce or attempt.resource.endswith("accessreviews"):
            return
        if not rbac.allowed(double.store, attempt):
            said = f'User "{attempt.user}" may not {attempt.line()}'
            raise ApiError(403, "Forbidden", f"forbidden: {said}")

    def _request(self, content: bytes) -> Request:
        url = urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        kind = (self._said("Content-Type") or "").partition(";")[0]
        agent = (self._said("User-Agent") or "unknown").partition("/")[0]
        accept = self._said("Accept") or ""
        body = _read(content, kind)
        return Request(self.command, url.path.rstrip("/"), query, body, kind, accept, agent)

    def _said(self, header: str) -> str | None:
        return self.headers.get(header)

    def _content(self) -> bytes:
        if self._said("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self._said("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, made: Answer) -> None:
        if made.stream is not None:
            self._stream(made.stream)
            return
        text = made.body if isinstance(made.body, bytes) else json.dumps(made.body).encode()
        self.send_response(made.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if made.retry_after_s is not None:
            self.send_header("Retry-After", str(made.retry_after_s))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, lines: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            if line:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def _read(content: bytes, kind: str) -> Any:
    if not content:
        return None
    if content.startswith(protobuf.MAGIC):
        return protobuf.decoded(content)
    if "yaml" in kind:
        return yaml.load(content, _LOADER)
    try:
        return json.loads(content)
    except ValueError:
        raise ApiError(400, "BadRequest", "the body is no JSON") from None
