"""OpenAI's answers: the objects of every response and of every chunk of a stream.

A `Format` writes one endpoint's objects; stream.py feeds it pieces and knows nothing of endpoints.
`usage` is a field of a chunk only where the client asked for it, null until the last chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel

from serve.calls import ToolCall
from serve.echo import Echo
from serve.spell import ShownToken, Spelled


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one request; an end or stop token counts as a completion token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenWithTop]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Parallel lists, one entry per token; text_offset in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None


class AnswerMessageWithCalls(AnswerMessage):
    tool_calls: list[dict[str, Any]]


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessageWithCalls | AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class DeltaChoice(BaseModel):
    index: int = 0
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class TextChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


Choices = list[ChatChoice] | list[DeltaChoice] | list[TextChoice]
ObjectName = Literal["chat.completion", "chat.completion.chunk", "text_completion"]


class Answer(BaseModel):
    """What every answer and every chunk of a stream begins with."""

    id: str
    object: ObjectName
    created: int
    model: str
    choices: Choices


class AnswerWithUsage(Answer):
    """An answer, or a chunk of a stream that reports usage (null until the last chunk)."""

    usage: Usage | None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sanderling"
    max_model_len: int  # as vLLM names the context length
    quality_cost: str = ""  # of the settings that it is served with; empty: none


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def chat_logprobs(tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
    """The tokens in the shape of chat completions; None for none."""
    if not tokens:
        return None
    return ChatLogprobs(
        content=[
            ChatTokenWithTop(
                **_chat_token(shown.token),
                top_logprobs=[ChatToken(**_chat_token(other)) for other in shown.top],
            )
            for shown in tokens
        ]
    )


def _chat_token(spelled: Spelled) -> dict[str, Any]:
    return {"token": spelled.text, "logprob": spelled.logprob, "bytes": list(spelled.raw)}


def text_logprobs(tokens: Sequence[ShownToken], before: int = 0) -> TextLogprobs | None:
    """The tokens in the shape of completions; None for none. before: characters of the text that
    come before all of them."""
    if not tokens:
        return None
    return TextLogprobs(
        tokens=[shown.token.text for shown in tokens],
        token_logprobs=[shown.token.logprob for shown in tokens],
        top_logprobs=[_top(shown) for shown in tokens],
        text_offset=[before + shown.offset for shown in tokens],
    )


def _top(shown: ShownToken) -> dict[str, float | None] | None:
    if shown.token.logprob is None:
        return None
    # Two halves of characters may read alike: the likelier one comes last, and stays.
    return {other.text: other.logprob for other in reversed(shown.top)}


def _message(text: str, calls: Sequence[ToolCall]) -> AnswerMessage:
    if not calls:
        return AnswerMessage(content=text)
    return AnswerMessageWithCalls(content=text or None, tool_calls=list(map(_call, calls)))


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class Complete(NamedTuple):
    """One choice of an answer that is not streamed."""

    text: str
    finish: FinishReason
    tokens: tuple[ShownToken, ...] = ()
    calls: tuple[ToolCall, ...] = ()


class Format(Protocol):
    """How pieces are written for one endpoint."""

    def opening(self, index: int = 0) -> Answer | None:
        """The chunk of a choice before its text, where there is one."""
        ...

    def chunk(
        self,
        text: str,
        finish: FinishReason | None,
        tokens: Sequence[ShownToken] = (),
        index: int = 0,
        calls: Sequence[ToolCall] = (),
    ) -> Answer:
        """A chunk of a stream; the last one with a choice has `finish`."""
        ...

    def usage(self, usage: Usage) -> Answer:
        """The chunk with usage and no choices."""
        ...

    def answer(self, made: Sequence[Complete], usage: Usage) -> Answer:
        """The whole answer of a request that is not streamed."""
        ...


@dataclass(frozen=True)
class Head:
    """What all objects of one answer share. created: Unix time in seconds."""

    id: str
    created: int
    model: str
    include_usage: bool

    def write(
        self, kind: ObjectName, choices: Choices, usage: Usage | None = None, whole: bool = False
    ) -> Answer:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if self.include_usage or whole:
            return AnswerWithUsage(**fields, choices=choices, usage=usage)
        return Answer(**fields, choices=choices)


@dataclass(frozen=True)
class ChatFormat:
    """Objects of /v1/chat/completions."""

    head: Head

    def opening(self, index: int = 0) -> Answer | None:
        return self._chunk(DeltaChoice(index=index, delta={"role": "assistant", "content": ""}))

    def chunk(
        self,
        text: str,
        finish: FinishReason | None,
        tokens: Sequence[ShownToken] = (),
        index: int = 0,
        calls: Sequence[ToolCall] = (),
    ) -> Answer:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": call.place, **_call(call)} for call in calls]
        logprobs = chat_logprobs(tokens)
        return self._chunk(
            DeltaChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        )

    def usage(self, usage: Usage) -> Answer:
        return self.head.write("chat.completion.chunk", [], usage)

    def answer(self, made: Sequence[Complete], usage: Usage) -> Answer:
        choices = [
            ChatChoice(
                index=index,
                message=_message(text, calls),
                logprobs=chat_logprobs(tokens),
                finish_reason=finish,
            )
            for index, (text, finish, tokens, calls) in enumerate(made)
        ]
        return self.head.write("chat.completion", choices, usage, whole=True)

    def _chunk(self, choice: DeltaChoice) -> Answer:
        return self.head.write("chat.completion.chunk", [choice])


@dataclass(frozen=True)
class CompletionFormat:
    """Objects of /v1/completions. echo: what each text begins with."""

    head: Head
    echo: Echo = Echo()

    def opening(self, index: int = 0) -> Answer | None:
        if not self.echo.text:
            return None
        return self._chunk(self.echo.text, None, text_logprobs(self.echo.tokens), index)

    def chunk(
        self,
        text: str,
        finish: FinishReason | None,
        tokens: Sequence[ShownToken] = (),
        index: int = 0,
        calls: Sequence[ToolCall] = (),
    ) -> Answer:
        return self._chunk(text, finish, text_logprobs(tokens, len(self.echo.text)), index)

    def usage(self, usage: Usage) -> Answer:
        return self.head.write("text_completion", [], usage)

    def answer(self, made: Sequence[Complete], usage: Usage) -> Answer:
        choices = [
            TextChoice(
                index=index,
                text=self.echo.text + text,
                logprobs=self._whole_logprobs(tokens),
                finish_reason=finish,
            )
            for index, (text, finish, tokens, _) in enumerate(made)
        ]
        return self.head.write("text_completion", choices, usage, whole=True)

    def _whole_logprobs(self, tokens: Sequence[ShownToken]) -> TextLogprobs | None:
        before = len(self.echo.text)
        moved = [shown._replace(offset=before + shown.offset) for shown in tokens]
        return text_logprobs([*self.echo.tokens, *moved])

    def _chunk(
        self,
        text: str,
        finish: FinishReason | None,
        logprobs: TextLogprobs | None,
        index: int,
    ) -> Answer:
        choice = TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
        return self.head.write("text_completion", [choice])
