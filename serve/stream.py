"""From deltas to what a client reads: text pieces, finish reason, token counts.

A streamed answer and a whole one are made of the same pieces by the same code, so their texts are
equal. `Generation` owns one request at the service from the first delta to the close; choices.py
drives it and closes it, whatever happened.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import NamedTuple

from models.detokenize import Detokenizer
from models.tokenizer import Tokenizer
from serve.answers import FinishReason
from serve.calls import CallReader, Read, ToolCall
from serve.engine.sequence import Delta, Limits, Request, TokenLogprob
from serve.engine.stops import StopMatcher
from serve.errors import RequestError
from serve.observe import RequestMetrics
from serve.service import Service
from serve.spell import ShownToken, spell

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Text that may be shown, and why generation ended, on the last piece. tokens: those that came
    since the last piece, where log-probabilities were asked for. calls: of tools, complete."""

    text: str
    finish: FinishReason | None = None
    tokens: tuple[ShownToken, ...] = ()
    calls: tuple[ToolCall, ...] = ()


class Transcript:
    """The text of one answer. Pure: the text depends on the tokens, not on how deltas group them.

    Text of the tokens before `min_tokens` can't match a stop string, as in the engine. The token
    that ended the answer (end of sequence, stop token) is never shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, limits: Limits, reader: CallReader | None = None
    ) -> None:
        """reader: reads tool calls out of the text, where there are tools."""
        self._reader = reader
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(limits.stop)
        self._ends = {*tokenizer.eos_token_ids, *limits.stop_token_ids}
        self._min_tokens = limits.min_tokens
        self._tokenizer = tokenizer
        self._spelled: list[ShownToken] = []
        self._offset = 0
        self.tokens = 0

    def take(self, delta: Delta) -> Piece:
        """The piece a delta adds; RequestError when it says that the request failed."""
        if delta.finish in ("error", "abort"):
            text = delta.error or "The request was aborted by the server; send it again."
            raise RequestError(500, "server_error", None, text, "generation_failed")
        shown = self._shown(delta)
        text = "".join(map(self._push, shown))
        self.tokens += len(delta.token_ids) - len(shown)
        for token_id, entry in zip(shown, delta.logprobs, strict=False):  # none, or one for each
            self._spell(token_id, entry)
        if delta.finish is None and self._matcher.matched is None:
            read = self._reader.push(text) if self._reader is not None else Read(text)
            shown_any = bool(read.content or read.calls)
            tokens = self._take_spelled() if shown_any else ()
            return Piece(read.content, None, tokens, read.calls)
        return self._end(text + self._rest(), "length" if delta.finish == "length" else "stop")

    def _end(self, text: str, finish: FinishReason) -> Piece:
        if self._reader is None:
            return Piece(text, finish, self._take_spelled())
        read, rest = self._reader.push(text), self._reader.flush()
        if self._reader.count and finish == "stop":
            finish = "tool_calls"
        return Piece(read.content + rest.content, finish, self._take_spelled(), read.calls)

    def _spell(self, token_id: int, entry: TokenLogprob) -> None:
        spelled = spell(self._tokenizer, token_id, entry, self._offset)
        self._offset += len(spelled.token.text)
        self._spelled.append(spelled)

    def _take_spelled(self) -> tuple[ShownToken, ...]:
        spelled, self._spelled = tuple(self._spelled), []
        return spelled

    def _shown(self, delta: Delta) -> tuple[int, ...]:
        """The delta's tokens without a last one that only ends the answer."""
        ended = delta.finish == "stop" and delta.stop is None
        if ended and delta.token_ids and delta.token_ids[-1] in self._ends:
            return delta.token_ids[:-1]
        return delta.token_ids

    def _push(self, token: int) -> str:
        self.tokens += 1
        return self._matched(self._detokenizer.push([token]))

    def _matched(self, text: str) -> str:
        if self._matcher.matched is not None:
            return ""
        return text if self.tokens < self._min_tokens else self._matcher.push(text).text

    def _rest(self) -> str:
        """What was held back: half a character, then the beginning of a stop string."""
        return self._matched(self._detokenizer.flush()) + self._matcher.flush().text


class Generation:
    """One request at the service. Call `start` once, then iterate once, and always `aclose`.

    `aclose` may be called at any time by the task that started the generation, and again: it ends
    the service's generator and waits at most close_deadline_s for it.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        tokenizer: Tokenizer,
        metrics: RequestMetrics,
        close_deadline_s: float,
        reader: CallReader | None = None,
    ) -> None:
        self.request = request
        self._transcript = Transcript(tokenizer, request.limits, reader)
        self._deltas = service.generate(request)
        self._metrics = metrics
        self._close_deadline_s = close_deadline_s
        self._first: Piece | None = None
        self.cached_tokens = 0
        self._logprobs: list[float] = []
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait for the first delta, so that a refusal can still be an HTTP status."""
        self._first = await self._next()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The text, piece by piece; the last one has `finish`. RequestError when it fails."""
        assert self._first is not None, "start() comes before pieces()"
        piece = self._first
        while True:
            if piece.text or piece.calls or piece.finish is not None:
                yield piece
            if piece.finish is not None:
                return
            piece = await self._next()

    async def _next(self) -> Piece:
        try:
            delta = await anext(self._deltas)
            self._metrics.delta(len(delta.token_ids))
            self.cached_tokens = delta.cached_tokens
            self._logprobs.extend(entry.logprob for entry in delta.logprobs)
            piece = self._transcript.take(delta)
        except Exception as error:  # the service may be remote, and fail with anything
            self._metrics.ended("error")
            raise self._failure(error) from error
        if piece.finish is not None:
            self._metrics.ended(piece.finish)
        return piece

    def _failure(self, error: Exception) -> RequestError:
        """What to tell the client; whatever is no RequestError is a fault of ours, and logged."""
        if isinstance(error, RequestError):
            return error
        text = "The server failed while it worked on the request; send it again."
        if isinstance(error, StopAsyncIteration):
            text = "The server ended the request without a finish reason; send it again."
        log.error("request %s failed", self.request.request_id, exc_info=error)
        return RequestError(500, "server_error", None, text, "generation_failed")

    @property
    def mean_logprob(self) -> float:
        """Of the tokens so far, which were asked to be reported."""
        return sum(self._logprobs) / len(self._logprobs)

    @property
    def completion_tokens(self) -> int:
        """Tokens so far; final once the last piece is out."""
        return self._transcript.tokens

    async def aclose(self) -> None:
        """End the request at the service; its work stops and its pages become free."""
        if self._closing is None:
            self._metrics.closed()
            self._closing = asyncio.create_task(self._close())
        # Shielded: the caller is often being cancelled, the close must not be.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(self._close_deadline_s):
                await self._deltas.aclose()
        except Exception:  # the service may be remote; nobody is left to tell but the log
            log.exception("closing request %s failed", self.request.request_id)


def failure_frame(error: RequestError) -> bytes:
    """An error after the first byte: the status is gone out already, so it is an event."""
    return b"data: " + json.dumps(error.body(), ensure_ascii=False).encode() + b"\n\n"
