"""The requests and answers of /tokenize and /detokenize, in vLLM's shapes. Called by http.py."""

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, model_validator

from serve.errors import mistyped
from serve.openai import ChatMessage, Wire


class TokenizeRequest(Wire):
    """A prompt or messages, not both. add_special_tokens: what the model expects before a raw
    prompt; messages bring theirs in the chat template."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise mistyped("send either 'prompt' or 'messages'", ".prompt")
        return self


class DetokenizeRequest(Wire):
    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 20)]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    prompt: str
