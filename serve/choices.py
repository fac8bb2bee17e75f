"""The choices of one answer: several generations, merged into one stream or one object.

Called by http.py, which closes it whatever happened. Events come in the order in which pieces are
made; each choice's own pieces stay in order.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from serve.answers import Answer, CachedTokens, Complete, FinishReason, Format, Usage
from serve.calls import ToolCall
from serve.errors import RequestError
from serve.spell import ShownToken
from serve.stream import Generation, Piece, failure_frame

DONE = b"data: [DONE]\n\n"
MOST_UNREAD_PIECES = 64  # of all choices together; then they wait for the client


class ChoicePiece(NamedTuple):
    """A piece of one choice."""

    choice: int
    piece: Piece


class Choices:
    """All generations of one request. Call `start` once, iterate `pieces` once, always `aclose`."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        assert generations
        self.generations = list(generations)

    async def start(self) -> None:
        """Wait for the first delta of each, so that a refusal can still be an HTTP status."""
        if len(self.generations) == 1:
            await self.generations[0].start()
            return
        try:
            async with asyncio.TaskGroup() as group:
                for generation in self.generations:
                    group.create_task(generation.start())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def pieces(self) -> AsyncGenerator[ChoicePiece, None]:
        """The pieces of all choices. RequestError when one of them fails."""
        if len(self.generations) == 1:
            async with contextlib.aclosing(self.generations[0].pieces()) as pieces:
                async for piece in pieces:
                    yield ChoicePiece(0, piece)
            return
        made: asyncio.Queue[ChoicePiece | RequestError] = asyncio.Queue(MOST_UNREAD_PIECES)
        pumps = [
            asyncio.create_task(_pump(index, generation, made))
            for index, generation in enumerate(self.generations)
        ]
        try:
            open_choices = len(pumps)
            while open_choices:
                item = await made.get()
                if isinstance(item, RequestError):
                    raise item
                open_choices -= item.piece.finish is not None
                yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def usage(self) -> Usage:
        """Tokens so far, the prompt's once; final once the last piece is out."""
        prompt = len(self.generations[0].request.prompt)
        completion = sum(generation.completion_tokens for generation in self.generations)
        cached = min(self.generations[0].cached_tokens, prompt)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    async def aclose(self) -> None:
        """End all of them at the service."""
        await asyncio.gather(*(generation.aclose() for generation in self.generations))


async def _pump(
    index: int, generation: Generation, made: "asyncio.Queue[ChoicePiece | RequestError]"
) -> None:
    try:
        async with contextlib.aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                await made.put(ChoicePiece(index, piece))
    except RequestError as error:
        await made.put(error)


async def frames(
    choices: Choices, form: Format, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The SSE events of a streamed answer; a failure on the way is an event, then the end."""
    for index in range(len(choices.generations)):
        opening = form.opening(index)
        if opening is not None:
            yield _event(opening)
    try:
        async with contextlib.aclosing(choices.pieces()) as pieces:
            async for index, piece in pieces:
                for chunk in _chunks(form, index, piece):
                    yield _event(chunk)
    except RequestError as error:
        yield failure_frame(error)
        return
    if include_usage:
        yield _event(form.usage(choices.usage()))
    yield DONE


def _chunks(form: Format, index: int, piece: Piece) -> list[Answer]:
    """Text first, then the finish reason in a chunk of its own, as OpenAI does."""
    if not piece.text and not piece.calls:
        return [form.chunk("", piece.finish, piece.tokens, index)]
    chunks = [form.chunk(piece.text, None, piece.tokens, index, piece.calls)]
    return chunks if piece.finish is None else [*chunks, form.chunk("", piece.finish, (), index)]


async def whole(choices: Choices, form: Format, shown: int = 1, report: bool = True) -> Answer:
    """The answer in one object, of the same pieces: all choices, or the `shown` ones whose tokens
    are likeliest on average, best first. report: with log-probabilities, if there are any.
    RequestError when the request failed."""
    count = len(choices.generations)
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[ShownToken]] = [[] for _ in range(count)]
    calls: list[list[ToolCall]] = [[] for _ in range(count)]
    ends: list[FinishReason] = ["stop"] * count
    async for index, piece in choices.pieces():
        texts[index].append(piece.text)
        tokens[index].extend(piece.tokens if report else ())
        calls[index].extend(piece.calls)
        ends[index] = piece.finish or ends[index]
    order = list(range(count))
    if shown < count:
        order.sort(key=lambda index: -choices.generations[index].mean_logprob)
    made = [
        Complete("".join(texts[n]), ends[n], tuple(tokens[n]), tuple(calls[n]))
        for n in order[:shown]
    ]
    return form.answer(made, choices.usage())


def _event(chunk: Answer) -> bytes:
    return b"data: " + chunk.model_dump_json().encode() + b"\n\n"
