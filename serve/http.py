"""The HTTP edge: an ASGI app with OpenAI's routes over any Service.

Every error is OpenAI's error object; a status is only sent once the first token exists; and when a
client goes away, streaming or not, the request at the service is closed. Called by the ingress
deployment (under Ray Serve or uvicorn); knows neither.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.clock import Clock, WallClock
from models.load.text import TextModel
from serve.access import MEASURED, AccessLog, Traces
from serve.admit import Admission, Caller
from serve.answers import ChatFormat, CompletionFormat, Format, Head, Model, ModelList
from serve.calls import CallReader
from serve.choices import Choices, frames, whole
from serve.connection import STALLED_S, ClientGone, EventStream, read_body, until_gone
from serve.echo import Echo, scored
from serve.embeddings import EmbeddingRequest, answer, embed_all
from serve.engine.sequence import Request
from serve.errors import RequestError
from serve.keys import KeyRing
from serve.observe import EdgeMetrics, RequestMetrics
from serve.openai import ChatRequest, CompletionRequest, GenerationRequest, parse
from serve.page import page_route
from serve.service import Service
from serve.stream import Generation
from serve.texts import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

log = logging.getLogger(__name__)
LONG_BODY_BYTES = 32_768  # from here on, encoding would hold up other streams: done in a thread
CLIENT_GONE = 499  # nginx's status for it; nobody reads it, but logs and metrics do
T = TypeVar("T")


@dataclass(frozen=True)
class EdgeSettings:
    """What the edge is told. model: the name clients send; context_tokens: longest prompt plus
    answer, None for the model's own; deadlines in seconds; keys: who may ask under /v1;
    quality_cost: what clients are told of lossy settings, see cluster.settings.losses."""

    model: str
    context_tokens: int | None = None
    max_body_bytes: int = 4 << 20
    probe_deadline_s: float = 10.0
    status_deadline_s: float = 2.0
    close_deadline_s: float = 10.0
    stalled_s: float = STALLED_S
    keys: KeyRing = KeyRing()
    quality_cost: str = ""


def build_app(
    service: Service,
    text_model: TextModel,
    settings: EdgeSettings,
    *,
    chance: random.Random | None = None,
    clock: Clock | None = None,
    traces: Traces | None = None,
) -> Starlette:
    """The app. chance (seeds, ids) and clock (latencies) default to the system's."""
    own = text_model.config.context_tokens
    clock = clock or WallClock()
    context_tokens = min(own, settings.context_tokens or own)
    admission = Admission(
        text_model,
        settings.model,
        context_tokens=context_tokens,
        chance=chance or random.SystemRandom(),
        clock=clock,
    )
    if traces is not None:
        service = traces.watch(service)
    edge = Edge(
        service, text_model, settings, admission, EdgeMetrics(settings.model, context_tokens, clock)
    )
    app = Starlette(
        routes=edge.routes(),
        middleware=[Middleware(AccessLog, clock=clock, traces=traces)],
        exception_handlers={
            RequestError: edge.on_request_error,
            HTTPException: edge.on_http_error,
            ClientDisconnect: edge.on_client_gone,
            ClientGone: edge.on_client_gone,
            Exception: edge.on_fault,
        },
        lifespan=None if traces is None else traces.lifespan,
    )
    app.router.redirect_slashes = False  # a wrong path is a 404, not a redirect
    return app


class Edge:
    """The handlers of one app and what they share."""

    def __init__(
        self,
        service: Service,
        text_model: TextModel,
        settings: EdgeSettings,
        admission: Admission,
        metrics: EdgeMetrics,
    ) -> None:
        self.service = service
        self.settings = settings
        self.admission = admission
        self.metrics = metrics
        self._tokenizer = text_model.tokenizer
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/", page_route(), methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.exposition, methods=["GET"]),
            Route("/status", self.status, methods=["GET"]),
        ]

    async def chat(self, http: HttpRequest) -> Response:
        caller = self._caller(http)
        body = await read_body(http, self.settings.max_body_bytes)
        parsed = parse(ChatRequest, body)
        request = await _encode(body, lambda: self.admission.chat(parsed, caller))
        return await self._generate(http, parsed, request, ChatFormat(self._head(parsed, request)))

    async def completion(self, http: HttpRequest) -> Response:
        caller = self._caller(http)
        body = await read_body(http, self.settings.max_body_bytes)
        parsed = parse(CompletionRequest, body)
        request = await _encode(body, lambda: self.admission.completion(parsed, caller))
        echo = await self._echo(http, parsed, request) if parsed.echo else Echo()
        form = CompletionFormat(self._head(parsed, request), echo)
        return await self._generate(http, parsed, request, form)

    async def _echo(self, http: HttpRequest, parsed: CompletionRequest, request: Request) -> Echo:
        """The prompt again, scored where log-probabilities are reported."""
        text = self.admission.echo(parsed)
        if request.logprobs is None:
            return Echo(text)
        return await until_gone(http.receive, scored(self.service, request, self._tokenizer, text))

    def _caller(self, http: HttpRequest) -> Caller:
        """Who asks; RequestError 401 where a key is wanted and none that is known was sent."""
        return self.settings.keys.caller(http.headers.get("authorization"))

    async def embeddings(self, http: HttpRequest) -> Response:
        caller = self._caller(http)
        body = await read_body(http, self.settings.max_body_bytes)
        parsed = parse(EmbeddingRequest, body)
        requests = await _encode(body, lambda: self.admission.embeddings(parsed, caller))
        measured = [self._measured(request, 1) for request in requests]
        http.scope[MEASURED] = measured
        made = embed_all(self.service, requests, measured)
        vectors = await until_gone(http.receive, made)
        return JSONResponse(answer(parsed, requests, vectors))

    async def tokenize(self, http: HttpRequest) -> Response:
        self._caller(http)
        body = await read_body(http, self.settings.max_body_bytes)
        parsed = parse(TokenizeRequest, body)
        ids = await _encode(body, lambda: self.admission.tokenize(parsed))
        spelled = self.admission.spellings(ids) if parsed.return_token_strs else None
        length = self.admission.context_tokens
        answer = TokenizeAnswer(
            count=len(ids), max_model_len=length, tokens=ids, token_strs=spelled
        )
        return JSONResponse(answer.model_dump())

    async def detokenize(self, http: HttpRequest) -> Response:
        self._caller(http)
        body = await read_body(http, self.settings.max_body_bytes)
        parsed = parse(DetokenizeRequest, body)
        text = await _encode(body, lambda: self.admission.detokenize(parsed))
        return JSONResponse(DetokenizeAnswer(prompt=text).model_dump())

    def _head(self, parsed: GenerationRequest, request: Request) -> Head:
        created = int(time.time())
        return Head(request.request_id, created, self.settings.model, parsed.include_usage)

    async def _generate(
        self, http: HttpRequest, parsed: GenerationRequest, request: Request, form: Format
    ) -> Response:
        """Start the request and answer it, as a stream or whole; it is closed whatever happens."""
        shown = parsed.n or 1
        if parsed.choices > shown and request.logprobs is None:
            request = replace(request, logprobs=0)  # the best are the likeliest
        requests = self.admission.choices(request, parsed.choices)
        measured = [self._measured(one, len(requests)) for one in requests]
        for other in measured[1:]:
            other.prompt_counted = True  # the choices have one prompt
        http.scope[MEASURED] = measured
        readers = [_reader(parsed, one) for one in requests]
        choices = Choices(list(map(self._generation, requests, measured, readers)))
        headers = {"x-request-id": request.request_id}
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(choices.aclose)
            await until_gone(http.receive, choices.start())
            if parsed.stream:
                stack.pop_all()  # the response closes the generation from here on
                events = frames(choices, form, parsed.include_usage)
                return EventStream(events, choices.aclose, headers, self.settings.stalled_s)
            answer = await until_gone(
                http.receive, whole(choices, form, shown, parsed.reported_logprobs is not None)
            )
        return Response(answer.model_dump_json(), 200, headers, "application/json")

    def _measured(self, request: Request, choices: int) -> RequestMetrics:
        limits, prompt_tokens = request.limits, len(request.prompt)
        return RequestMetrics(
            self.metrics, prompt_tokens, limits.max_tokens, choices, request.request_id
        )

    def _generation(
        self, request: Request, metrics: RequestMetrics, reader: CallReader | None
    ) -> Generation:
        deadline_s = self.settings.close_deadline_s
        return Generation(self.service, request, self._tokenizer, metrics, deadline_s, reader)

    async def models(self, http: HttpRequest) -> Response:
        self._caller(http)
        return JSONResponse(ModelList(data=[self._model()]).model_dump())

    async def model(self, http: HttpRequest) -> Response:
        self._caller(http)
        self.admission.known(http.path_params["model"])
        return JSONResponse(self._model().model_dump())

    def _model(self) -> Model:
        length = self.admission.context_tokens
        return Model(
            id=self.settings.model,
            created=self._created,
            max_model_len=length,
            quality_cost=self.settings.quality_cost,
        )

    async def health(self, http: HttpRequest) -> Response:
        """This process answers; whether tokens can be made is /ready."""
        return JSONResponse({"status": "ok"})

    async def ready(self, http: HttpRequest) -> Response:
        ready = await self._ask(self.service.probe(), self.settings.probe_deadline_s)
        return JSONResponse({"ready": bool(ready)}, 200 if ready else 503)

    async def exposition(self, http: HttpRequest) -> Response:
        status = await self._ask(self.service.status(), self.settings.status_deadline_s)
        text = self.metrics.exposition(status)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def status(self, http: HttpRequest) -> Response:
        status = await self._ask(self.service.status(), self.settings.status_deadline_s)
        if status is None:
            text = "The service did not report its status in time; see the server's log."
            raise RequestError(503, "server_error", None, text, "status_unavailable")
        return JSONResponse(status)

    async def _ask(self, answer: Awaitable[T], deadline_s: float) -> T | None:
        """The service's answer; None, and the reason in the log, when it fails or is late."""
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except Exception:  # the service may be remote, and fail with anything
            log.exception("the service gave no answer within %g s", deadline_s)
            return None

    async def on_request_error(self, http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return self._error(error)

    async def on_http_error(self, http: HttpRequest, error: Exception) -> Response:
        """Starlette's own refusals: unknown paths and methods."""
        assert isinstance(error, HTTPException)
        line, code = f"{http.method} {http.url.path}", None
        text = f"The request {line} was refused: {error.detail}."
        if error.status_code == 404:
            text, code = f"Unknown request URL: {line}.", "unknown_url"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            text, code = f"{line} is not accepted; use {allowed}.", "method_not_allowed"
        refusal = RequestError(error.status_code, "invalid_request_error", None, text, code)
        return self._error(refusal, dict(error.headers or {}))

    async def on_client_gone(self, http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def on_fault(self, http: HttpRequest, error: Exception) -> Response:
        """A bug of ours; the server's log has the traceback."""
        text = "The server failed on this request; the fault is in its log."
        return self._error(RequestError(500, "server_error", None, text, "internal_error"))

    def _error(self, error: RequestError, headers: dict[str, str] | None = None) -> Response:
        self.metrics.refused(error.status, error.code)
        headers = dict(headers or {})
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)


def _reader(parsed: GenerationRequest, request: Request) -> CallReader | None:
    """What reads tool calls out of the answer, where the model was offered tools."""
    if not isinstance(parsed, ChatRequest) or not parsed.offered_tools:
        return None
    names = {tool.function.name for tool in parsed.offered_tools}
    most = 1 if parsed.parallel_tool_calls is False else None
    return CallReader(names, most, request.request_id)


async def _encode(body: bytes, admit: Callable[[], T]) -> T:
    return admit() if len(body) < LONG_BODY_BYTES else await asyncio.to_thread(admit)
