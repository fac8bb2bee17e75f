"""The form of an answer as clients ask for it: response_format, and vLLM's structured_outputs.

A schema is held exactly whether or not `strict` is true; strict is accepted because clients send
it. Types are checked here, whether a grammar compiles in admit.py. Called by openai.py, whose
requests have these fields.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from serve.errors import mistyped
from serve.grammar.terms import Grammar

FormatName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Choice = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class Part(BaseModel):
    """A JSON object inside a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class JsonSchema(Part):
    """`schema` in the API, a name that pydantic's models have taken."""

    name: FormatName
    description: str | None = None
    form: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            text = "the type 'json_schema', and no other, has one"
            raise mistyped(text, ".json_schema")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.form is None:
            return Grammar("json_object")
        return Grammar("json_schema", json.dumps(self.json_schema.form))


class StructuredOutputs(Part):
    """Exactly one of these. choice: the answer is one of the strings."""

    form: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        fields = (self.form, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(field is not None for field in fields) != 1:
            raise mistyped("should have exactly one of json, regex, choice, grammar, json_object")
        return self

    def terms(self) -> Grammar:
        if self.form is not None:
            text = self.form if isinstance(self.form, str) else json.dumps(self.form)
            return Grammar("json_schema", text)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.grammar is not None:
            return Grammar("ebnf", self.grammar)
        if self.choice is not None:
            return Grammar("regex", "|".join(map(_literal, self.choice)))
        return Grammar("json_object")


def _literal(text: str) -> str:
    """A regular expression that matches this text and nothing else."""
    return "".join(c if c.isalnum() or c in " _" else f"\\x{{{ord(c):x}}}" for c in text)
