"""OpenTelemetry traces of requests that make tokens, sent to a collector over OTLP/HTTP.

`Tracer` is one app's `access.Traces`, with a provider of its own: nothing here is global. Spans are
made when a request is over, from the times that were measured anyway, and a thread sends them; a
collector that is slow or gone costs spans, never a request. Times, counts, terms and the tenant's
name are told, text of prompts and answers never. Imported only where an endpoint is set.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serve.access import Exchange
from serve.engine.sequence import Delta, Request
from serve.observe import RequestMetrics
from serve.service import Service

log = logging.getLogger(__name__)
TRACES_PATH = "/v1/traces"
EXPORT_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 5.0
MOST_SHOWN = 128  # choices or inputs of one request with spans of their own; inputs may be 2048
NS = 1_000_000_000

Attributes = dict[str, AttributeValue]


class Operation(NamedTuple):
    """A route that makes tokens, by the GenAI conventions' name; summed: its prompts are many."""

    name: str
    path: str
    summed: bool = False


OPERATIONS = {  # by the handler
    "chat": Operation("chat", "/v1/chat/completions"),
    "completion": Operation("text_completion", "/v1/completions"),
    "embeddings": Operation("embeddings", "/v1/embeddings", summed=True),
}


@dataclass
class Asked:
    """What the service was asked on behalf of a request, and how much of it was cached."""

    request: Request
    cached_tokens: int = 0


class Tracer:
    """Makes and sends the spans of one app. endpoint: the collector's, with or without the path."""

    def __init__(self, endpoint: str, model: str) -> None:
        url = endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH
        exporter = OTLPSpanExporter(
            url, timeout=EXPORT_DEADLINE_S, compression=Compression.NoCompression
        )
        processor = BatchSpanProcessor(
            exporter,
            max_queue_size=2048,
            schedule_delay_millis=1000,
            max_export_batch_size=512,
        )
        self._provider = TracerProvider(
            ParentBased(ALWAYS_ON),
            Resource({"service.name": "sanderling", "sanderling.model": model}),
            shutdown_on_exit=False,  # has no deadline; `lifespan` has one
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sanderling")
        self._model = model
        self._asked: ContextVar[list[Asked]] = ContextVar("asked")

    def watch(self, service: Service) -> Service:
        return Watched(service, self._asked)

    def began(self) -> None:
        self._asked.set([])

    def ended(self, exchange: Exchange) -> None:
        operation = OPERATIONS.get(exchange.route)
        if operation is None or exchange.scope["method"] != "POST":
            return
        try:
            self._emit(operation, exchange)
        except Exception:  # foreign code, after the answer: no reason to break the connection
            log.exception("the trace of request %s is lost", exchange.request_id)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Send what is left, for at most CLOSE_DEADLINE_S. Call once."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_DEADLINE_S)
        if closing.is_alive():
            log.warning("the last traces could not be sent within %g s", CLOSE_DEADLINE_S)

    def _emit(self, operation: Operation, exchange: Exchange) -> None:
        zero_ns = time.time_ns() - round(exchange.ended_s * NS)
        failure = _failure(exchange)
        span = self._tracer.start_span(
            operation.name,
            _parent(exchange),
            SpanKind.SERVER,
            self._attributes(operation, exchange),
            start_time=zero_ns + round(exchange.began_s * NS),
        )
        if failure:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", failure)
        if span.is_recording():  # the caller's trace may be one that is not sampled
            context = set_span_in_context(span, Context())
            for index, choice in enumerate(exchange.measured[:MOST_SHOWN]):
                for phase in _phases(choice, exchange.ended_s, bool(failure)):
                    self._phase(phase, index, context, zero_ns)
        span.end(zero_ns + round(exchange.ended_s * NS))

    def _phase(self, phase: "Phase", index: int, context: Context, zero_ns: int) -> None:
        span = self._tracer.start_span(
            phase.name,
            context,
            attributes={"sanderling.choice": index, **phase.attributes},
            start_time=zero_ns + round(phase.began_s * NS),
        )
        if phase.failed:
            span.set_status(StatusCode.ERROR)
        span.end(zero_ns + round(phase.ended_s * NS))

    def _attributes(self, operation: Operation, exchange: Exchange) -> Attributes:
        measured = exchange.measured
        told: Attributes = {
            "gen_ai.operation.name": operation.name,
            "gen_ai.provider.name": "sanderling",
            "gen_ai.request.model": self._model,  # any other is refused, and is the client's text
            "http.request.method": "POST",
            "http.route": operation.path,
        }
        if exchange.status is not None:
            told["http.response.status_code"] = exchange.status
        if not measured:
            return told
        asked = {one.request.request_id: one for one in self._asked.get([])}
        told["gen_ai.response.id"] = measured[0].request_id
        told["gen_ai.response.finish_reasons"] = [one.reason for one in measured[:MOST_SHOWN]]
        told |= _usage(measured if operation.summed else measured[:1], asked)
        told["gen_ai.usage.output_tokens"] = sum(choice.tokens for choice in measured)
        if len(measured) > 1 and not operation.summed:
            told["gen_ai.request.choice.count"] = len(measured)
        first = asked.get(measured[0].request_id)
        return told if first is None else told | _terms(first.request)


class Watched:
    """A Service that notes what each HTTP request asks of it."""

    def __init__(self, service: Service, asked: ContextVar[list[Asked]]) -> None:
        self._service = service
        self._asked = asked

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        one = Asked(request)
        self._asked.get([]).append(one)  # of nobody's, where no HTTP request is under way
        return self._noted(one)

    async def _noted(self, one: Asked) -> AsyncGenerator[Delta, None]:
        async with contextlib.aclosing(self._service.generate(one.request)) as deltas:
            async for delta in deltas:
                one.cached_tokens = delta.cached_tokens
                yield delta

    async def probe(self) -> bool:
        return await self._service.probe()

    async def status(self) -> dict[str, Any]:
        return await self._service.status()


class Phase(NamedTuple):
    """A part of one choice's time, by the measurements' clock."""

    name: str
    began_s: float
    ended_s: float
    failed: bool
    attributes: Attributes


def _phases(choice: RequestMetrics, over_s: float, failed: bool) -> list[Phase]:
    """From admission to the first token, and on to the last; what did not get so far ends with the
    request, at over_s. failed: the request did; then the choices that did are marked."""
    failed = failed and choice.reason == "error"
    cut = choice.reason in ("abort", "error")
    prompt: Attributes = {"gen_ai.usage.input_tokens": choice.prompt_tokens}
    if choice.ttft_s is None:
        return [Phase("queue+prefill", choice.started_s, over_s, failed, prompt)]
    first_s = choice.started_s + choice.ttft_s
    waited = Phase("queue+prefill", choice.started_s, first_s, False, prompt)
    if not choice.tokens and not cut:  # an embedding
        return [waited]
    last_s = over_s if cut else max(first_s, choice.last_s)
    answer: Attributes = {
        "gen_ai.usage.output_tokens": choice.tokens,
        "gen_ai.response.finish_reasons": [choice.reason],
    }
    return [waited, Phase("decode", first_s, last_s, failed, answer)]


def _failure(exchange: Exchange) -> str:
    """What kind of failure of ours it was; "" for none. A client that left, or one that was
    refused (4xx), is none; a stream may fail after its status 200."""
    if exchange.cancelled:
        return ""
    status = exchange.status or 500
    if status < 400 and any(choice.reason == "error" for choice in exchange.measured):
        return "generation_failed"
    return str(status) if status >= 500 else ""


def _usage(counted: list[RequestMetrics], asked: dict[str, Asked]) -> Attributes:
    """Of the prompts, as the answer's usage says it; choices of one prompt count it once."""
    cached_tokens = sum(
        min(asked[one.request_id].cached_tokens, one.prompt_tokens)
        for one in counted
        if one.request_id in asked
    )
    return {
        "gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in counted),
        "gen_ai.usage.cache_read.input_tokens": cached_tokens,
    }


def _terms(request: Request) -> Attributes:
    """What was asked for, and by whom; of a key nothing is known here."""
    tenant = request.cache_key.salt.removeprefix("tenant:")
    told: Attributes = {"sanderling.tenant": tenant} if tenant else {}
    if request.embed:
        return told
    return told | {
        "gen_ai.request.max_tokens": request.limits.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
    }


def _parent(exchange: Exchange) -> Context:
    """The caller's span, by its traceparent; without one, or with a broken one, none."""
    wanted = (b"traceparent", b"tracestate")
    sent = [pair for pair in exchange.scope["headers"] if pair[0] in wanted]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent}
    return TraceContextTextMapPropagator().extract(headers, Context())
