"""Traces of requests, as a real OTLP collector reads them; and that nobody waits for one."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cluster.settings import Settings, SettingsError, resolve
from serve import app as serve_app
from serve import trace
from serve.errors import RequestError
from serve.http import EdgeSettings, build_app
from serve.keys import KeyEntry, KeyRing, digest
from serve.service import Service
from serve.trace import Tracer
from tests.edge.fakes import MODEL, ScriptedService, Step, spoken, tiny_text_model
from tests.edge.test_disconnect import connect
from tests.edge.test_embeddings import Vectors

ASKED, ANSWERED, KEY = "zanzibar", "quixotic", "sk-sanderling-tested"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": f"say {ASKED}"}],
    "max_tokens": 40,
    "temperature": 0.5,
    "top_p": 0.25,
}
STREAM = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
ERROR, UNSET = Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET
NS = 1_000_000_000


class Collector:
    """What was sent to an OTLP/HTTP collector: bodies as they came, and the spans in them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()

    @property
    def exports(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[Span]:
        resources = [resource for export in self.exports for resource in export.resource_spans]
        return [s for r in resources for scope in r.scope_spans for s in scope.spans]

    @property
    def root(self) -> Span:
        [root] = [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]
        return root

    @property
    def parts(self) -> list[Span]:
        """The other spans in order of their ends."""
        parts = [span for span in self.spans if span.kind != Span.SPAN_KIND_SERVER]
        return sorted(parts, key=lambda span: (span.end_time_unix_nano, span.start_time_unix_nano))


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector on a free port, and its base URL."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 (http.server's name)
            collector.paths.add(self.path)
            collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


@contextlib.contextmanager
def traced(service: Service, endpoint: str, **settings: Any) -> Iterator[str]:
    """The edge on a real server that ends in order, so that its traces are sent before this
    returns; yields its base URL."""
    traces = Tracer(endpoint, MODEL) if endpoint else None
    edge = EdgeSettings(model=MODEL, **settings)
    app = build_app(service, tiny_text_model(), edge, traces=traces)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    sock.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


def asked(
    service: Service, body: object, path: str = "/v1/chat/completions", **settings: Any
) -> tuple[httpx.Response, Collector]:
    """The answer to one request with a parent, and what the collector got by the server's end."""
    headers = {**PARENT, "Authorization": f"Bearer {KEY}"}
    with collecting() as (collector, endpoint):
        with traced(service, endpoint, **settings) as url:
            answer = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=30)
        return answer, collector


def attributes(span: Span) -> dict[str, Any]:
    """Plain values."""
    read: dict[str, Any] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        assert kind
        value = getattr(pair.value, kind)
        read[pair.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return read


def usage(answer: httpx.Response) -> dict[str, Any]:
    """Of a whole answer, or in the last chunk of a stream."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        read: dict[str, Any] = answer.json()["usage"]
        return read
    chunks = [line for line in answer.text.split("\n\n") if line]
    assert chunks.pop() == "data: [DONE]"
    last: dict[str, Any] = json.loads(chunks[-1].removeprefix("data: "))["usage"]
    return last


def is_inside(part: Span, whole: Span) -> bool:
    begin, end = part.start_time_unix_nano, part.end_time_unix_nano
    return whole.start_time_unix_nano <= begin <= end <= whole.end_time_unix_nano


def slowly(text: str) -> ScriptedService:
    """The first token after 0.1 s, the last one 0.2 s after it."""
    first, *rest = spoken(text, cached_tokens=4)
    return ScriptedService([0.1, first, 0.2, *rest])


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
def test_a_request_is_one_trace(body):
    before_ns = time.time_ns()
    answer, collector = asked(slowly(ANSWERED), body)
    after_ns = time.time_ns()
    root, (waited, decode) = collector.root, collector.parts
    assert collector.paths == {"/v1/traces"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert root.parent_span_id.hex() == SPAN_ID
    assert {waited.parent_span_id, decode.parent_span_id} == {root.span_id}
    assert (root.name, waited.name, decode.name) == ("chat", "queue+prefill", "decode")
    assert before_ns - NS < root.start_time_unix_nano  # clocks of one machine, loosely
    assert root.end_time_unix_nano < after_ns + NS
    assert is_inside(waited, root) and is_inside(decode, root)
    assert decode.start_time_unix_nano == waited.end_time_unix_nano
    assert waited.end_time_unix_nano - waited.start_time_unix_nano >= 0.099 * NS
    assert decode.end_time_unix_nano - decode.start_time_unix_nano >= 0.199 * NS
    assert {span.status.code for span in collector.spans} == {UNSET}
    told, counted = attributes(root), usage(answer)
    assert told["gen_ai.usage.input_tokens"] == counted["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == counted["completion_tokens"]
    assert attributes(decode)["gen_ai.usage.output_tokens"] == counted["completion_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] == 4
    assert told["gen_ai.response.id"] == answer.headers["x-request-id"]
    assert told["gen_ai.response.finish_reasons"] == ["stop"]
    assert told["http.response.status_code"] == 200
    assert told["http.route"] == "/v1/chat/completions"


def test_what_was_asked_for_is_told_and_by_which_tenant():
    ring = KeyRing([KeyEntry(tenant="acme", sha256=digest(KEY))])
    _, collector = asked(ScriptedService(spoken("hi")), CHAT, keys=ring)
    told = attributes(collector.root)
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.request.max_tokens"] == 40
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.top_p"]) == (0.5, 0.25)
    assert told["sanderling.tenant"] == "acme"
    [resource] = [r.resource for export in collector.exports for r in export.resource_spans]
    named = {pair.key: pair.value.string_value for pair in resource.attributes}
    assert named == {"service.name": "sanderling", "sanderling.model": MODEL}


@pytest.mark.parametrize("body", [CHAT, STREAM, {**CHAT, "model": ASKED}, {**CHAT, "n": ASKED}])
def test_no_text_and_no_key_is_told(body):
    ring = KeyRing([KeyEntry(tenant="acme", sha256=digest(KEY))])
    answer, collector = asked(ScriptedService(spoken(ANSWERED)), body, keys=ring)
    assert body not in (CHAT, STREAM) or answer.status_code == 200
    sent = b"".join(collector.bodies)
    assert MODEL.encode() in sent, "the search would find nothing"
    for secret in (ASKED, ANSWERED, KEY, digest(KEY), digest(KEY)[:16]):
        assert secret.encode() not in sent
    ours = [
        list(secret.encode()) for secret in (ASKED, ANSWERED)
    ]  # a token of this model is a byte
    assert not any(str(ids)[1:-1].encode() in sent for ids in ours)


def test_choices_have_spans_of_their_own_and_count_their_prompt_once():
    answer, collector = asked(slowly(ANSWERED), {**CHAT, "n": 2})
    told, counted = attributes(collector.root), usage(answer)
    assert told["gen_ai.request.choice.count"] == 2
    assert told["gen_ai.usage.input_tokens"] == counted["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == counted["completion_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    named = sorted((s.name, attributes(s)["sanderling.choice"]) for s in collector.parts)
    assert named == [("decode", 0), ("decode", 1), ("queue+prefill", 0), ("queue+prefill", 1)]
    assert all(is_inside(span, collector.root) for span in collector.parts)


def test_completions_and_embeddings():
    body = {"model": MODEL, "prompt": "he"}
    _, collector = asked(ScriptedService(spoken("hi", finish="length")), body, "/v1/completions")
    assert collector.root.name == "text_completion"
    assert attributes(collector.root)["gen_ai.response.finish_reasons"] == ["length"]
    inputs = {"model": MODEL, "input": ["hello", "he"]}
    answer, collector = asked(Vectors(), inputs, "/v1/embeddings")
    told = attributes(collector.root)
    assert collector.root.name == "embeddings"
    assert told["gen_ai.usage.input_tokens"] == usage(answer)["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 0
    assert [span.name for span in collector.parts] == ["queue+prefill"] * 2


def test_a_refusal_is_no_error_of_the_server():
    answer, collector = asked(ScriptedService(), {**CHAT, "max_tokens": -1})
    assert answer.status_code == 400
    assert collector.parts == [] and collector.root.status.code == UNSET
    assert attributes(collector.root)["http.response.status_code"] == 400
    full = RequestError(429, "server_error", None, "full", "full")  # by the service, once admitted
    answer, collector = asked(ScriptedService([full]), CHAT)
    assert answer.status_code == 429
    assert [span.name for span in collector.parts] == ["queue+prefill"]
    assert {span.status.code for span in collector.spans} == {UNSET}


def test_a_failure_is_an_error_also_in_mid_stream():
    answer, collector = asked(ScriptedService([RuntimeError(ASKED)]), CHAT)
    assert answer.status_code == 500
    assert {span.status.code for span in collector.spans} == {ERROR}
    assert attributes(collector.root)["error.type"] == "500"
    script: list[Step] = [spoken("hi")[0], RuntimeError(ASKED)]
    answer, collector = asked(ScriptedService(script), STREAM)
    assert answer.status_code == 200 and "generation_failed" in answer.text
    waited, decode = collector.parts
    told = attributes(collector.root)
    assert collector.root.status.code == decode.status.code == ERROR
    assert waited.status.code == UNSET
    assert told["error.type"] == "generation_failed"
    assert told["gen_ai.response.finish_reasons"] == ["error"]
    assert ASKED.encode() not in b"".join(collector.bodies)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [[], spoken("hi", finish="length")[:1]])
def test_a_client_that_leaves_aborts_its_spans(stream, script):
    service = ScriptedService(script, hang=True)
    with collecting() as (collector, endpoint):
        with traced(service, endpoint) as url:
            sock = connect(url, stream)
            assert service.delivered.wait(10)
            sock.close()
            assert service.closed.wait(10)
        root = collector.root
    assert attributes(root)["gen_ai.response.finish_reasons"] == ["abort"]
    assert {span.status.code for span in collector.spans} == {UNSET}
    names = ["queue+prefill", "decode"] if script else ["queue+prefill"]
    assert [span.name for span in collector.parts] == names
    assert collector.parts[-1].end_time_unix_nano == root.end_time_unix_nano


def test_a_cancelled_handler_is_a_client_that_left():
    """How Ray Serve tells it; no answer was begun, and none is told."""
    service = ScriptedService(hang=True)
    with collecting() as (collector, endpoint):
        asyncio.run(cancelled(service, endpoint))
    told = attributes(collector.root)
    assert told["gen_ai.response.finish_reasons"] == ["abort"]
    assert "http.response.status_code" not in told
    assert collector.root.status.code == UNSET


async def cancelled(service: ScriptedService, endpoint: str) -> None:
    traces = Tracer(endpoint, MODEL)
    app = build_app(service, tiny_text_model(), EdgeSettings(model=MODEL), traces=traces)
    async with traces.lifespan(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            while not service.delivered.is_set():
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def test_requests_that_make_no_tokens_and_callers_that_do_not_sample_leave_no_trace():
    with collecting() as (collector, endpoint):
        with traced(ScriptedService(spoken("hi")), endpoint) as url:
            for path in ("/health", "/v1/models", "/metrics"):
                assert httpx.get(f"{url}{path}").status_code == 200
            assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
            ids = httpx.post(f"{url}/tokenize", json={"model": MODEL, "prompt": "he"})
            assert ids.status_code == 200
            headers = {"traceparent": PARENT["traceparent"][:-1] + "0"}
            httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
        assert collector.spans == []


@pytest.mark.parametrize("sent", ["", "00-nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", "\xff" * 9000])
def test_a_broken_parent_is_none(sent):
    with collecting() as (collector, endpoint):
        with traced(ScriptedService(spoken("hi")), endpoint) as url:
            headers = {"traceparent": sent.encode("latin-1")}
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 200
        assert collector.root.parent_span_id == b"" and collector.root.trace_id.hex() != TRACE_ID


def words(endpoint: str, body: dict[str, Any], requests: int) -> list[Any]:
    """The answers' texts and usages."""
    with traced(ScriptedService(spoken(ANSWERED)), endpoint) as url, httpx.Client() as client:
        answers = [client.post(f"{url}/v1/completions", json=body) for _ in range(requests)]
    return [(a.status_code, a.json()["choices"], a.json()["usage"]) for a in answers]


@pytest.mark.parametrize("listening", [False, True], ids=["nobody", "silent"])
def test_a_dead_collector_changes_no_answer_and_holds_up_no_end(listening, monkeypatch):
    """Nobody at its port, or somebody who takes connections and never says a word."""
    monkeypatch.setattr(trace, "CLOSE_DEADLINE_S", 0.2)
    monkeypatch.setattr(trace, "EXPORT_DEADLINE_S", 60.0)  # longer than `traced` waits for the end
    body = {"model": MODEL, "prompt": ASKED, "max_tokens": 16}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listening:
            sock.listen()
        endpoint = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert words(endpoint, body, 200) == words("", body, 200)  # more than one export's spans


def test_a_fault_in_the_tracing_changes_no_answer(monkeypatch):
    monkeypatch.setattr(trace, "_phases", lambda *_: 1 / 0)
    answer, collector = asked(ScriptedService(spoken("hi")), CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "hi"
    assert collector.spans == []


def test_without_an_endpoint_opentelemetry_is_not_imported():
    code = """
import asyncio, sys, httpx
from cluster.settings import Settings
from serve import app
from serve.http import EdgeSettings, build_app
from tests.edge.fakes import MODEL, ScriptedService, spoken, tiny_text_model

traces = app.traces(Settings())
service, text = ScriptedService(spoken("hi")), tiny_text_model()
edge = build_app(service, text, EdgeSettings(MODEL), traces=traces)

async def ask():
    transport = httpx.ASGITransport(edge)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        body = {"model": MODEL, "prompt": "he"}
        return (await client.post("/v1/completions", json=body)).status_code

print(asyncio.run(ask()), "opentelemetry" in sys.modules, "serve.trace" in sys.modules)
import serve.trace
print("opentelemetry" in sys.modules)
"""
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.splitlines() == ["200 False False", "True"], ran.stderr


def test_the_setting_makes_a_tracer():
    with collecting() as (collector, endpoint):
        settings = Settings.model_validate({"observe": {"otlp_endpoint": f"{endpoint}/v1/traces"}})
        traces = serve_app.traces(settings)
        assert isinstance(traces, Tracer)
        app = build_app(
            ScriptedService(spoken("hi")), tiny_text_model(), EdgeSettings(MODEL), traces=traces
        )

        async def work() -> None:
            transport = httpx.ASGITransport(app)
            client = httpx.AsyncClient(transport=transport, base_url="http://tiny")
            async with client, traces.lifespan(app):
                await client.post("/v1/chat/completions", json=CHAT)

        asyncio.run(work())
        assert collector.paths == {"/v1/traces"} and collector.root.name == "chat"


@pytest.mark.parametrize(
    "url",
    ["collector:4318", "grpc://c:4317", "http://", "http://c:99999", "http://a b", "http://c/?q=1"],
)
def test_an_endpoint_that_is_none_is_refused_in_a_sentence(url):
    with pytest.raises(SettingsError) as refused:
        resolve(environ={}, sets=[f"observe.otlp_endpoint={url}"])
    message = str(refused.value)
    assert f"observe.otlp_endpoint = {url!r}" in message and "http://host:port" in message
    assert "--set" in message and "\n" not in message
