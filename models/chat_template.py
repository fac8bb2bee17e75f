"""Renders messages into a prompt with the template that a checkpoint brings along.

Templates are programs from strangers: they run in jinja2's immutable sandbox, set up as
transformers does so that they render the same characters. Used by the HTTP edge.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; in a prompt it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. Immutable; safe to share between threads."""

    def __init__(self, template: str, special_texts: Mapping[str, str], *, source: str) -> None:
        """special_texts: values of bos_token, eos_token and so on. ValueError naming `source`
        when the template is not valid jinja."""
        self._special_texts = dict(special_texts)
        self.text = template
        try:
            self._template = _environment().from_string(template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"{source}: the chat template is not valid jinja: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for these messages. ValueError with the template's own words when it refuses
        them, or when they lack what it reads."""
        try:
            return self._template.render(
                **self._special_texts,
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # Foreign code: it may fail with anything, and all of it means these messages don't fit.
        except Exception as error:
            raise ValueError(f"The model's chat template refuses these messages: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
