"""OpenAI's requests: what is accepted, what is refused and with which words.

Types are strict (no coercion, no unknown fields, no NaN). A parameter that this version does not
act on is declared with the values that change nothing (`NEUTRAL`); any other value is refused, so
that nothing asked for is ever silently left out. Called by http.py; the answers are in answers.py.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from serve.chat import join_parts
from serve.errors import explain, mistyped, unsupported
from serve.formats import ResponseFormat, StructuredOutputs
from serve.grammar.terms import Grammar
from serve.tools import Called, NamedTool, Tool, ToolChoice, Tools, forced, written

MAX_STOPS = 16
MAX_CHOICES = 128  # as OpenAI's
NOTHING: tuple[Any, ...] = (None,)
EMPTY: tuple[Any, ...] = (None, [])

# Parameter -> the values that ask for nothing beyond what this version does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "functions": EMPTY,
    "annotations": EMPTY,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "include_obfuscation": (None, False),
    "audio": NOTHING,
    "moderation": NOTHING,
    "prediction": NOTHING,
    "prompt_cache_options": NOTHING,
    "prompt_cache_retention": (None, "in_memory"),
    "refusal": NOTHING,
    "web_search_options": NOTHING,
}


def _one_prompt(value: Any) -> str | tuple[int, ...]:
    """A string or a list of token ids; a list that holds exactly one of these is that one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise mistyped("should be a string or a list of token ids")
    if all(type(token) is int for token in value):
        return tuple(value)
    if len(value) == 1:
        return _one_prompt(value[0])
    if all(isinstance(prompt, str | list) for prompt in value):
        raise unsupported(f"{len(value)} prompts in one request are not supported; send one.")
    raise mistyped("should be a string or a list of token ids (integers)")


def _stop_list(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise mistyped("should be a string or a list of strings")
    if len(strings) > MAX_STOPS:
        raise ValueError(f"has {len(strings)} strings; at most {MAX_STOPS} are accepted")
    if any(not 1 <= len(s) <= 1024 for s in strings):
        raise ValueError("each stop string should have 1 to 1024 characters")
    return tuple(strings)


class Wire(BaseModel):
    """A JSON object of the API."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator(*NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        accepted = NEUTRAL[info.field_name or ""]
        if any(
            value == known and isinstance(value, bool) == isinstance(known, bool)
            for known in accepted
        ):
            return value
        known = " or ".join("null" if v is None else _quoted(v) for v in accepted)
        raise unsupported(f"{_quoted(value)} is not supported by this version; accepted: {known}.")


def _quoted(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return text if len(text) <= 80 else text[:77] + "…"


Content = Annotated[str | None, PlainValidator(join_parts)]
Prompt = Annotated[str | tuple[int, ...], PlainValidator(_one_prompt)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stop_list)]
Name = Annotated[str, StringConstraints(max_length=256)]
Tokens = Annotated[int, Field(ge=1, le=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[Name, Label], Field(max_length=16)]


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatMessage(Wire):
    """One message; `content` is one text already."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Name | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    audio: Any = None
    tool_calls: list[Called] | None = None
    function_call: Any = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise mistyped("only a message of role 'assistant' has these", ".tool_calls")
        if self.content is None and not self.tool_calls:
            text = "a message needs content: a string or a list of text parts"
            raise mistyped(text, ".content")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise mistyped("a message of role 'tool', and no other, has one", ".tool_call_id")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as templates know it; 'developer' is OpenAI's newer word for 'system'."""
        role = "system" if self.role == "developer" else self.role
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        fields = {key: value for key, value in optional.items() if value is not None}
        texts = [self.content or "", written(self.tool_calls or [])]
        return {"role": role, "content": "\n".join(filter(None, texts)), **fields}


class GenerationRequest(Wire):
    """What chat completions and completions share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stops = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] | None = (
        None
    )
    ignore_eos: bool | None = False
    user: Label | None = None
    structured_outputs: StructuredOutputs | None = None
    frequency_penalty: Penalty | None = 0
    presence_penalty: Penalty | None = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1
    logit_bias: Annotated[dict[Name, Bias], Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise mistyped("is only accepted when 'stream' is true", ".stream_options")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The asked-for maximum of new tokens, None for the default."""
        return self.max_tokens

    @property
    def reported_logprobs(self) -> int | None:
        """With how many of the most likely tokens to report each token; None for not at all."""
        raise AssertionError("each endpoint has its own fields for it")

    @property
    def choices(self) -> int:
        """How many answers to make."""
        return self.n or 1

    @property
    def grammar(self) -> tuple[Grammar | None, str]:
        """The form that is asked for, if any, and the field that asks for it."""
        asked = self.structured_outputs
        return (asked.terms() if asked is not None else None), "structured_outputs"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = True
    # Hints without an effect here; any well-formed value is accepted.
    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    # Accepted with a neutral value only.
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    moderation: Any = None
    prediction: Any = None
    web_search_options: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _one_maximum(self) -> "ChatRequest":
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            text = "differs from 'max_completion_tokens'; send one of the two"
            raise mistyped(text, ".max_tokens")
        return self

    @model_validator(mode="after")
    def _logprobs_asked(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise mistyped("is only accepted when 'logprobs' is true", ".top_logprobs")
        return self

    @property
    def reported_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_form(self) -> "ChatRequest":
        if super().grammar[0] is not None and self._formatted() is not None:
            raise mistyped(
                "is given and 'response_format' as well; send one", ".structured_outputs"
            )
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or []]
        if len(names) != len(set(names)):
            raise mistyped("has two functions of one name", ".tools")
        if isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                raise mistyped("names a function that is not in 'tools'", ".tool_choice")
        elif self.tool_choice == "required" and not names:
            raise mistyped("is 'required', and 'tools' has none", ".tool_choice")
        if self.offered_tools and self.grammar[1] != "tool_choice" and self.grammar[0] is not None:
            raise mistyped("can't be held beside 'tools'; send one", "." + self.grammar[1])
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model hears of."""
        return [] if self.tool_choice == "none" else self.tools or []

    def _formatted(self) -> Grammar | None:
        return self.response_format.grammar() if self.response_format is not None else None

    @property
    def grammar(self) -> tuple[Grammar | None, str]:
        formatted = self._formatted()
        if formatted is not None:
            return formatted, "response_format"
        parallel = self.parallel_tool_calls is not False
        call = forced(self.offered_tools, self.tool_choice, parallel)
        asked = super().grammar
        return (call, "tool_choice") if call is not None and asked[0] is None else asked

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = False
    # Accepted with a neutral value only.
    suffix: str | None = None

    @model_validator(mode="after")
    def _choices_agree(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise mistyped("should be at least 'n'", ".best_of")
        if self.stream and self.choices > (self.n or 1):
            text = "above 'n' is not accepted with 'stream': the best is known at the end only"
            raise mistyped(text, ".best_of")
        return self

    @property
    def choices(self) -> int:
        return self.best_of or self.n or 1

    @property
    def reported_logprobs(self) -> int | None:
        return self.logprobs


KNOWN_FIELDS = {"messages": tuple(ChatMessage.model_fields)}
KNOWN_FIELDS["stream_options"] = tuple(StreamOptions.model_fields)
KNOWN_FIELDS["response_format"] = tuple(ResponseFormat.model_fields)
KNOWN_FIELDS["json_schema"] = ("name", "description", "schema", "strict")
KNOWN_FIELDS["structured_outputs"] = ("json", "regex", "choice", "grammar", "json_object")
Parsed = TypeVar("Parsed", bound=Wire)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """The request in a body; RequestError 400 names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        json = from_json(body) if error.errors()[0]["type"] != "json_invalid" else None
        raise explain(error, json, {"": tuple(kind.model_fields), **KNOWN_FIELDS}) from error
